/* One row of a table, read and written: what kernels.c, updates.c and sinkhorn.c share.
 *
 * Results depend neither on the instruction set nor on the number of threads: sums run in one fixed order (16 lanes,
 * then halves), and the build forbids fused multiply-adds.
 *
 * A row whose stored bytes are all zero has never been written. In a table with a normal init such a row reads as its
 * init values, computed from (seed, row, column), so neither creating nor reading a huge table touches its pages.
 * A write that would store exactly that pattern stores -0.0 in the first element instead.
 */
#ifndef ENGRAM_ROWS_H
#define ENGRAM_ROWS_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rounding.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
/* GCC takes a function that only prefetches for one without effect and drops its calls, unless it is inlined early. */
#define INLINE inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1 };

typedef struct {
    void *data;            /* rows * dim values */
    int64_t rows, dim;
    int32_t dtype;         /* FLOAT32 or BFLOAT16 */
    int32_t normal;        /* 1: unwritten rows read as std * N(0, 1) */
    uint64_t seed;
    float std;
    const float *quantiles; /* 65,536 quantiles of N(0, 1) */
} Table;

static inline uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

static inline float from_bfloat16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Adds `noise` (16 bits) below the kept bits and truncates. noise = random: stochastic rounding. */
static inline uint16_t to_bfloat16(float f, uint32_t noise) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7F800000u) == 0x7F800000u) /* inf and NaN: keep, with the quiet bit for NaN */
        return (uint16_t)(bits >> 16) | ((bits & 0x007FFFFFu) ? 0x40 : 0);
    return (uint16_t)((bits + noise) >> 16);
}

static INLINE void prefetch_row(const char *p, int64_t bytes, int write) {
    if (bytes > 2048) bytes = 2048;
    for (int64_t o = 0; o < bytes; o += 64) {
        if (write) __builtin_prefetch(p + o, 1);
        else __builtin_prefetch(p + o, 0);
    }
}

typedef uint8_t Line __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint8_t Quarter __attribute__((vector_size(16), aligned(1), may_alias));

/* memcpy for rows: inlined, because a call per row of 64 or 256 bytes costs a third of the copy. */
static INLINE void copy_row(void *to, const void *from, int64_t bytes) {
    char *d = to;
    const char *s = from;
    int64_t o = 0;
    for (; o + 64 <= bytes; o += 64) *(Line *)(d + o) = *(const Line *)(s + o);
    for (; o + 16 <= bytes; o += 16) *(Quarter *)(d + o) = *(const Quarter *)(s + o);
    for (; o + 2 <= bytes; o += 2) memcpy(d + o, s + o, 2);
}

static inline int unwritten(const void *row, int64_t bytes) {
    const char *p = row;
    uint64_t any = 0, word;
    int64_t o = 0;
    for (; o + 8 <= bytes && !any; o += 8) {
        memcpy(&word, p + o, 8);
        any |= word;
    }
    for (; o < bytes; o++) any |= (uint8_t)p[o];
    return !any;
}

static void init_row(const Table *t, int64_t row, float *out) {
    uint64_t key = splitmix64(t->seed ^ splitmix64((uint64_t)row)), word = 0;
    for (int64_t j = 0; j < t->dim; j++) {
        if ((j & 3) == 0) word = splitmix64(key + (uint64_t)(j >> 2));
        out[j] = t->std * t->quantiles[(word >> (16 * (j & 3))) & 0xFFFF];
    }
}

/* One stored row as float32, its init values if it was never written. */
static inline void read_row(const Table *t, int64_t row, float *out) {
    int64_t d = t->dim;
    if (t->dtype == FLOAT32) {
        const float *r = (const float *)t->data + row * d;
        if (t->normal && unwritten(r, d * 4)) init_row(t, row, out);
        else copy_row(out, r, d * 4);
    } else {
        const uint16_t *r = (const uint16_t *)t->data + row * d;
        if (t->normal && unwritten(r, d * 2)) {
            init_row(t, row, out);
            for (int64_t j = 0; j < d; j++) out[j] = from_bfloat16(to_bfloat16(out[j], 0x8000));
        } else {
            for (int64_t j = 0; j < d; j++) out[j] = from_bfloat16(r[j]);
        }
    }
}

static inline void write_row(const Table *t, int64_t row, const float *in, int stochastic, uint64_t salt) {
    int64_t d = t->dim;
    if (t->dtype == FLOAT32) {
        float *r = (float *)t->data + row * d;
        copy_row(r, in, d * 4);
        if (t->normal && unwritten(r, d * 4)) r[0] = -0.0f;
    } else {
        uint16_t *r = (uint16_t *)t->data + row * d;
        if (stochastic) {
            uint64_t key = splitmix64(salt ^ splitmix64((uint64_t)row)), word = 0;
            for (int64_t j = 0; j < d; j++) {
                if ((j & 3) == 0) word = splitmix64(key + (uint64_t)(j >> 2));
                r[j] = to_bfloat16(in[j], (uint32_t)((word >> (16 * (j & 3))) & 0xFFFF));
            }
        } else { /* nearest, ties to even */
            for (int64_t j = 0; j < d; j++) {
                uint32_t bits;
                memcpy(&bits, &in[j], 4);
                r[j] = to_bfloat16(in[j], 0x7FFF + ((bits >> 16) & 1));
            }
        }
        if (t->normal && unwritten(r, d * 2)) r[0] = 0x8000;
    }
}

#endif
