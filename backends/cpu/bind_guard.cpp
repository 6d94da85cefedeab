// What happens when a mapped file is cut short, or its disk fails, while weights are read from it: the system sends
// SIGBUS, which ends a process without a word. Installed by edgeq/guard.py, the handler looks whether the address lies
// in a file that was announced; then it says which one and leaves with exit code 4, or, while a caller has promised to
// look (`zeros`), puts a page of zeros there and takes note. Any other SIGBUS goes where it would have gone.
//
// Everything that the handler touches is static and atomic; it calls write, pause, mmap, sigaction, raise and _exit
// only.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

struct Mapping {
    std::atomic<std::uintptr_t> begin{0};  // 0: free
    std::atomic<std::uintptr_t> end{0};
    std::atomic<bool> hit{false};
    char path[1024];
};

constexpr int kMappings = 4096;
Mapping mappings[kMappings];
std::atomic<int> used{0};  // mappings from there on are free
std::atomic<bool> zeros{false};
std::atomic_flag leaving = ATOMIC_FLAG_INIT;
std::mutex changing;
struct sigaction before;
std::uintptr_t page_size = 0;

Mapping* find(std::uintptr_t address) {
    for (int i = 0; i < used.load(); ++i) {
        std::uintptr_t begin = mappings[i].begin.load();
        if (begin != 0 && begin <= address && address < mappings[i].end.load()) return &mappings[i];
    }
    return nullptr;
}

void say(const char* text) {
    ssize_t ignored = write(STDERR_FILENO, text, std::strlen(text));
    (void)ignored;
}

// The first thread to come here speaks; others wait for its end.
[[noreturn]] void leave(const char* path) {
    while (leaving.test_and_set()) pause();
    say("error: ");
    say(path);
    say(" was cut short, or could not be read, while it was in use\nhint: copy or download it again\n");
    _exit(4);
}

bool put_zeros(std::uintptr_t address) {
    void* page = reinterpret_cast<void*>(address & ~(page_size - 1));
    return mmap(page, page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

void hand_on(int signal, siginfo_t* info, void* context) {
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
    } else {
        sigaction(signal, &before, nullptr);
        if (info->si_code <= 0) raise(signal);  // sent by a process: it will not come again of itself
    }
}

void handle(int signal, siginfo_t* info, void* context) {
    int error = errno;
    Mapping* mapping = info->si_code > 0 ? find(reinterpret_cast<std::uintptr_t>(info->si_addr)) : nullptr;
    if (mapping == nullptr) {
        hand_on(signal, info, context);
    } else if (zeros.load() && put_zeros(reinterpret_cast<std::uintptr_t>(info->si_addr))) {
        mapping->hit.store(true);
    } else {
        leave(mapping->path);
    }
    errno = error;
}

void install() {
    std::lock_guard<std::mutex> lock(changing);
    if (page_size != 0) return;
    page_size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
}

// The mapping's number, -1 if there are too many.
int add(std::uintptr_t begin, std::size_t size, const std::string& path) {
    std::lock_guard<std::mutex> lock(changing);
    for (int i = 0; i < kMappings; ++i) {
        Mapping& m = mappings[i];
        if (m.begin.load() != 0) continue;
        std::strncpy(m.path, path.c_str(), sizeof m.path - 1);
        m.hit.store(false);
        m.end.store(begin + size);
        m.begin.store(begin);
        if (used.load() <= i) used.store(i + 1);
        return i;
    }
    return -1;
}

void forget(int number) {
    std::lock_guard<std::mutex> lock(changing);
    if (0 <= number && number < kMappings) mappings[number].begin.store(0);
}

bool hit(int number) { return 0 <= number && number < kMappings && mappings[number].hit.load(); }

}  // namespace

void bind_guard(nb::module_& m) {
    m.def("guard_install", &install, "Take over SIGBUS for announced files; the handler there was gets the rest.");
    m.def("guard_add", &add, "begin"_a, "size"_a, "path"_a, "Announce a mapped file; its number, -1 if it has none.");
    m.def("guard_forget", &forget, "number"_a, "It is mapped no more.");
    m.def("guard_hit", &hit, "number"_a, "Whether pages of the file were replaced by zeros.");
    m.def(
        "guard_zeros", [](bool wanted) { return zeros.exchange(wanted); }, "wanted"_a,
        "Whether to go on with zeros instead of leaving; what held before.");
}
