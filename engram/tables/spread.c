/* How the pieces of one call are shared out among threads (kernels.py). Each function is one step that no Python signal
 * handler can cut in two: handlers run between the bytecodes of the main thread, never inside a C call. */
#include <stdint.h>
#include <time.h>

typedef struct {
    int64_t next;    /* number of the next piece */
    int64_t pieces;  /* how many there are */
    int64_t running; /* helping threads that work on a piece */
} Job;

/* The next piece of a helping thread, which counts as running until engram_leave; -1 if none is left. */
int64_t engram_take(Job *job) {
    __atomic_add_fetch(&job->running, 1, __ATOMIC_SEQ_CST); /* before the piece: engram_finish must see one of them */
    const int64_t piece = __atomic_fetch_add(&job->next, 1, __ATOMIC_SEQ_CST);
    if (piece < job->pieces) return piece;
    __atomic_sub_fetch(&job->running, 1, __ATOMIC_SEQ_CST);
    return -1;
}

/* The next piece of the calling thread, which waits for itself in no case; -1 if none is left. */
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
