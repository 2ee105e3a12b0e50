/* Preloaded, it makes the n-th call of a kind on paths that contain a text fail with an errno of choice.
 *
 * FAULT_CALL   write | read | fsync | rename (and link) | close | open | unlink | mkdir | truncate
 * FAULT_PATH   part of the path that the call is for
 * FAULT_AFTER  how many such calls succeed first
 * FAULT_COUNT  how many fail then; 0: all
 * FAULT_ERRNO  what they fail with
 * FAULT_SHORT  if set, writes and reads do half of what is asked instead of failing
 *
 * fault_reset() starts to count anew, so that one process can try many faults; fault_hits() says how many calls
 * matched since then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long hits;

void fault_reset(void) { hits = 0; }

long fault_hits(void) { return hits; }

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

static int fails(const char *call, const char *path) {
    const char *wanted = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH");
    if (!wanted || !path || strcmp(wanted, call) || (part && !strstr(path, part)))
        return 0;
    long mine = hits++, after = number("FAULT_AFTER"), count = number("FAULT_COUNT");
    if (mine < after || (count && mine >= after + count))
        return 0;
    errno = (int)number("FAULT_ERRNO");
    return 1;
}

static const char *path_of(int fd) {
    static __thread char buffer[4097];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, 4096);
    if (length < 0)
        return NULL;
    buffer[length] = 0;
    return buffer;
}

static size_t half(size_t n) { return n / 2 ? n / 2 : 1; }

#define REAL(name)                       \
    static __typeof__(&name) real;       \
    if (!real)                           \
    real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define TRANSFER(name, call, pointer, offset)                      \
    ssize_t name(int fd, pointer buffer, size_t n, offset at) {    \
        REAL(name);                                                \
        if (fails(call, path_of(fd))) {                            \
            if (!getenv("FAULT_SHORT"))                            \
                return -1;                                         \
            n = half(n);                                           \
        }                                                          \
        return real(fd, buffer, n, at);                            \
    }

TRANSFER(pwrite, "write", const void *, off_t)
TRANSFER(pwrite64, "write", const void *, off64_t)
TRANSFER(pread, "read", void *, off_t)
TRANSFER(pread64, "read", void *, off64_t)

#define STREAM(name, pointer)                             \
    ssize_t name(int fd, pointer buffer, size_t n) {      \
        REAL(name);                                       \
        if (fails(#name, path_of(fd))) {                  \
            if (!getenv("FAULT_SHORT"))                   \
                return -1;                                \
            n = half(n);                                  \
        }                                                 \
        return real(fd, buffer, n);                       \
    }

STREAM(write, const void *)
STREAM(read, void *)

int fsync(int fd) {
    REAL(fsync);
    return fails("fsync", path_of(fd)) ? -1 : real(fd);
}

int close(int fd) {
    REAL(close);
    int failed = fails("close", path_of(fd)), error = errno, result = real(fd);
    if (!failed)
        return result;
    errno = error;
    return -1;
}

int ftruncate(int fd, off_t n) {
    REAL(ftruncate);
    return fails("truncate", path_of(fd)) ? -1 : real(fd, n);
}

int ftruncate64(int fd, off64_t n) {
    REAL(ftruncate64);
    return fails("truncate", path_of(fd)) ? -1 : real(fd, n);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails("rename", to) ? -1 : real(from, to);
}

int link(const char *from, const char *to) {
    REAL(link);
    return fails("rename", to) ? -1 : real(from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    REAL(linkat);
    return fails("rename", to) ? -1 : real(from_folder, from, to_folder, to, flags);
}

int unlink(const char *path) {
    REAL(unlink);
    return fails("unlink", path) ? -1 : real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return fails("mkdir", path) ? -1 : real(path, mode);
}

#define OPEN(name)                                  \
    int name(const char *path, int flags, ...) {    \
        REAL(name);                                 \
        va_list rest;                               \
        va_start(rest, flags);                      \
        int mode = va_arg(rest, int);               \
        va_end(rest);                               \
        return fails("open", path) ? -1 : real(path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
