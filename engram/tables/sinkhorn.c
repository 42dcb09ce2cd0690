/* The kernels of RowSinkhorn (sinkhorn.py): momentum balanced over the rows and columns of a step. */
#include "updates.h"

/* base to the power of n >= 0, by squaring, so that every machine rounds alike. */
static inline double power(double base, int64_t n) {
    double result = 1;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

/* The momentum of a touched row of the Sinkhorn optimizer, in `to`, which may be where it is stored: beta^(now - last) m +
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

typedef struct {
    const Table *table;
    const float *m, *last;
    const Gradient *gradient;
    double beta;
    int64_t now;
    float *look, *norm;
} Look;

/* Sinkhorn-balanced momentum, first sweep, which changes no state: look[u] <- (grad + beta m) / norm[u] for touched row
 * u, with m its new momentum and norm[u] the L2 norm; zeros where the norm is 0. */
CLONES
int64_t engram_sinkhorn_look(const Look *a, int64_t lo, int64_t hi) {
    EXACT
    const Gradient *g = a->gradient;
    const float *m = a->m, *last = a->last, b = (float)a->beta;
    const int64_t d = a->table->dim;
    float *norm = a->norm, sum[d], moved[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead_at_momentum(m, last, g, u, hi, d);
        const int64_t r = g->unique[u];
        const float *grad = sum_gradient(g, u, d, sum);
        float *ahead = a->look + u * d;
        move(moved, m + r * d, last[r], grad, a->beta, a->now, d);
        for (int64_t j = 0; j < d; j++) ahead[j] = grad[j] + b * moved[j];
        norm[u] = sqrtf(mean_square(ahead, d) * (float)d);
        const float scale = norm[u] > 0 ? 1 / norm[u] : 0;
        for (int64_t j = 0; j < d; j++) ahead[j] *= scale;
    }
    return -1;
}

#define STRIP 64 /* rows whose column sums are added up together; strips add up in order, on any threads */

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

typedef struct {
    const float *look, *norm, *weight;
    double limit;
    int64_t n, d;
    float *sums;
} Sweep;

/* One row normalisation and the sums for the column normalisation after it, of strips [lo, hi) of look [n, d]:
 * sums[strip][j] = sum over its rows of look^2 times the row's factor. Rows whose norm is <= limit are left out. */
CLONES
int64_t engram_sinkhorn_sweep(const Sweep *a, int64_t lo, int64_t hi) {
    EXACT
    const float *look = a->look, *norm = a->norm, *weight = a->weight, limit = (float)a->limit;
    const int64_t n = a->n, d = a->d;
    for (int64_t strip = lo; strip < hi; strip++) {
        const int64_t end = (strip + 1) * STRIP < n ? (strip + 1) * STRIP : n;
        float *sum = a->sums + strip * d;
        memset(sum, 0, d * 4);
        for (int64_t u = strip * STRIP; u < end; u++) {
            if (norm[u] <= limit) continue;
            const float *x = look + u * d, factor = row_factor(x, weight, d);
            for (int64_t j = 0; j < d; j++) sum[j] += x[j] * x[j] * factor;
        }
    }
    return -1;
}

typedef struct {
    const Table *table;
    float *m, *last;
    const Gradient *gradient;
    uint8_t *done;
    double beta;
    int64_t now;
    const float *look, *norm, *weight, *root;
    double limit, rate;
    uint64_t salt;
    int32_t stochastic;
} Update;

/* The last row normalisation and the update: row <- row - rate look root[j] / |look root|, root = sqrt(weight). Momentum
 * and last touch change with the row, so that a step which is cut short leaves both old or both new. */
CLONES
int64_t engram_sinkhorn_update(const Update *a, int64_t lo, int64_t hi) {
    EXACT
    const Table *t = a->table;
    const Gradient *g = a->gradient;
    const float *norm = a->norm, *weight = a->weight, *root = a->root;
    const float limit = (float)a->limit, rate = (float)a->rate;
    const int64_t d = t->dim;
    float *m = a->m, *last = a->last, row[d], sum[d];
    for (int64_t u = lo; u < hi; u++) {
        look_ahead(t, g, u, hi, d);
        look_ahead_at_momentum(m, last, g, u, hi, d);
        const int64_t r = g->unique[u];
        move(m + r * d, m + r * d, last[r], sum_gradient(g, u, d, sum), a->beta, a->now, d);
        last[r] = (float)a->now;
        if (norm[u] <= limit) continue;
        const float *x = a->look + u * d, scale = rate * sqrtf(row_factor(x, weight, d));
        read_row(t, r, row);
        for (int64_t j = 0; j < d; j++) row[j] -= scale * (x[j] * root[j]);
        write_row(t, r, row, a->stochastic, a->salt);
    }
    memset(a->done + lo, 1, (size_t)(hi - lo));
    return -1;
}
