// SPDX-License-Identifier: Apache-2.0
// Preloaded into a process under test. Sees every change that the process makes to the files below one directory; can record them,
// kill the process after the n-th, and make the n-th sync or write fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static int trace = -1;
static long count, kill_at, sync_fault, write_fault;
static int sync_errno, write_errno;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t plain_write(int fd, const void *data, size_t length)
{
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(fd, data, length);
}

// Called by the harness in the child, before the workload starts. kill_at 0: do not kill.
void crash_arm(const char *directory, const char *trace_path, long at)
{
    root_length = 0;
    trace = trace_path && *trace_path ? open(trace_path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600) : -1;
    count = 0;
    kill_at = at;
    strncpy(root, directory, sizeof root - 1);
    root_length = strlen(root);
}

void crash_fail_sync(long nth, int number) { sync_fault = nth; sync_errno = number; }
void crash_fail_write(long nth, int number) { write_fault = nth; write_errno = number; }
long crash_count(void) { return count; }
int crash_pending_faults(void) { return sync_fault > 0 || write_fault > 0; }

static int below(const char *path)
{
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int path_of(int fd, char *path)
{
    if (!root_length) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

struct __attribute__((packed)) head { char op; uint16_t path; int64_t offset; uint32_t length; };

static void note(char op, const char *path, int64_t offset, const void *data, uint32_t length)
{
    pthread_mutex_lock(&mutex);
    if (trace >= 0) {
        struct head head = {op, (uint16_t)strlen(path), offset, length};
        plain_write(trace, &head, sizeof head);
        plain_write(trace, path, head.path);
        if (length) plain_write(trace, data, length);
    }
    if (++count == kill_at) kill(getpid(), SIGKILL);
    pthread_mutex_unlock(&mutex);
}

static int fault(long *nth, int number)
{
    if (*nth > 0 && --*nth == 0) {
        errno = number;
        return 1;
    }
    return 0;
}

static int opened(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode)
{
    int fresh = root_length && (flags & O_CREAT) && below(path) && access(path, F_OK) != 0;
    int fd = real(path, flags, mode);
    if (fd >= 0 && fresh) note('c', path, 0, 0, 0);
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(int, #name, const char *, int, ...); \
        va_list arguments; \
        va_start(arguments, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments); \
        return opened(real, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

static ssize_t positioned(int fd, const void *data, size_t length, off64_t offset)
{
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    char path[PATH_MAX];
    int ours = path_of(fd, path);
    if (ours && fault(&write_fault, write_errno)) return -1;
    ssize_t done = real(fd, data, length, offset);
    if (ours && done > 0) note('w', path, offset, data, (uint32_t)done);
    return done;
}
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) { return positioned(fd, data, length, offset); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return positioned(fd, data, length, offset); }

ssize_t write(int fd, const void *data, size_t length)
{
    char path[PATH_MAX];
    if (!path_of(fd, path)) return plain_write(fd, data, length);
    if (fault(&write_fault, write_errno)) return -1;
    off64_t offset = lseek64(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
    ssize_t done = plain_write(fd, data, length);
    if (done > 0) note('w', path, offset, data, (uint32_t)done);
    return done;
}

#define SYNC(name) \
    int name(int fd) \
    { \
        REAL(int, #name, int); \
        char path[PATH_MAX]; \
        int ours = path_of(fd, path); \
        if (ours && fault(&sync_fault, sync_errno)) return -1; \
        int result = real(fd); \
        if (ours && !result) note('s', path, 0, 0, 0); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

static int truncated(int fd, off64_t length)
{
    REAL(int, "ftruncate64", int, off64_t);
    char path[PATH_MAX];
    int ours = path_of(fd, path);
    int result = real(fd, length);
    if (ours && !result) note('t', path, length, 0, 0);
    return result;
}
int ftruncate64(int fd, off64_t length) { return truncated(fd, length); }
int ftruncate(int fd, off_t length) { return truncated(fd, length); }

int unlink(const char *path)
{
    REAL(int, "unlink", const char *);
    int result = real(path);
    if (!result && below(path)) note('u', path, 0, 0, 0);
    return result;
}

int rename(const char *from, const char *to)
{
    REAL(int, "rename", const char *, const char *);
    int result = real(from, to);
    if (!result && below(to)) note('m', from, 0, to, (uint32_t)strlen(to));
    return result;
}
