/* Counts of n-grams: children of a trie, found by (parent node, token) in one hash table per order. Called through ctypes
 * (../tables/kernels.py). reference.py has the same functions in Python, with the same bits.
 *
 * A node has `words` uint32: parent, token, count, next, and where it can be a context also first, distinct, once, total.
 * next and first link the successors of a context, newest first. distinct, once and total are over the successors whose
 * count is not 0. Node 0 is none. A slot has the number of a node, 0 if it is free.
 */
#include <stdint.h>

enum { PARENT, TOKEN, COUNT, NEXT, FIRST, DISTINCT, ONCE, TOTAL };

#define AHEAD 32 /* keys whose slots and nodes are under way together: a probe then waits for no memory */

static inline uint64_t hash_key(uint32_t parent, uint32_t token) {
    uint64_t x = ((uint64_t)parent << 32 | token) + 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

typedef struct {
    const uint32_t *nodes, *slots, *parents, *tokens;
    uint32_t *found;
    uint64_t mask; /* slots - 1 */
    int64_t words;
} Find;

/* found[i] = the child of parents[i] with tokens[i], for i in [lo, hi); 0 if there is none, or the parent is 0. */
int64_t engram_counts_find(const Find *a, int64_t lo, int64_t hi) {
    const uint32_t *nodes = a->nodes, *slots = a->slots;
    uint64_t place[AHEAD];
    for (int64_t end; lo < hi; lo = end) {
        end = lo + AHEAD < hi ? lo + AHEAD : hi;
        for (int64_t i = lo; i < end; i++) {
            place[i - lo] = hash_key(a->parents[i], a->tokens[i]) & a->mask;
            __builtin_prefetch(slots + place[i - lo]);
        }
        for (int64_t i = lo; i < end; i++) __builtin_prefetch(nodes + (uint64_t)slots[place[i - lo]] * a->words);
        for (int64_t i = lo; i < end; i++) {
            uint32_t node = 0;
            if (a->parents[i])
                for (uint64_t h = place[i - lo]; (node = slots[h]); h = (h + 1) & a->mask) {
                    const uint32_t *n = nodes + (uint64_t)node * a->words;
                    if (n[PARENT] == a->parents[i] && n[TOKEN] == a->tokens[i]) break;
                }
            a->found[i] = node;
        }
    }
    return -1;
}

typedef struct {
    uint32_t *nodes, *slots, *above; /* above: nodes of the parents; NULL if they need no totals */
    const uint32_t *parents, *tokens;
    const int32_t *amounts; /* NULL: `step` for each */
    uint32_t *found;
    uint32_t *used; /* nodes that exist, node 0 included */
    uint64_t mask;
    int64_t words, step;
} Add;

/* Adds to the counts of children [lo, hi), and makes those that do not exist; there must be room for them. In order and
 * on one thread: a later key may be the child that an earlier one has made. */
int64_t engram_counts_add(const Add *a, int64_t lo, int64_t hi) {
    uint32_t *nodes = a->nodes, *slots = a->slots;
    uint64_t place[AHEAD];
    for (int64_t end; lo < hi; lo = end) {
        end = lo + AHEAD < hi ? lo + AHEAD : hi;
        for (int64_t i = lo; i < end; i++) {
            place[i - lo] = hash_key(a->parents[i], a->tokens[i]) & a->mask;
            __builtin_prefetch(slots + place[i - lo], 1);
            if (a->above) __builtin_prefetch(a->above + (uint64_t)a->parents[i] * 8, 1);
        }
        for (int64_t i = lo; i < end; i++) __builtin_prefetch(nodes + (uint64_t)slots[place[i - lo]] * a->words, 1);
        for (int64_t i = lo; i < end; i++) {
            const uint32_t parent = a->parents[i], token = a->tokens[i];
            const int64_t amount = a->amounts ? a->amounts[i] : a->step;
            a->found[i] = 0;
            if (!parent) continue;
            uint64_t h = place[i - lo];
            uint32_t node, *n = nodes, *p = a->above ? a->above + (uint64_t)parent * 8 : 0;
            for (; (node = slots[h]); h = (h + 1) & a->mask) {
                n = nodes + (uint64_t)node * a->words;
                if (n[PARENT] == parent && n[TOKEN] == token) break;
            }
            if (!node) {
                node = slots[h] = (*a->used)++;
                n = nodes + (uint64_t)node * a->words;
                for (int64_t j = 0; j < a->words; j++) n[j] = 0;
                n[PARENT] = parent;
                n[TOKEN] = token;
                if (p) {
                    n[NEXT] = p[FIRST];
                    p[FIRST] = node;
                }
            }
            const uint32_t old = n[COUNT], now = (uint32_t)(old + amount);
            n[COUNT] = now;
            a->found[i] = node;
            if (p) {
                p[DISTINCT] += (uint32_t)(now > 0) - (uint32_t)(old > 0);
                p[ONCE] += (uint32_t)(now == 1) - (uint32_t)(old == 1);
                p[TOTAL] += (uint32_t)amount;
            }
        }
    }
    return -1;
}

typedef struct {
    const uint32_t *nodes;
    uint32_t *slots;
    uint64_t mask;
    int64_t words;
} Place;

/* Writes nodes [lo, hi) of a level to free slots, on one thread. */
int64_t engram_counts_place(const Place *a, int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) {
        if (i + AHEAD < hi) {
            const uint32_t *later = a->nodes + (i + AHEAD) * a->words;
            __builtin_prefetch(a->slots + (hash_key(later[PARENT], later[TOKEN]) & a->mask), 1);
        }
        const uint32_t *n = a->nodes + i * a->words;
        uint64_t h = hash_key(n[PARENT], n[TOKEN]) & a->mask;
        while (a->slots[h]) h = (h + 1) & a->mask;
        a->slots[h] = (uint32_t)i;
    }
    return -1;
}

typedef struct {
    const uint32_t *nodes, *first;
    const int64_t *start; /* of each context's successors in tokens and counts */
    int64_t *tokens;
    uint32_t *counts;
    int64_t words;
} List;

/* Lists the successors of contexts [lo, hi). */
int64_t engram_counts_list(const List *a, int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) {
        int64_t at = a->start[i];
        for (uint32_t node = a->first[i]; node && at < a->start[i + 1];) {
            const uint32_t *n = a->nodes + (uint64_t)node * a->words;
            if (n[COUNT]) {
                a->tokens[at] = n[TOKEN];
                a->counts[at++] = n[COUNT];
            }
            node = n[NEXT];
        }
    }
    return -1;
}
