/* Fails one call of a process: torture_arm(n, error) makes the n-th call from then on return -1 with errno = error.
   Loaded before libc (LD_PRELOAD), it stands in front of the calls by which files are written. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long left = 0;
static int code = 0;

void torture_arm(long n, int error) { left = n; code = error; }
long torture_left(void) { return left; }

static int fails(void) {
    if (left <= 0 || --left != 0) return 0;
    errno = code;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(name, arguments) do { if (fails()) return -1; return REAL(name) arguments; } while (0)

ssize_t write(int f, const void *data, size_t n) { if (f <= 2) return REAL(write)(f, data, n); FAIL(write, (f, data, n)); }
ssize_t pwrite64(int f, const void *data, size_t n, off64_t at) { FAIL(pwrite64, (f, data, n, at)); }
int fsync(int f) { FAIL(fsync, (f)); }
int ftruncate64(int f, off64_t n) { FAIL(ftruncate64, (f, n)); }
int mkdir(const char *path, mode_t mode) { FAIL(mkdir, (path, mode)); }
int rename(const char *a, const char *b) { FAIL(rename, (a, b)); }
int renameat2(int da, const char *a, int db, const char *b, unsigned flags) { FAIL(renameat2, (da, a, db, b, flags)); }
int posix_fallocate64(int f, off64_t at, off64_t n) {
    return fails() ? code : REAL(posix_fallocate64)(f, at, n);
}
int open64(const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
    va_end(list);
    if (flags & O_CREAT) FAIL(open64, (path, flags, mode));
    return REAL(open64)(path, flags, mode);
}
