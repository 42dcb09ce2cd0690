/* Rows in, rows out: the hot loops of engram/tables. Called through ctypes (kernels.py), which drops the GIL.
 *
 * Every function works on a piece [lo, hi) of its items, so the caller decides how many threads run. Arithmetic is
 * written so that the result does not depend on the instruction set or on the number of threads: sums run in one
 * fixed order (16 lanes, then halves), and the build forbids fused multiply-adds.
 *
 * A row whose stored bytes are all zero has never been written. In a table with a normal init such a row reads as its
 * init values, computed from (seed, row, column), so neither creating nor reading a huge table touches its pages.
 * A write that would store exactly that pattern stores -0.0 in the first element instead.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define LANES 16
#define AHEAD 12 /* rows of look-ahead for the software prefetch; flat optimum between 8 and 24 */

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

static inline void prefetch_row(const char *p, int64_t bytes, int write) {
    if (bytes > 2048) bytes = 2048;
    for (int64_t o = 0; o < bytes; o += 64) {
        if (write) __builtin_prefetch(p + o, 1);
        else __builtin_prefetch(p + o, 0);
    }
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
        else memcpy(out, r, d * 4);
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
        memcpy(r, in, d * 4);
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

/* First index whose row id is outside [0, rows), or -1. */
int64_t engram_check(const int64_t *ids, int64_t n, int64_t rows) {
    uint64_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (uint64_t)ids[i] >= (uint64_t)rows;
    if (!bad) return -1;
    for (int64_t i = 0; i < n; i++)
        if ((uint64_t)ids[i] >= (uint64_t)rows) return i;
    return -1;
}

/* out[i] = row ids[i]. out is float32 if as_float, else the table's own dtype. Ids were checked. */
CLONES
void engram_gather(const Table *t, const int64_t *ids, int64_t lo, int64_t hi, void *out, int32_t as_float) {
    const int64_t d = t->dim, size = t->dtype == FLOAT32 ? 4 : 2, row = d * size;
    const char *data = t->data;
    if (!t->normal && (size == 4 || !as_float)) { /* plain bytes */
        for (int64_t i = lo; i < hi; i++) {
            if (i + AHEAD < hi) prefetch_row(data + ids[i + AHEAD] * row, row, 0);
            memcpy((char *)out + i * row, data + ids[i] * row, row);
        }
        return;
    }
    for (int64_t i = lo; i < hi; i++) {
        if (i + AHEAD < hi) prefetch_row(data + ids[i + AHEAD] * row, row, 0);
        if (as_float) {
            read_row(t, ids[i], (float *)out + i * d);
        } else if (unwritten(data + ids[i] * row, row)) {
            float values[d];
            init_row(t, ids[i], values);
            for (int64_t j = 0; j < d; j++) ((uint16_t *)out)[i * d + j] = to_bfloat16(values[j], 0x8000);
        } else {
            memcpy((char *)out + i * row, data + ids[i] * row, row);
        }
    }
}

/* Stores float32 rows under ids (distinct). */
void engram_scatter(const Table *t, const int64_t *ids, int64_t lo, int64_t hi, const float *in) {
    for (int64_t i = lo; i < hi; i++) write_row(t, ids[i], in + i * t->dim, 0, 0);
}

/* Groups equal row ids. Fills unique[U] (in order of first appearance), start[U + 1] and order[n] so that the entries
 * of unique row u are order[start[u]] < ... < order[start[u + 1] - 1]. slots: scratch of `capacity` (a power of two
 * >= 2 n) int64, filled with -1. Returns U. Serial: one pass over n keys that stay in cache. */
int64_t engram_group(const int64_t *ids, int64_t n, int64_t *slots, int64_t capacity, int64_t *which, int64_t *unique,
                     int64_t *start, int64_t *order) {
    const uint64_t mask = (uint64_t)capacity - 1;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        uint64_t h = ((uint64_t)ids[i] * 0x9E3779B97F4A7C15ull >> 20) & mask;
        while (slots[h] >= 0 && unique[slots[h]] != ids[i]) h = (h + 1) & mask;
        if (slots[h] < 0) {
            slots[h] = count;
            unique[count] = ids[i];
            start[count] = 0;
            count++;
        }
        which[i] = slots[h];
        start[slots[h]]++;
    }
    int64_t sum = 0;
    for (int64_t u = 0; u < count; u++) {
        int64_t here = start[u];
        start[u] = sum;
        sum += here;
    }
    for (int64_t i = 0; i < n; i++) order[start[which[i]]++] = i;
    for (int64_t u = count; u > 0; u--) start[u] = start[u - 1];
    start[0] = 0;
    return count;
}

typedef struct {
    const int64_t *unique, *start, *order; /* from engram_group */
    const float *grad;                     /* [n, dim] */
} Gradient;

static inline void sum_gradient(const Gradient *g, int64_t u, int64_t d, float *out) {
    const int64_t first = g->start[u], last = g->start[u + 1];
    memcpy(out, g->grad + g->order[first] * d, d * 4);
    for (int64_t k = first + 1; k < last; k++) {
        const float *from = g->grad + g->order[k] * d;
        for (int64_t j = 0; j < d; j++) out[j] += from[j];
    }
}

static inline float mean_square(const float *x, int64_t d) {
    float lane[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES)
        for (int k = 0; k < LANES; k++) lane[k] += x[j + k] * x[j + k];
    for (int k = 0; j + k < d; k++) lane[k] += x[j + k] * x[j + k];
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lane[k] += lane[k + half];
    return lane[0] / (float)d;
}

/* Asks for the row, its state and its gradient a few steps before they are used. */
static inline void look_ahead(const Table *t, const Gradient *g, int64_t u, int64_t hi) {
    const int64_t size = t->dtype == FLOAT32 ? 4 : 2;
    if (u + AHEAD >= hi) return;
    prefetch_row((const char *)t->data + g->unique[u + AHEAD] * t->dim * size, t->dim * size, 1);
    prefetch_row((const char *)(g->grad + g->order[g->start[u + AHEAD]] * t->dim), t->dim * 4, 0);
}

/* One second moment per row: v <- b2 v + (1 - b2) mean(g^2); row <- row - lr g / (sqrt(v) + eps).
 * With dim 1 this is torch.optim.RMSprop(alpha=b2). */
CLONES
void engram_rms(const Table *t, float *v, const Gradient *g, int64_t lo, int64_t hi, float lr, float b2, float c2,
                float eps, int32_t stochastic, uint64_t salt) {
    const int64_t d = t->dim;
    float grad[d], row[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead(t, g, u, hi);
        if (u + AHEAD < hi) __builtin_prefetch(v + g->unique[u + AHEAD], 1);
        const int64_t r = g->unique[u];
        sum_gradient(g, u, d, grad);
        const float moment = b2 * v[r] + c2 * mean_square(grad, d);
        v[r] = moment;
        const float scale = lr / (sqrtf(moment) + eps);
        read_row(t, r, row);
        for (int64_t j = 0; j < d; j++) row[j] -= scale * grad[j];
        write_row(t, r, row, stochastic, salt);
    }
}

/* torch.optim.SparseAdam: both moments per element, bias correction by the number of steps of the whole table.
 * step_size = lr sqrt(1 - b2^t) / (1 - b1^t), computed by the caller in double. */
CLONES
void engram_adam(const Table *t, float *m, float *v, const Gradient *g, int64_t lo, int64_t hi, float step_size, float b1,
                 float c1, float b2, float c2, float eps, int32_t stochastic, uint64_t salt) {
    const int64_t d = t->dim;
    float grad[d], row[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead(t, g, u, hi);
        if (u + AHEAD < hi) {
            prefetch_row((const char *)(m + g->unique[u + AHEAD] * d), d * 4, 1);
            prefetch_row((const char *)(v + g->unique[u + AHEAD] * d), d * 4, 1);
        }
        const int64_t r = g->unique[u];
        float *mr = m + r * d, *vr = v + r * d;
        sum_gradient(g, u, d, grad);
        read_row(t, r, row);
        for (int64_t j = 0; j < d; j++) {
            mr[j] = b1 * mr[j] + c1 * grad[j];
            vr[j] = b2 * vr[j] + c2 * (grad[j] * grad[j]);
            row[j] -= step_size * (mr[j] / (sqrtf(vr[j]) + eps));
        }
        write_row(t, r, row, stochastic, salt);
    }
}

/* Python's extension loader wants this symbol on some systems; the functions above are called through ctypes. */
#if defined(_WIN32)
__declspec(dllexport)
#endif
void *PyInit__native(void) { return 0; }
