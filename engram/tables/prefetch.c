/* Find the rows fetched ahead that were changed since. Called through ctypes by prefetch.py. */
#include <stdint.h>

/* Writes to `positions` the indices i with query[i] in touched[0..n), ascending, and returns how many. slots: scratch of
 * `capacity` (a power of two >= 2 n) int64, filled with -1. */
int64_t engram_find(const int64_t *touched, int64_t n, int64_t *slots, int64_t capacity, const int64_t *query, int64_t m,
                    int64_t *positions) {
    const uint64_t mask = (uint64_t)capacity - 1;
    for (int64_t i = 0; i < n; i++) {
        uint64_t h = ((uint64_t)touched[i] * 0x9E3779B97F4A7C15ull >> 20) & mask;
        while (slots[h] >= 0 && slots[h] != touched[i]) h = (h + 1) & mask;
        slots[h] = touched[i];
    }
    int64_t found = 0;
    for (int64_t i = 0; i < m; i++) {
        uint64_t h = ((uint64_t)query[i] * 0x9E3779B97F4A7C15ull >> 20) & mask;
        while (slots[h] >= 0 && slots[h] != query[i]) h = (h + 1) & mask;
        if (slots[h] >= 0) positions[found++] = i;
    }
    return found;
}
