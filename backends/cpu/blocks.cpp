#include "blocks.h"

#include "kernels/scratch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace edgeq {

constexpr std::size_t line = 64, huge_page = 2 << 20;
constexpr std::size_t region_blocks = 16;

std::atomic<std::size_t> scratch_nbytes{0};
constexpr std::size_t most_nbytes = PTRDIFF_MAX / (2 * region_blocks);  // of a block

// A mapping cut into blocks of one size.
struct Region {
    char *mapping, *first;
    const std::size_t mapped, block_nbytes, count;
    std::vector<char*> free;
    std::size_t idle = 0;  // so many of `free`, the last ones, have been used

    Region(std::size_t block_nbytes, std::size_t count)
        : mapped(count * block_nbytes + alignment(count * block_nbytes)), block_nbytes(block_nbytes), count(count) {
        free.reserve(count);  // giving back never fails
        void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        mapping = static_cast<char*>(p);
        first = mapping + -reinterpret_cast<uintptr_t>(mapping) % alignment(count * block_nbytes);
#ifdef MADV_HUGEPAGE
        if (count * block_nbytes >= huge_page) madvise(first, count * block_nbytes, MADV_HUGEPAGE);  // refused: slower
#endif
        for (std::size_t i = count; i-- > 0;) free.push_back(first + i * block_nbytes);
    }
    ~Region() { munmap(mapping, mapped); }
    Region(const Region&) = delete;

    static std::size_t alignment(std::size_t nbytes) { return nbytes >= huge_page ? huge_page : line; }

    bool unused() const { return free.size() == count; }
};

namespace {

struct Regions {
    std::mutex mutex;
    std::map<std::size_t, std::vector<std::unique_ptr<Region>>> of_size;
};

// Never destroyed: arrays may outlive every static object.
Regions& regions() {
    static Regions* all = new Regions;
    return *all;
}

std::size_t block_size(std::size_t nbytes) { return std::max(line, (nbytes + line - 1) / line * line); }

bool has_room(const std::unique_ptr<Region>& r) { return !r->free.empty(); }

// Where there is no room for a whole region, one of a single block.
std::unique_ptr<Region> new_region(std::size_t block_nbytes) {
    try {
        return std::make_unique<Region>(block_nbytes, region_blocks);
    } catch (const std::bad_alloc&) {
        return std::make_unique<Region>(block_nbytes, 1);
    }
}

}  // namespace

std::size_t blocks_nbytes() {
    std::lock_guard lock(regions().mutex);
    std::size_t total = 0;
    for (const auto& [size, some] : regions().of_size)
        for (const auto& region : some) total += (region_blocks - region->free.size()) * size;
    return total;
}

std::size_t idle_blocks(std::size_t nbytes) {
    std::lock_guard lock(regions().mutex);
    const auto some = regions().of_size.find(block_size(nbytes));
    std::size_t count = 0;
    if (some != regions().of_size.end())
        for (const auto& region : some->second) count += region->idle;
    return count;
}

void trim_blocks() {
#ifdef MADV_DONTNEED
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    std::lock_guard lock(regions().mutex);
    for (const auto& [size, some] : regions().of_size)
        for (const auto& region : some) {
            for (char* block : region->free) {
                const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page;
                const uintptr_t end = reinterpret_cast<uintptr_t>(block + size) / page * page;
                if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
            }
            region->idle = 0;
        }
#endif
}

Block take_block(std::size_t nbytes) {
    if (nbytes > most_nbytes) throw std::bad_alloc();
    const std::size_t size = block_size(nbytes);
    std::lock_guard lock(regions().mutex);
    auto& some = regions().of_size[size];
    auto found = std::find_if(some.begin(), some.end(), has_room);
    if (found == some.end()) found = some.insert(some.end(), new_region(size));
    Region* region = found->get();
    char* data = region->free.back();
    region->free.pop_back();
    if (region->idle) region->idle--;
    return {data, region};
}

void give_back(Block block) {
    std::lock_guard lock(regions().mutex);
    Region* region = block.region;
    region->free.push_back(block.data);
    region->idle++;
    if (!region->unused()) return;
    auto& some = regions().of_size[region->block_nbytes];
    if (std::count_if(some.begin(), some.end(), has_room) < 2) return;
    some.erase(std::find_if(some.begin(), some.end(), [&](auto& r) { return r.get() == region; }));
}

}  // namespace edgeq
