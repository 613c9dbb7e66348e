/* A faulty disk, loaded before libc by LD_PRELOAD: it numbers the calls that change files below a folder, and spoils one.

   FAULTY_FOLDER   the folder, as a real path
   FAULTY_CALL     the number of the call that is spoilt, from 1; 0 spoils none
   FAULTY_WAY      full: this call and all later ones fail with ENOSPC, but removals, which free space, do not
                   eio: this call fails with EIO
                   torn: half of the bytes are written, then the process is killed; any other call is killed before it
                   lying: half of the bytes are written, and success is reported; any other call goes well
   FAULTY_LOG      a file that gets a line per call: the process, the call's number, its name, its bytes and the path

   Each Python process counts its own calls. Writes that libc makes by itself, such as those of fwrite, are not seen.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

typedef enum { WRITES, REMOVES, OTHER } Kind;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static long calls;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static int is_below(const char *path) {
    const char *folder = setting("FAULTY_FOLDER");
    size_t length = strncmp(program_invocation_short_name, "python", 6) ? 0 : strlen(folder); /* not a compiler's */
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

/* Write the absolute path of `name`, relative to an open folder or to the working directory, into `path`. */
static void resolve(int folder, const char *name, char *path) {
    char at[64];
    ssize_t length = 0;
    if (*name != '/') {
        snprintf(at, sizeof at, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        length = readlink(at, path, PATH_MAX - 1);
        if (length < 0) length = 0;
        path[length++] = '/';
    }
    snprintf(path + length, PATH_MAX - length, "%s", name);
}

/* Count a call, and return the errno that it fails with, -1 where half of it is to be done, or 0. */
static int fault(Kind kind, const char *name, const char *path, size_t bytes) {
    if (!is_below(path)) return 0;
    pthread_mutex_lock(&mutex);
    long number = ++calls, chosen = atol(setting("FAULTY_CALL"));
    pthread_mutex_unlock(&mutex);
    const char *way = setting("FAULTY_WAY"), *log = setting("FAULTY_LOG");
    if (*log) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%d\t%ld\t%s\t%zu\t%s\n", getpid(), number, name, bytes, path);
        int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0600);
        syscall(SYS_write, file, line, length);
        syscall(SYS_close, file);
    }
    if (!chosen || number < chosen) return 0;
    if (!strcmp(way, "full")) return kind == REMOVES ? 0 : ENOSPC;
    if (number > chosen) return 0;
    if (!strcmp(way, "eio")) return EIO;
    if (kind == WRITES) return -1;
    if (!strcmp(way, "torn")) kill(getpid(), SIGKILL);
    return 0;
}

static int fault_at(Kind kind, const char *name, int folder, const char *file) {
    char path[PATH_MAX] = "";
    resolve(folder, file, path);
    return fault(kind, name, path, 0);
}

static int fault_of(Kind kind, const char *name, int file, size_t bytes) {
    char at[64], path[PATH_MAX] = "";
    snprintf(at, sizeof at, "/proc/self/fd/%d", file);
    if (!*setting("FAULTY_FOLDER") || readlink(at, path, PATH_MAX - 1) < 0) return 0;
    return fault(kind, name, path, bytes);
}

/* Return after half of a write is done: the process dies, or `bytes` are said to be written. */
static ssize_t torn(size_t bytes) {
    if (!strcmp(setting("FAULTY_WAY"), "torn")) kill(getpid(), SIGKILL);
    return bytes;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define FAIL_IF(call) \
    do { \
        int failed = call; \
        if (failed > 0) { \
            errno = failed; \
            return -1; \
        } \
    } while (0)

/* ---------------------------------------------------------------- files that are made */

static int makes(int flags) { return (flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE; }

#define OPEN(name) \
    int name(const char *file, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = makes(flags) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (makes(flags)) FAIL_IF(fault_at(OTHER, "open", AT_FDCWD, file)); \
        return real(file, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *file, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = makes(flags) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (makes(flags)) FAIL_IF(fault_at(OTHER, "open", folder, file)); \
        return real(folder, file, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *file, const char *mode) { \
        REAL(FILE *, name, const char *, const char *); \
        int error = *mode == 'r' ? 0 : fault_at(OTHER, "open", AT_FDCWD, file); \
        if (error > 0) { \
            errno = error; \
            return NULL; \
        } \
        return real(file, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* ---------------------------------------------------------------- bytes that are written */

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(ssize_t, write, int, const void *, size_t);
    int error = fault_of(WRITES, "write", file, count);
    FAIL_IF(error);
    if (!error) return real(file, bytes, count);
    real(file, bytes, count / 2);
    return torn(count);
}

#define PWRITE(name) \
    ssize_t name(int file, const void *bytes, size_t count, off64_t at) { \
        REAL(ssize_t, name, int, const void *, size_t, off64_t); \
        int error = fault_of(WRITES, "pwrite", file, count); \
        FAIL_IF(error); \
        if (!error) return real(file, bytes, count, at); \
        real(file, bytes, count / 2, at); \
        return torn(count); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    size_t bytes = 0;
    for (int part = 0; part < count; part++) bytes += parts[part].iov_len;
    int error = fault_of(WRITES, "writev", file, bytes);
    FAIL_IF(error);
    if (!error) return real(file, parts, count);
    syscall(SYS_write, file, parts[0].iov_base, parts[0].iov_len / 2);
    return torn(bytes);
}

#define SENDFILE(name) \
    ssize_t name(int to, int from, off64_t *at, size_t count) { \
        REAL(ssize_t, name, int, int, off64_t *, size_t); \
        int error = fault_of(WRITES, "sendfile", to, count); \
        FAIL_IF(error); \
        if (!error) return real(to, from, at, count); \
        struct stat64 size; \
        fstat64(from, &size); \
        if ((size_t)size.st_size < count) count = size.st_size; \
        real(to, from, at, count / 2); \
        return torn(count); \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t count, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    int error = fault_of(WRITES, "copy_file_range", to, count);
    FAIL_IF(error);
    if (!error) return real(from, from_at, to, to_at, count, flags);
    ssize_t done = real(from, from_at, to, to_at, count / 2, flags);
    return torn(done);
}

/* ---------------------------------------------------------------- all other changes */

#define CHANGE(name, label, kind, parameters, arguments, folder, path, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__); \
        FAIL_IF(fault_at(kind, label, folder, path)); \
        return real arguments; \
    }
#define CHANGE_OPEN(name, label, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__); \
        FAIL_IF(fault_of(OTHER, label, file, 0)); \
        return real arguments; \
    }
CHANGE_OPEN(fsync, "fsync", (int file), (file), int)
CHANGE_OPEN(fdatasync, "fsync", (int file), (file), int)
CHANGE_OPEN(ftruncate, "ftruncate", (int file, off_t length), (file, length), int, off_t)
CHANGE_OPEN(ftruncate64, "ftruncate", (int file, off64_t length), (file, length), int, off64_t)
CHANGE_OPEN(posix_fallocate, "fallocate", (int file, off_t at, off_t length), (file, at, length), int, off_t, off_t)
CHANGE(rename, "rename", OTHER, (const char *from, const char *to), (from, to), AT_FDCWD, to, const char *, const char *)
CHANGE(renameat, "rename", OTHER, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to, int,
       const char *, int, const char *)
CHANGE(link, "link", OTHER, (const char *from, const char *to), (from, to), AT_FDCWD, to, const char *, const char *)
CHANGE(symlink, "symlink", OTHER, (const char *from, const char *to), (from, to), AT_FDCWD, to, const char *,
       const char *)
CHANGE(mkdir, "mkdir", OTHER, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, const char *, mode_t)
CHANGE(mkdirat, "mkdir", OTHER, (int at, const char *path, mode_t mode), (at, path, mode), at, path, int, const char *,
       mode_t)
CHANGE(truncate, "truncate", OTHER, (const char *path, off_t length), (path, length), AT_FDCWD, path, const char *,
       off_t)
CHANGE(unlink, "unlink", REMOVES, (const char *path), (path), AT_FDCWD, path, const char *)
CHANGE(unlinkat, "unlink", REMOVES, (int at, const char *path, int flags), (at, path, flags), at, path, int,
       const char *, int)
CHANGE(rmdir, "rmdir", REMOVES, (const char *path), (path), AT_FDCWD, path, const char *)
