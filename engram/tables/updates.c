/* Row gradients in, updated rows out: grouping of equal row ids and the row-wise optimizers (optimizers.py). The form of
 * a kernel is described in kernels.c. */
#include "updates.h"

/* Groups equal row ids. Fills unique[U] (in order of first appearance), start[U + 1] and order[n] so that the entries
 * of unique row u are order[start[u]] < ... < order[start[u + 1] - 1]. slots: scratch of `capacity` (a power of two
 * >= 2 n). Returns U, or -1 - i where ids[i] is the first one outside [0, rows). Serial: its scratch stays in cache. */
CLONES
int64_t engram_group(const int64_t *ids, int64_t n, int64_t rows, int32_t *slots, int64_t capacity, int32_t *which,
                     int64_t *unique, int32_t *start, int32_t *order) {
    const int64_t bad = engram_check(ids, n, rows);
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

typedef struct {
    float *data, *state;
    const int64_t *ids;
    const float *grad;
    int64_t dim;
} Touch;

/* The least work of a row-wise update, for `engram bench`: row and state read and written, gradient read. */
CLONES
int64_t engram_touch_rows(const Touch *a, int64_t lo, int64_t hi) {
    BY_WIDTH(touch, a->dim, a->data, a->state, a->ids, lo, hi, a->grad)
    return -1;
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

typedef struct {
    const Table *table;
    float *v;
    const Gradient *gradient;
    uint8_t *done; /* this and the other updates set done[u] for each row that they have brought up to date, with its state */
    double lr, b2, c2, eps;
    uint64_t salt;
    int32_t stochastic;
} Rms;

CLONES
int64_t engram_rms(const Rms *a, int64_t lo, int64_t hi) {
    EXACT
    const float lr = (float)a->lr, b2 = (float)a->b2, c2 = (float)a->c2, eps = (float)a->eps;
    const Table *t = a->table;
    BY_WIDTH(rms, t->dim, t, a->v, a->gradient, lo, hi, lr, b2, c2, eps, a->stochastic, a->salt)
    memset(a->done + lo, 1, (size_t)(hi - lo));
    return -1;
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

typedef struct {
    const Table *table;
    float *moments;
    const Gradient *gradient;
    uint8_t *done;
    double step_size, b1, c1, b2, c2, eps;
    uint64_t salt;
    int32_t stochastic;
} Adam;

CLONES
int64_t engram_adam(const Adam *a, int64_t lo, int64_t hi) {
    EXACT
    const float step_size = (float)a->step_size, b1 = (float)a->b1, c1 = (float)a->c1, b2 = (float)a->b2;
    const float c2 = (float)a->c2, eps = (float)a->eps;
    const Table *t = a->table;
    BY_WIDTH(adam, t->dim, t, a->moments, a->gradient, lo, hi, step_size, b1, c1, b2, c2, eps, a->stochastic, a->salt)
    memset(a->done + lo, 1, (size_t)(hi - lo));
    return -1;
}
