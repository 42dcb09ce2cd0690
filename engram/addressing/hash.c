// Row ids of every layer, order and head in one pass over the raw token ids: the token map, the boundary rules, the
// n-gram hash and the remainders. Plain C called through ctypes (hasher.py); equals the torch path bit for bit.
//
// Remainders take most of the time (32 per token for two layers of 16 columns), and a 64-bit division costs 20 to 40
// cycles. A modulus is fixed, so x mod p = x - p*floor(x/p) with floor(x/p) computed as a product by a prepared 1/p that
// is slightly too small: the quotient is then right or one too low, and one conditional subtraction makes it exact.

#include <stddef.h>
#include <stdint.h>

#define LONGEST 16 // as in layout.py
#define BLOCK 128  // tokens hashed together
#define AHEAD 24   // tokens of look-ahead into the token map, which the nearest caches do not hold; more than LONGEST

// AVX-512 converts between 64-bit integers and doubles in vectors, which makes `by_inverse` below 2 to 3 times faster;
// without it the same loop computes one head at a time. The choice at load time needs GCC and glibc's ifunc.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

// Mirrored by hasher.py's _Plan. C columns = orders * heads; [layers, C] arrays are row-major.
struct engram_hash_plan {
    const int64_t *table;        // [vocab] raw id -> compressed id
    int64_t vocab;
    int64_t pad;                 // compressed id before the start of a text
    int64_t layers, orders, heads;
    int64_t longest;             // N, the largest order
    int64_t xxh64;               // 1: XXH64 of the n-gram; 0: multiply and xor
    int64_t large_moduli;        // 1: every modulus is at least 2^15
    int64_t dead;                // 1: an id of -1 inside a text is a boundary; 0: it is an error
    int64_t eos;                 // 1: a token with the compressed id `pad` is a boundary for the tokens after it
    const int64_t *order;        // [orders] ascending
    const uint64_t *multipliers; // [layers, N], the current token's first
    const uint64_t *seeds;       // [layers] of XXH64
    const uint64_t *moduli;      // [layers, C]
    const uint64_t *reciprocals; // [layers, C] floor((2^64-1) / p)
    const double *inverses;      // [layers, C] (1/p) * (1 - 2^-50)
    const int64_t *offsets;      // [layers, C]
};

// hash [count] -> rows [count, heads] at a stride of `columns`; p, reciprocal and offset [heads].
// For any p >= 1: floor((2^64-1)/p) is at least 2^64/p - 1, so the quotient falls short by less than x/2^64 < 1.
INLINE void by_reciprocal(const uint64_t *hash, int64_t count, int64_t heads, int64_t columns, const uint64_t *p,
                          const uint64_t *reciprocal, const int64_t *offset, int64_t *restrict rows) {
    for (int64_t t = 0; t < count; t++, rows += columns)
        for (int64_t k = 0; k < heads; k++) {
            uint64_t quotient = (uint64_t)(((unsigned __int128)hash[t] * reciprocal[k]) >> 64);
            uint64_t rest = hash[t] - quotient * p[k];
            rows[k] = (int64_t)(rest >= p[k] ? rest - p[k] : rest) + offset[k];
        }
}

// The same for p in [2^15, 2^62), in doubles, which vectorises over the heads. x, 1/p, the reduced inverse and the
// product each have a relative error of at most 2^-53, together less than the 2^-50 subtracted, so the quotient is never
// too high; and it falls short by less than (2^64 / 2^15) * 2^-49 = 1.
INLINE void by_inverse(const uint64_t *hash, int64_t count, int64_t heads, int64_t columns, const uint64_t *p,
                       const double *inverse, const int64_t *offset, int64_t *restrict rows) {
    for (int64_t t = 0; t < count; t++, rows += columns) {
        __asm__("" : "+r"(t)); // or GCC vectorises over t, whose rows lie far apart
        const double approximate = (double)hash[t];
        for (int64_t k = 0; k < heads; k++) {
            uint64_t quotient = (uint64_t)(int64_t)(approximate * inverse[k]);
            uint64_t rest = hash[t] - quotient * p[k];
            uint64_t lower = rest - p[k]; // wraps to a huge number if rest < p
            rows[k] = (int64_t)(lower < rest ? lower : rest) + offset[k];
        }
    }
}

#define P1 0x9E3779B185EBCA87ULL
#define P2 0xC2B2AE3D27D4EB4FULL
#define P3 0x165667B19E3779F9ULL
#define P4 0x85EBCA77C2B2AE63ULL
#define P5 0x27D4EB2F165667C5ULL

INLINE uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }
INLINE uint64_t round_of(uint64_t lane, uint64_t word) { return rotate(lane + word * P2, 31) * P1; }

// XXH64 of n 64-bit words. words[i * BLOCK] is the token i steps back; the text order is oldest first. It reads values
// instead of bytes, so the digest is that of little-endian int64 on any machine.
INLINE uint64_t xxh64(const uint64_t *words, int64_t n, uint64_t seed) {
    uint64_t hash = seed + P5;
    int64_t left = n;
    if (n >= 4) { // stripes of 32 bytes, one word per lane
        uint64_t lane[4] = {seed + P1 + P2, seed + P2, seed, seed - P1};
        for (; left >= 4; left -= 4)
            for (int i = 0; i < 4; i++) lane[i] = round_of(lane[i], words[(left - 1 - i) * BLOCK]);
        hash = rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18);
        for (int i = 0; i < 4; i++) hash = (hash ^ round_of(0, lane[i])) * P1 + P4;
    }
    hash += 8 * (uint64_t)n;
    while (left--) hash = rotate(hash ^ round_of(0, words[left * BLOCK]), 27) * P1 + P4;
    hash = (hash ^ hash >> 33) * P2;
    hash = (hash ^ hash >> 29) * P3;
    return hash ^ hash >> 32;
}

// One text [time], its document numbers or NULL, and the `back` ids before it.
struct text {
    const int64_t *ids, *documents, *before;
    int64_t back, time;
};

// window[i][t] = compressed id of the token i steps before position start + t, pad from the first boundary on.
// Returns 0, or 1 at an id outside the vocabulary. The window of a dead position is all pad.
INLINE int fill_window(const struct engram_hash_plan *plan, const struct text *text, int64_t start, int64_t count,
                       uint64_t window[LONGEST][BLOCK]) {
    const int64_t steps = plan->longest - 1, *table = plan->table;
    const uint64_t vocab = (uint64_t)plan->vocab, pad = (uint64_t)plan->pad;
    uint64_t compressed[LONGEST + BLOCK] = {0}; // [steps + t] belongs to position start + t
    int64_t reach[LONGEST + BLOCK];             // how many steps back from there stay inside the document
    int64_t inside = 0;
    for (int64_t t = -steps; t < count; t++) {
        const int64_t at = start + t;
        if (at < -text->back) continue;
        if (at + AHEAD < text->time) __builtin_prefetch(table + text->ids[at + AHEAD]); // safe for any id: reads nothing
        const int64_t id = at < 0 ? text->before[text->back + at] : text->ids[at];
        if (id < 0 && (at < 0 || (plan->dead && id == -1))) { // before the start or dead: all older positions are pad
            inside = 0;
            reach[steps + t] = -1;
            continue;
        }
        if ((uint64_t)id >= vocab) return 1;
        if (text->documents && at > 0 && text->documents[at] != text->documents[at - 1]) inside = 0;
        compressed[steps + t] = (uint64_t)table[id];
        reach[steps + t] = inside++;
        if (plan->eos && compressed[steps + t] == pad) inside = 0;
    }
    for (int64_t i = 0; i <= steps; i++)
        for (int64_t t = 0; t < count; t++)
            window[i][t] = i <= reach[steps + t] ? compressed[steps + t - i] : pad;
    return 0;
}

struct hash {
    const struct engram_hash_plan *plan;
    const int64_t *ids, *documents; // [batch, time]; documents may be NULL
    const int64_t *lookback;        // [batch, back] or NULL
    int64_t back, batch, time;
    int64_t *out; // [layers, batch*time, C]
};

// Fills the flat positions [first, last) of out. Returns -1, or a position at or before an id outside the vocabulary
// (the caller finds which). The form of a kernel is described in tables/kernels.c.
CLONES
int64_t engram_hash(const struct hash *a, int64_t first, int64_t last) {
    const struct engram_hash_plan *plan = a->plan;
    const int64_t heads = plan->heads, columns = plan->orders * heads, back = a->back, batch = a->batch, time = a->time;
    int64_t *out = a->out;
    uint64_t window[LONGEST][BLOCK], mix[BLOCK], digest[BLOCK];
    for (int64_t count; first < last; first += count) { // blocks of one text, small enough for the nearest cache
        const int64_t row = first / time, start = first % time;
        const int64_t *documents = a->documents ? a->documents + row * time : NULL;
        const struct text text = {a->ids + row * time, documents, a->lookback + row * back, back, time};
        count = time - start < last - first ? time - start : last - first;
        if (count > BLOCK) count = BLOCK;
        if (fill_window(plan, &text, start, count, window)) return first;

        for (int64_t layer = 0; layer < plan->layers; layer++) {
            const uint64_t *multiplier = plan->multipliers + layer * plan->longest;
            int64_t at = layer * columns;
            int64_t *rows = out + (layer * batch * time + first) * columns;
            for (int64_t t = 0; t < count; t++) mix[t] = window[0][t] * multiplier[0];
            for (int64_t n = 2, order = 0; n <= plan->longest; n++) { // mixes all orders, writes rows of the listed ones
                for (int64_t t = 0; t < count; t++) mix[t] ^= window[n - 1][t] * multiplier[n - 1];
                if (plan->order[order] != n) continue;
                if (plan->xxh64)
                    for (int64_t t = 0; t < count; t++) digest[t] = xxh64(&window[0][t], n, plan->seeds[layer]);
                const uint64_t *hash = plan->xxh64 ? digest : mix, *p = plan->moduli + at;
                const int64_t *offset = plan->offsets + at;
                if (!plan->large_moduli)
                    by_reciprocal(hash, count, heads, columns, p, plan->reciprocals + at, offset, rows);
                else if (heads == 8) // a constant count: one vector, no inner loop
                    by_inverse(hash, count, 8, columns, p, plan->inverses + at, offset, rows);
                else
                    by_inverse(hash, count, heads, columns, p, plan->inverses + at, offset, rows);
                order++, at += heads, rows += heads;
            }
        }
    }
    return -1;
}
