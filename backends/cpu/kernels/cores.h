// How many threads this machine has use for.
#pragma once

namespace edgeq {

// The fast physical cores that this process may use: of a mixed processor only the fastest kind, of two hardware
// threads on a core one, and no more than the container's CPU quota.
int default_thread_count();

}  // namespace edgeq
