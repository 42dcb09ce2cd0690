/* Rows in, rows out: the hot loops of engram/tables. Called through ctypes (kernels.py), which drops the GIL.
 *
 * A kernel has the form int64_t kernel(const Arguments *, int64_t lo, int64_t hi): it works on a piece [lo, hi) of its
 * items, so the caller decides how many threads run, and returns -1, or the first item that it refuses. The structs of
 * arguments are packed by kernels.py, whose table of formats mirrors them.
 */
#include "rows.h"

#define BLOCK 512 /* row ids that are checked together, just before their rows are read: 4 KiB, still in L1 then */

/* Look-ahead of a gather: 8 KiB of rows are under way, but no more rows than a core has outstanding misses. */
static inline int64_t gather_ahead(int64_t bytes) {
    const int64_t ahead = 8192 / bytes;
    return ahead < 2 ? 2 : ahead > 24 ? 24 : ahead;
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

typedef struct {
    const Table *table;
    const int64_t *ids;
    void *out;
    int32_t as_float;
} Gather;

/* out[i] = row ids[i] for i in [lo, hi). out is float32 if as_float, else the table's own dtype. Returns -1, or the
 * first index whose row id is outside the table; no row is read there or after it, so the rest of out is undefined. */
CLONES
int64_t engram_gather(const Gather *a, int64_t lo, int64_t hi) {
    EXACT
    const Table *t = a->table;
    const int64_t *ids = a->ids;
    const int32_t as_float = a->as_float;
    void *out = a->out;
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

typedef struct {
    const char *data;
    const int64_t *ids;
    char *out;
    int64_t bytes; /* of one row */
} Copy;

/* The least work of a gather, for `engram bench`: prefetch and copy, nothing else. */
CLONES
int64_t engram_copy_rows(const Copy *a, int64_t lo, int64_t hi) {
    copy_rows(a->data, a->ids, lo, hi, hi, a->out, a->bytes);
    return -1;
}

typedef struct {
    const uint64_t *data;
} Words;

/* Reads [lo, hi) in order: the memory's sequential bandwidth, for `engram bench`. */
CLONES
int64_t engram_read_words(const Words *a, int64_t lo, int64_t hi) {
    const uint64_t *data = a->data;
    uint64_t sum = 0;
    for (int64_t i = lo; i < hi; i++) sum += data[i];
    volatile uint64_t used = sum; /* or the loop would be dropped */
    (void)used;
    return -1;
}

/* Stores float32 rows under ids (distinct). */
void engram_scatter(const Table *t, const int64_t *ids, int64_t lo, int64_t hi, const float *in) {
    EXACT
    for (int64_t i = lo; i < hi; i++) write_row(t, ids[i], in + i * t->dim, 0, 0);
}

/* Python's extension loader needs this symbol on some systems; the functions above are called through ctypes. */
#if defined(_WIN32)
__declspec(dllexport)
#endif
void *PyInit__native(void) { return 0; }
