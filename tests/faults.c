// Makes the system calls of one folder fail, on purpose and countably: LD_PRELOADed by tests/faults.py.
//
// Every call that changes anything below FAULTS_FOLDER is a step. When `faults_arm` has been called, the step of that
// number goes wrong in the way that was asked for; `faults_steps` says how many there were.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NOTHING, FAIL, SHORT, KILL, STAY };  // STAY: every step from this one on fails

static atomic_int steps, at = -1, kind, number;

__attribute__((visibility("default"))) void faults_arm(int step, int what, int error) {
    steps = 0;
    at = step;
    kind = what;
    number = error;
}
__attribute__((visibility("default"))) int faults_steps(void) { return steps; }

static int watched(const char* path) {
    const char* folder = getenv("FAULTS_FOLDER");
    return folder != NULL && path != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

static int watched_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return watched(path);
}

static int watched_at(int fd, const char* path) {
    return path[0] == '/' || fd == AT_FDCWD ? watched(path) : watched_fd(fd);
}

// What is to happen at this step.
static int step(void) {
    int now = steps++;
    int hit = at >= 0 && (now == at || (kind == STAY && now > at));
    if (!hit) return NOTHING;
    if (kind == KILL) raise(SIGKILL);
    if (kind == FAIL || kind == STAY) errno = number;
    return kind;
}

#define NEXT(name) \
    static __typeof__(&name) next;   \
    if (next == NULL) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAILS(condition) \
    if (condition) {                           \
        int what = step();                     \
        if (what == FAIL || what == STAY) return -1; \
    }
#define WRITES (O_WRONLY | O_RDWR | O_CREAT)

#define OPEN(name)                                             \
    int name(const char* path, int flags, ...) {               \
        NEXT(name);                                            \
        va_list more;                                          \
        va_start(more, flags);                                 \
        mode_t mode = flags & O_CREAT ? va_arg(more, int) : 0; \
        va_end(more);                                          \
        FAILS((flags & WRITES) && watched(path))               \
        return next(path, flags, mode);                        \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void* data, size_t size) {
    NEXT(write);
    if (fd > 2 && watched_fd(fd)) {
        int what = step();
        if (what == FAIL || what == STAY) return -1;
        if (what == SHORT && size > 1) size = size / 2;
    }
    return next(fd, data, size);
}
int fsync(int fd) {
    NEXT(fsync);
    FAILS(watched_fd(fd))
    return next(fd);
}
int rename(const char* from, const char* to) {
    NEXT(rename);
    FAILS(watched(from))
    return next(from, to);
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
    NEXT(renameat2);
    if (getenv("FAULTS_OLD_SYSTEM") != NULL) {
        errno = EINVAL;
        return -1;
    }
    FAILS(watched(from))
    return next(a, from, b, to, flags);
}
int link(const char* from, const char* to) {
    NEXT(link);
    FAILS(watched(from))
    return next(from, to);
}
int unlink(const char* path) {
    NEXT(unlink);
    FAILS(watched(path))
    return next(path);
}
int unlinkat(int fd, const char* path, int flags) {
    NEXT(unlinkat);
    FAILS(watched_at(fd, path))
    return next(fd, path, flags);
}
int mkdir(const char* path, mode_t mode) {
    NEXT(mkdir);
    FAILS(watched(path))
    return next(path, mode);
}
int rmdir(const char* path) {
    NEXT(rmdir);
    FAILS(watched(path))
    return next(path);
}
int chmod(const char* path, mode_t mode) {
    NEXT(chmod);
    FAILS(watched(path))
    return next(path, mode);
}
