/* The gradient of a step, grouped by row: what updates.c and sinkhorn.c share. */
#ifndef ENGRAM_UPDATES_H
#define ENGRAM_UPDATES_H
#include "rows.h"

#define LANES 16
#define AHEAD 12 /* rows of look-ahead of the update kernels; flat optimum between 8 and 24 */

int64_t engram_check(const int64_t *ids, int64_t n, int64_t rows);

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

/* Prefetches the row, its state and its gradient a few steps before they are used. */
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
#endif
