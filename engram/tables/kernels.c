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

#include "rounding.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
/* GCC takes a function that only prefetches for one without effect and drops its calls, unless it is inlined early. */
#define INLINE inline __attribute__((always_inline))
#define LANES 16
#define AHEAD 12  /* rows of look-ahead of the update kernels; flat optimum between 8 and 24 */
#define BLOCK 512 /* row ids that are checked together, just before their rows are read: 4 KiB, still in L1 then */

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

/* Look-ahead of a gather: 8 KiB of rows are under way, but no more rows than a core has outstanding misses. */
static inline int64_t gather_ahead(int64_t bytes) {
    const int64_t ahead = 8192 / bytes;
    return ahead < 2 ? 2 : ahead > 24 ? 24 : ahead;
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

static INLINE void copy_rows_of(const char *data, const int64_t *ids, int64_t lo, int64_t end, int64_t hi, char *out,
                                const int64_t row, const int64_t ahead) {
    const int64_t sure = end < hi - ahead ? end : hi - ahead;
    for (; lo < sure; lo++) {
        prefetch_row(data + (uint64_t)ids[lo + ahead] * (uint64_t)row, row, 0);
        copy_row(out + lo * row, data + ids[lo] * row, row);
    }
    for (; lo < end; lo++) copy_row(out + lo * row, data + ids[lo] * row, row);
}

/* out[i] = row ids[i] for i in [lo, end), rows of `row` bytes. Looks ahead as far as hi, where it may meet an id that is
 * not checked yet: a prefetch of any address is harmless. The widths that tables have are constants to the compiler,
 * which unrolls prefetch and copy: two thirds of the time for 64 bytes, four fifths for 1,024. */
static INLINE void copy_rows(const char *data, const int64_t *ids, int64_t lo, int64_t end, int64_t hi, char *out,
                             int64_t row) {
    const int64_t ahead = gather_ahead(row);
    switch (row) {
    case 64: copy_rows_of(data, ids, lo, end, hi, out, 64, ahead); break;
    case 128: copy_rows_of(data, ids, lo, end, hi, out, 128, ahead); break;
    case 256: copy_rows_of(data, ids, lo, end, hi, out, 256, ahead); break;
    case 512: copy_rows_of(data, ids, lo, end, hi, out, 512, ahead); break;
    case 1024: copy_rows_of(data, ids, lo, end, hi, out, 1024, ahead); break;
    default: copy_rows_of(data, ids, lo, end, hi, out, row, ahead);
    }
}

static inline int64_t first_outside(const int64_t *ids, int64_t lo, int64_t hi, int64_t rows) {
    int bad = 0;
    for (int64_t i = lo; i < hi; i++) bad |= (uint64_t)ids[i] >= (uint64_t)rows;
    if (!bad) return -1;
    while ((uint64_t)ids[lo] < (uint64_t)rows) lo++;
    return lo;
}

/* First index whose row id is outside [0, rows), or -1. */
CLONES
int64_t engram_check(const int64_t *ids, int64_t n, int64_t rows) { return first_outside(ids, 0, n, rows); }

/* out[i] = row ids[i] for i in [lo, hi). out is float32 if as_float, else the table's own dtype. Returns -1, or the
 * first index whose row id is outside the table; no row is read there or after it, so the rest of out is undefined. */
CLONES
int64_t engram_gather(const Table *t, const int64_t *ids, int64_t lo, int64_t hi, void *out, int32_t as_float) {
    EXACT
    const int64_t d = t->dim, size = t->dtype == FLOAT32 ? 4 : 2, row = d * size, ahead = gather_ahead(row);
    const char *data = t->data;
    const int plain = !t->normal && (size == 4 || !as_float);
    for (int64_t end; lo < hi; lo = end) {
        end = lo + BLOCK < hi ? lo + BLOCK : hi;
        const int64_t bad = first_outside(ids, lo, end, t->rows);
        if (bad >= 0) return bad;
        if (plain) {
            copy_rows(data, ids, lo, end, hi, out, row);
            continue;
        }
        for (int64_t i = lo; i < end; i++) {
            if (i + ahead < hi) prefetch_row(data + (uint64_t)ids[i + ahead] * (uint64_t)row, row, 0);
            const char *from = data + ids[i] * row;
            if (as_float) {
                read_row(t, ids[i], (float *)out + i * d);
            } else if (unwritten(from, row)) {
                float values[d];
                init_row(t, ids[i], values);
                for (int64_t j = 0; j < d; j++) ((uint16_t *)out)[i * d + j] = to_bfloat16(values[j], 0x8000);
            } else {
                copy_row((char *)out + i * row, from, row);
            }
        }
    }
    return -1;
}

/* What a gather can cost at best here, for `engram bench`: prefetch and copy, nothing else. bytes: of one row. */
CLONES
void engram_copy_rows(const char *data, const int64_t *ids, int64_t lo, int64_t hi, char *out, int64_t bytes) {
    copy_rows(data, ids, lo, hi, hi, out, bytes);
}

/* Reads [lo, hi) in order: the memory's sequential bandwidth, for `engram bench`. */
CLONES
uint64_t engram_read_words(const uint64_t *data, int64_t lo, int64_t hi) {
    uint64_t sum = 0;
    for (int64_t i = lo; i < hi; i++) sum += data[i];
    return sum;
}

/* Stores float32 rows under ids (distinct). */
void engram_scatter(const Table *t, const int64_t *ids, int64_t lo, int64_t hi, const float *in) {
    EXACT
    for (int64_t i = lo; i < hi; i++) write_row(t, ids[i], in + i * t->dim, 0, 0);
}

/* Groups equal row ids. Fills unique[U] (in order of first appearance), start[U + 1] and order[n] so that the entries
 * of unique row u are order[start[u]] < ... < order[start[u + 1] - 1]. slots: scratch of `capacity` (a power of two
 * >= 2 n). Returns U, or -1 - i where ids[i] is the first one outside [0, rows). Serial: its scratch stays in cache. */
CLONES
int64_t engram_group(const int64_t *ids, int64_t n, int64_t rows, int32_t *slots, int64_t capacity, int32_t *which,
                     int64_t *unique, int32_t *start, int32_t *order) {
    const int64_t bad = first_outside(ids, 0, n, rows);
    if (bad >= 0) return -1 - bad;
    const int shift = 64 - __builtin_ctzll((uint64_t)capacity); /* the high bits of the product are the mixed ones */
    const uint64_t mask = (uint64_t)capacity - 1;
    int32_t count = 0;
    memset(slots, 0xFF, (size_t)capacity * sizeof *slots);
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n) __builtin_prefetch(slots + (((uint64_t)ids[i + AHEAD] * 0x9E3779B97F4A7C15ull) >> shift), 1);
        uint64_t h = ((uint64_t)ids[i] * 0x9E3779B97F4A7C15ull) >> shift;
        int32_t u;
        while ((u = slots[h]) >= 0 && unique[u] != ids[i]) h = (h + 1) & mask;
        if (u < 0) {
            u = slots[h] = count++;
            unique[u] = ids[i];
            start[u] = 0;
        }
        which[i] = u;
        start[u]++;
    }
    if (count == n) { /* no row twice */
        for (int32_t i = 0; i < n; i++) order[i] = start[i] = i;
        start[n] = count;
        return count;
    }
    int32_t sum = 0;
    for (int32_t u = 0; u < count; u++) {
        const int32_t here = start[u];
        start[u] = sum;
        sum += here;
    }
    for (int32_t i = 0; i < n; i++) order[start[which[i]]++] = i;
    for (int32_t u = count; u > 0; u--) start[u] = start[u - 1];
    start[0] = 0;
    return count;
}

typedef struct {
    const int64_t *unique; /* from engram_group */
    const int32_t *start, *order;
    const float *grad; /* [n, dim] */
} Gradient;

/* The summed gradient of distinct row u: where it lies, if the row came once, else added up in `sum`. */
static INLINE const float *sum_gradient(const Gradient *g, int64_t u, int64_t d, float *sum) {
    const int32_t first = g->start[u], last = g->start[u + 1];
    const float *once = g->grad + g->order[first] * d;
    if (last == first + 1) return once;
    memcpy(sum, once, d * 4);
    for (int32_t k = first + 1; k < last; k++) {
        if (k + 2 < last) prefetch_row((const char *)(g->grad + g->order[k + 2] * d), d * 4, 0);
        const float *from = g->grad + g->order[k] * d;
        for (int64_t j = 0; j < d; j++) sum[j] += from[j];
    }
    return sum;
}

static INLINE float mean_square(const float *x, int64_t d) {
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
static INLINE void look_ahead(const Table *t, const Gradient *g, int64_t u, int64_t hi, const int64_t d) {
    if (u + AHEAD >= hi) return;
    const int64_t r = g->unique[u + AHEAD] * d;
    if (t->dtype == FLOAT32) prefetch_row((const char *)((const float *)t->data + r), d * 4, 1);
    else prefetch_row((const char *)((const uint16_t *)t->data + r), d * 2, 1);
    prefetch_row((const char *)(g->grad + g->order[g->start[u + AHEAD]] * d), d * 4, 0);
}

/* Calls update(..., d) with the row width as a constant, where it is one that tables have. */
#define BY_WIDTH(update, d, ...) \
    switch (d) { \
    case 16: update(__VA_ARGS__, 16); break; \
    case 32: update(__VA_ARGS__, 32); break; \
    case 64: update(__VA_ARGS__, 64); break; \
    case 128: update(__VA_ARGS__, 128); break; \
    default: update(__VA_ARGS__, d); \
    }

static INLINE void touch(float *data, float *state, const int64_t *ids, int64_t lo, int64_t hi, const float *grad,
                         const int64_t d) {
    for (int64_t i = lo; i < hi; i++) {
        if (i + AHEAD < hi) {
            prefetch_row((const char *)(data + ids[i + AHEAD] * d), d * 4, 1);
            __builtin_prefetch(state + ids[i + AHEAD], 1);
        }
        float *restrict row = data + ids[i] * d;
        for (int64_t j = 0; j < d; j++) row[j] += grad[i * d + j];
        state[ids[i]] += 1;
    }
}

/* What a row-wise update can cost at best here, for `engram bench`: row and state read and written, gradient read. */
CLONES
void engram_touch_rows(float *data, float *state, const int64_t *ids, int64_t lo, int64_t hi, const float *grad,
                       int64_t dim) {
    BY_WIDTH(touch, dim, data, state, ids, lo, hi, grad)
}

/* One second moment per row: v <- b2 v + c2 mean(g^2); row <- row - lr g / (sqrt(v) + eps). With dim 1 this is
 * torch.optim.RMSprop(alpha=b2) where c2 = 1 - b2, and torch.optim.Adagrad where b2 = c2 = 1. */
static INLINE void rms(const Table *t, float *v, const Gradient *g, int64_t lo, int64_t hi, float lr, float b2, float c2,
                       float eps, int32_t stochastic, uint64_t salt, const int64_t d) {
    const int plain = t->dtype == FLOAT32 && !t->normal; /* updated where they lie, without a copy */
    float sum[d], row[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead(t, g, u, hi, d);
        if (u + AHEAD < hi) __builtin_prefetch(v + g->unique[u + AHEAD], 1);
        const int64_t r = g->unique[u];
        const float *grad = sum_gradient(g, u, d, sum);
        const float moment = b2 * v[r] + c2 * mean_square(grad, d);
        v[r] = moment;
        const float scale = lr / (sqrtf(moment) + eps);
        float *restrict now = plain ? (float *)t->data + r * d : row;
        if (!plain) read_row(t, r, row);
        for (int64_t j = 0; j < d; j++) now[j] -= scale * grad[j];
        if (!plain) write_row(t, r, row, stochastic, salt);
    }
}

/* This and the other updates set done[u] for each row that they have brought up to date, with its state. */
CLONES
void engram_rms(const Table *t, float *v, const Gradient *g, int64_t lo, int64_t hi, uint8_t *done, float lr, float b2,
                float c2, float eps, int32_t stochastic, uint64_t salt) {
    EXACT
    BY_WIDTH(rms, t->dim, t, v, g, lo, hi, lr, b2, c2, eps, stochastic, salt)
    memset(done + lo, 1, (size_t)(hi - lo));
}

/* torch.optim.SparseAdam: both moments per element, side by side [rows, 2, dim]; bias correction by the number of steps of
 * the whole table.
 * step_size = lr sqrt(1 - b2^t) / (1 - b1^t), computed by the caller in double. */
static INLINE void adam(const Table *t, float *moments, const Gradient *g, int64_t lo, int64_t hi, float step_size,
                        float b1, float c1, float b2, float c2, float eps, int32_t stochastic, uint64_t salt,
                        const int64_t d) {
    const int plain = t->dtype == FLOAT32 && !t->normal;
    float sum[d], row[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead(t, g, u, hi, d);
        if (u + AHEAD < hi) prefetch_row((const char *)(moments + g->unique[u + AHEAD] * 2 * d), 2 * d * 4, 1);
        const int64_t r = g->unique[u];
        float *restrict mr = moments + r * 2 * d, *restrict vr = mr + d, *restrict now = row;
        const float *grad = sum_gradient(g, u, d, sum);
        if (plain) now = (float *)t->data + r * d;
        else read_row(t, r, row);
        for (int64_t j = 0; j < d; j++) {
            mr[j] = b1 * mr[j] + c1 * grad[j];
            vr[j] = b2 * vr[j] + c2 * (grad[j] * grad[j]);
            now[j] -= step_size * (mr[j] / (sqrtf(vr[j]) + eps));
        }
        if (!plain) write_row(t, r, row, stochastic, salt);
    }
}

CLONES
void engram_adam(const Table *t, float *moments, const Gradient *g, int64_t lo, int64_t hi, uint8_t *done,
                 float step_size, float b1, float c1, float b2, float c2, float eps, int32_t stochastic, uint64_t salt) {
    EXACT
    BY_WIDTH(adam, t->dim, t, moments, g, lo, hi, step_size, b1, c1, b2, c2, eps, stochastic, salt)
    memset(done + lo, 1, (size_t)(hi - lo));
}

/* base to the power of n >= 0, by squaring, so that every machine rounds alike. */
static inline double power(double base, int64_t n) {
    double result = 1;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

/* The momentum of a touched row of the Sinkhorn optimiser, in `to`, which may be where it is stored: beta^(now - last) m +
 * grad, with `last` the step of the row's last touch. */
static INLINE void move(float *to, const float *m, float last, const float *grad, double beta, int64_t now, int64_t d) {
    const float decay = (float)power(beta, now - (int64_t)last);
    for (int64_t j = 0; j < d; j++) to[j] = decay * m[j] + grad[j];
}

static INLINE void look_ahead_at_momentum(const float *m, const float *last, const Gradient *g, int64_t u, int64_t hi,
                                          int64_t d) {
    if (u + AHEAD >= hi) return;
    prefetch_row((const char *)(m + g->unique[u + AHEAD] * d), d * 4, 1);
    prefetch_row((const char *)(g->grad + g->order[g->start[u + AHEAD]] * d), d * 4, 0);
    __builtin_prefetch(last + g->unique[u + AHEAD], 1);
}

/* Sinkhorn-balanced momentum, first sweep, which changes no state: look[u] <- (grad + beta m) / norm[u] for touched row
 * u, with m its new momentum and norm[u] the L2 norm; zeros where the norm is 0. */
CLONES
void engram_sinkhorn_look(const Table *t, const float *m, const float *last, const Gradient *g, int64_t lo, int64_t hi,
                          double beta, int64_t now, float *look, float *norm) {
    EXACT
    const int64_t d = t->dim;
    const float b = (float)beta;
    float sum[d], moved[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead_at_momentum(m, last, g, u, hi, d);
        const int64_t r = g->unique[u];
        const float *grad = sum_gradient(g, u, d, sum);
        float *ahead = look + u * d;
        move(moved, m + r * d, last[r], grad, beta, now, d);
        for (int64_t j = 0; j < d; j++) ahead[j] = grad[j] + b * moved[j];
        norm[u] = sqrtf(mean_square(ahead, d) * (float)d);
        const float scale = norm[u] > 0 ? 1 / norm[u] : 0;
        for (int64_t j = 0; j < d; j++) ahead[j] *= scale;
    }
}

#define STRIP 64 /* rows whose column sums are added up together; strips add up in order, whoever computes them */

/* weight[j] = columns[j] of the balanced matrix squared. 1 / sum_j x[j]^2 weight[j], in the order of mean_square. */
static inline float row_factor(const float *x, const float *weight, int64_t d) {
    float lane[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES)
        for (int k = 0; k < LANES; k++) lane[k] += x[j + k] * x[j + k] * weight[j + k];
    for (int k = 0; j + k < d; k++) lane[k] += x[j + k] * x[j + k] * weight[j + k];
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lane[k] += lane[k + half];
    return lane[0] > 0 ? 1 / lane[0] : 0;
}

/* One row normalisation and the sums for the column normalisation after it, of strips [lo, hi) of look [n, d]:
 * sums[strip][j] = sum over its rows of look^2 times the row's factor. Rows whose norm is <= limit are left out. */
CLONES
void engram_sinkhorn_sweep(const float *look, const float *norm, float limit, const float *weight, int64_t n, int64_t d,
                           int64_t lo, int64_t hi, float *sums) {
    EXACT
    for (int64_t strip = lo; strip < hi; strip++) {
        const int64_t end = (strip + 1) * STRIP < n ? (strip + 1) * STRIP : n;
        float *sum = sums + strip * d;
        memset(sum, 0, d * 4);
        for (int64_t u = strip * STRIP; u < end; u++) {
            if (norm[u] <= limit) continue;
            const float *x = look + u * d, factor = row_factor(x, weight, d);
            for (int64_t j = 0; j < d; j++) sum[j] += x[j] * x[j] * factor;
        }
    }
}

/* The last row normalisation and the update: row <- row - rate look root[j] / |look root|, root = sqrt(weight). Momentum
 * and last touch change with the row, so that a step which is cut short leaves both old or both new. */
CLONES
void engram_sinkhorn_update(const Table *t, float *m, float *last, const Gradient *g, int64_t lo, int64_t hi,
                            uint8_t *done, double beta, int64_t now, const float *look, const float *norm, float limit,
                            const float *weight, const float *root, float rate, int32_t stochastic, uint64_t salt) {
    EXACT
    const int64_t d = t->dim;
    float row[d], sum[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead(t, g, u, hi, d);
        look_ahead_at_momentum(m, last, g, u, hi, d);
        const int64_t r = g->unique[u];
        move(m + r * d, m + r * d, last[r], sum_gradient(g, u, d, sum), beta, now, d);
        last[r] = (float)now;
        if (norm[u] <= limit) continue;
        const float *x = look + u * d, scale = rate * sqrtf(row_factor(x, weight, d));
        read_row(t, r, row);
        for (int64_t j = 0; j < d; j++) row[j] -= scale * (x[j] * root[j]);
        write_row(t, r, row, stochastic, salt);
    }
    memset(done + lo, 1, (size_t)(hi - lo));
}

/* Python's extension loader wants this symbol on some systems; the functions above are called through ctypes. */
#if defined(_WIN32)
__declspec(dllexport)
#endif
void *PyInit__native(void) { return 0; }
