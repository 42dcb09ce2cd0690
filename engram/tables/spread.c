/* How the pieces of one call are shared out among threads (kernels.py): on torch's own OpenMP threads, or on a pool of
 * Python threads. Each function is one step that no Python signal handler can cut in two: handlers run between the
 * bytecodes of the main thread, never inside a C call. */
#include <stdint.h>
#include <time.h>

typedef int64_t (*Kernel)(const void *arguments, int64_t lo, int64_t hi); /* see kernels.c */

/* The OpenMP runtime that torch has loaded, in this process: two runtimes spin against each other. GNU's and LLVM's
 * libraries both export GOMP_parallel, so that nothing here is compiled with -fopenmp. NULL: none, or not any more. */
static struct {
    void (*parallel)(void (*work)(void *), void *shared, unsigned threads, unsigned flags);
    int (*in_parallel)(void);
    int (*max_threads)(void);
} openmp;

void engram_use_openmp(void *parallel, void *in_parallel, void *max_threads) {
    openmp.in_parallel = (int (*)(void))in_parallel;
    openmp.max_threads = (int (*)(void))max_threads;
    openmp.parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
}

typedef struct {
    int64_t next;    /* number of the next piece */
    int64_t pieces;  /* how many there are */
    int64_t running; /* helping threads of the pool that work on a piece */
    int64_t refused; /* on torch's threads: the first item that a piece refused; INT64_MAX if none was */
} Job;

typedef struct {
    Job *job;
    Kernel kernel;
    const void *arguments;
    int64_t n, until;
} Region;

#define PATIENCE 50000000 /* nanoseconds after which a region begins no piece, so that the caller can be interrupted */

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void run_pieces(void *shared) {
    const Region *r = shared;
    Job *job = r->job;
    while (now() < r->until) {
        const int64_t piece = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (piece >= job->pieces) break;
        const int64_t item =
            r->kernel(r->arguments, r->n * piece / job->pieces, r->n * (piece + 1) / job->pieces);
        int64_t first = __atomic_load_n(&job->refused, __ATOMIC_RELAXED);
        while (item >= 0 && item < first &&
               !__atomic_compare_exchange_n(&job->refused, &first, item, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
}

/* Works on the pieces of range(n) with torch's threads, each of which takes the next piece when it is free. Returns 1 if
 * pieces are left because much time has passed, else 0; -1 if nothing was done, because the calling thread is inside a
 * parallel region already, or because this is not the runtime whose threads torch counts (`threads`). */
int32_t engram_parallel(Job *job, void *kernel, const void *arguments, int64_t n, int64_t threads) {
    if (!openmp.parallel || openmp.in_parallel() || openmp.max_threads() != threads) return -1;
    Region region = {job, (Kernel)kernel, arguments, n, now() + PATIENCE};
    openmp.parallel(run_pieces, &region, 0, 0); /* 0: as many as torch uses, or threads would end and start again */
    return __atomic_load_n(&job->next, __ATOMIC_RELAXED) < job->pieces;
}

/* The next piece of a helping thread, which counts as running until engram_leave; -1 if none is left. */
int64_t engram_take(Job *job) {
    __atomic_add_fetch(&job->running, 1, __ATOMIC_SEQ_CST); /* before the piece: engram_finish must see one of them */
    const int64_t piece = __atomic_fetch_add(&job->next, 1, __ATOMIC_SEQ_CST);
    if (piece < job->pieces) return piece;
    __atomic_sub_fetch(&job->running, 1, __ATOMIC_SEQ_CST);
    return -1;
}

/* The next piece of the calling thread, which never waits for itself; -1 if none is left. */
int64_t engram_take_own(Job *job) {
    const int64_t piece = __atomic_fetch_add(&job->next, 1, __ATOMIC_SEQ_CST);
    return piece < job->pieces ? piece : -1;
}

void engram_leave(Job *job) { __atomic_sub_fetch(&job->running, 1, __ATOMIC_SEQ_CST); }

/* Drops the pieces that were not begun. */
void engram_drop(Job *job) { __atomic_store_n(&job->next, job->pieces, __ATOMIC_SEQ_CST); }

/* Drops the pieces that were not begun and returns when those that were have ended. */
void engram_finish(Job *job) {
    engram_drop(job);
    struct timespec pause = {0, 10000}; /* 10 us; the system adds its own slack of about 50 */
    for (int tries = 0; __atomic_load_n(&job->running, __ATOMIC_SEQ_CST); tries++) {
        if (tries > 100) pause.tv_nsec = 1000000; /* pieces that wait for a disk */
        nanosleep(&pause, 0);
    }
}
