#include "kernels/cores.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgeq {
namespace {

#if defined(__linux__)

// The first number in a file, or `otherwise`.
long read_number(const std::string& path, long otherwise) {
    std::FILE* file = std::fopen(path.c_str(), "r");
    if (!file) return otherwise;
    long number;
    if (std::fscanf(file, "%ld", &number) != 1) number = otherwise;
    std::fclose(file);
    return number;
}

// The container's CPU quota (cgroup v2: "quota period", or "max") in whole cores, or `otherwise`.
int quota(int otherwise) {
    std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r");
    if (!file) return otherwise;
    long allowed, period;
    bool limited = std::fscanf(file, "%ld %ld", &allowed, &period) == 2 && period > 0;
    std::fclose(file);
    return limited ? int(std::max(1L, allowed / period)) : otherwise;
}

int count_cores() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return int(std::thread::hardware_concurrency());
    std::vector<long> capacities;  // one entry for every core
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        std::string path = "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
        long first_sibling = read_number(path + "/topology/thread_siblings_list", cpu);
        if (first_sibling < cpu && CPU_ISSET(first_sibling, &allowed)) continue;
        capacities.push_back(read_number(path + "/cpu_capacity", 0));
    }
    if (capacities.empty()) return int(std::thread::hardware_concurrency());
    long fastest = *std::max_element(capacities.begin(), capacities.end());
    int cores = int(std::count(capacities.begin(), capacities.end(), fastest));
    return std::min(cores, quota(cores));
}

#elif defined(__APPLE__)

int count_cores() {
    int cores = 0;
    size_t size = sizeof cores;
    bool known = sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) == 0;
    return known ? cores : int(std::thread::hardware_concurrency());
}

#else

int count_cores() { return int(std::thread::hardware_concurrency()); }

#endif

}  // namespace

int default_thread_count() { return std::max(1, count_cores()); }

}  // namespace edgeq
