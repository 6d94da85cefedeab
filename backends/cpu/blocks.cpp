#include "blocks.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace edgeq {

constexpr std::size_t line = 64, huge_page = 2 << 20;
constexpr std::size_t region_blocks = 16;

// A mapping cut into blocks of one size.
struct Region {
    char *mapping, *first;
    std::size_t mapped, block_nbytes;
    std::vector<char*> free;

    explicit Region(std::size_t block_nbytes) : block_nbytes(block_nbytes) {
        const std::size_t needed = region_blocks * block_nbytes;
        const bool huge = needed >= huge_page;
        mapped = needed + (huge ? huge_page : line);
        void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        mapping = static_cast<char*>(p);
        first = mapping + -reinterpret_cast<uintptr_t>(mapping) % (huge ? huge_page : line);
#ifdef MADV_HUGEPAGE
        if (huge) madvise(first, needed, MADV_HUGEPAGE);  // a refusal costs speed only
#endif
        for (std::size_t i = region_blocks; i-- > 0;) free.push_back(first + i * block_nbytes);
    }
    ~Region() { munmap(mapping, mapped); }
    Region(const Region&) = delete;

    bool unused() const { return free.size() == region_blocks; }
};

namespace {

struct Regions {
    std::mutex mutex;
    std::map<std::size_t, std::vector<Region*>> of_size;
};

// Never destroyed: arrays may outlive every static object.
Regions& regions() {
    static Regions* all = new Regions;
    return *all;
}

bool has_room(const Region* r) { return !r->free.empty(); }

}  // namespace

Block take_block(std::size_t nbytes) {
    const std::size_t size = std::max(line, (nbytes + line - 1) / line * line);
    std::lock_guard lock(regions().mutex);
    auto& some = regions().of_size[size];
    auto found = std::find_if(some.begin(), some.end(), has_room);
    if (found == some.end()) found = some.insert(some.end(), new Region(size));
    Region* region = *found;
    char* data = region->free.back();
    region->free.pop_back();
    return {data, region};
}

void give_back(Block block) {
    std::lock_guard lock(regions().mutex);
    Region* region = block.region;
    region->free.push_back(block.data);
    if (!region->unused()) return;
    auto& some = regions().of_size[region->block_nbytes];
    if (std::count_if(some.begin(), some.end(), has_room) < 2) return;
    some.erase(std::find(some.begin(), some.end(), region));
    delete region;
}

}  // namespace edgeq
