/* Decoding of stored rows, fused into the gather, and encoding. The layouts are described in codecs.py, whose torch code
 * gives the same bits. The form of a kernel is described in kernels.c. */
#include <stdint.h>
#include <string.h>

#include "rounding.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define AHEAD 16 /* rows of look-ahead for the software prefetch; encoded rows are short */
#define BLOCK 32 /* values per scale */

enum { FP8 = 0, INT8 = 1, INT4 = 2, PQ = 3 };

typedef struct {
    uint8_t *data;          /* rows * row_bytes */
    const float *codebooks; /* PQ: [dim / width, 256, width] */
    int64_t rows, dim, row_bytes;
    int32_t codec, width;
} Encoded;

static inline float from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline void prefetch_bytes(const uint8_t *p, int64_t bytes) {
    const uint8_t *end = p + (bytes < 2048 ? bytes : 2048);
    for (p = (const uint8_t *)((uintptr_t)p & ~(uintptr_t)63); p < end; p += 64) __builtin_prefetch(p, 0);
}

/* e4m3fn without a table: exponents move by integer addition; subnormals (m * 2^-9) are converted from integers, so no
 * slow denormal arithmetic happens. */
static inline float from_e4m3(uint32_t x) {
    const float small = (float)(int32_t)(x & 7) * 0x1p-9f;
    uint32_t bits;
    memcpy(&bits, &small, 4);
    if (x & 0x78) bits = ((x & 0x7F) << 20) + (120u << 23);
    if ((x & 0x7F) == 0x7F) bits = 0x7FC00000u;
    return from_bits(bits | (x & 0x80) << 24);
}

static inline void decode_fp8(const uint8_t *row, int64_t dim, float *out) {
    for (int64_t b = 0; b < dim / BLOCK; b++, out += BLOCK) {
        const uint8_t *v = row + b * BLOCK;
        const uint32_t s = row[dim + b];
        if (s == 0) { /* 2^-127 is denormal: two exact steps keep the zeros of an unwritten row fast */
            for (int j = 0; j < BLOCK; j++) out[j] = from_e4m3(v[j]) * 0x1p-126f * 0.5f;
            continue;
        }
        const float scale = from_bits(s == 255 ? 0x7FC00000u : s << 23);
        for (int j = 0; j < BLOCK; j++) out[j] = from_e4m3(v[j]) * scale;
    }
}

static inline float bfloat16_at(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return from_bits((uint32_t)v << 16);
}

static inline void decode_int8(const uint8_t *row, int64_t dim, float *out) {
    for (int64_t b = 0; b < dim / BLOCK; b++, out += BLOCK) {
        const int8_t *v = (const int8_t *)row + b * BLOCK;
        const float scale = bfloat16_at(row + dim + 2 * b);
        for (int j = 0; j < BLOCK; j++) out[j] = (float)v[j] * scale;
    }
}

static inline void decode_int4(const uint8_t *row, int64_t dim, float *out) {
    for (int64_t b = 0; b < dim / BLOCK; b++, out += BLOCK) {
        const uint8_t *v = row + b * (BLOCK / 2);
        const float scale = bfloat16_at(row + dim / 2 + 2 * b);
        for (int j = 0; j < BLOCK / 2; j++) {
            out[j] = (float)((int32_t)((v[j] & 15u) ^ 8u) - 8) * scale;
            out[j + BLOCK / 2] = (float)((int32_t)((uint32_t)(v[j] >> 4) ^ 8u) - 8) * scale;
        }
    }
}

static inline void decode_pq(const Encoded *t, const uint8_t *row, float *out) {
    const int64_t parts = t->row_bytes;
    const float *book = t->codebooks;
    if (t->width == 4)
        for (int64_t m = 0; m < parts; m++, book += 256 * 4) memcpy(out + m * 4, book + row[m] * 4, 16);
    else
        for (int64_t m = 0; m < parts; m++, book += 256 * 8) memcpy(out + m * 8, book + row[m] * 8, 32);
}

typedef struct {
    const Encoded *table;
    const int64_t *ids;
    float *out;
} Decode;

/* out[i] = row ids[i] as float32 [dim]. Ids were checked. */
CLONES
int64_t engram_decode(const Decode *a, int64_t lo, int64_t hi) {
    EXACT
    const Encoded *t = a->table;
    const int64_t *ids = a->ids, d = t->dim, size = t->row_bytes;
    float *out = a->out;
    const uint8_t *data = t->data;
    for (int64_t i = lo; i < hi; i++) {
        if (i + AHEAD < hi) prefetch_bytes(data + ids[i + AHEAD] * size, size);
        const uint8_t *row = data + ids[i] * size;
        switch (t->codec) {
        case FP8: decode_fp8(row, d, out + i * d); break;
        case INT8: decode_int8(row, d, out + i * d); break;
        case INT4: decode_int4(row, d, out + i * d); break;
        default: decode_pq(t, row, out + i * d);
        }
    }
    return -1;
}

typedef struct {
    const Encoded *table;
    int64_t first;
} Check;

/* Refuses the first i of [lo, hi) whose row first + i holds what no encoder writes. fp8: a NaN scale (255) or value (0x7F, 0xFF);
 * int8, int4: a scale that is negative, infinite or NaN. */
CLONES
int64_t engram_decode_check(const Check *a, int64_t lo, int64_t hi) {
    const Encoded *t = a->table;
    const int64_t values = t->codec == INT4 ? t->dim / 2 : t->dim, scales = t->dim / BLOCK;
    if (t->codec == PQ) return -1;
    for (int64_t i = lo; i < hi; i++) {
        const uint8_t *row = t->data + (a->first + i) * t->row_bytes;
        uint32_t bad = 0;
        if (t->codec == FP8) {
            for (int64_t j = 0; j < values; j++) bad |= (row[j] & 0x7F) == 0x7F;
            for (int64_t b = 0; b < scales; b++) bad |= row[values + b] == 255;
        } else {
            for (int64_t b = 0; b < scales; b++) {
                uint16_t s;
                memcpy(&s, row + values + 2 * b, 2);
                bad |= s >= 0x7F80; /* inf, NaN, or the sign bit */
            }
        }
        if (bad) return i;
    }
    return -1;
}

/* Encoding, to the bits of codecs.py. Rows are float32 [n, dim]; whatever is beyond +-LARGEST is stored as that. */
#define LARGEST 3e38f

static inline float magnitude(float x) { return x < 0 ? -x : x; }
static inline float clamped(float x) { return x > LARGEST ? LARGEST : x < -LARGEST ? -LARGEST : x; }

static inline float largest_of(const float *x) {
    float largest = 0;
    for (int j = 0; j < BLOCK; j++) {
        const float a = magnitude(x[j]);
        largest = a > largest ? a : largest;
    }
    return clamped(largest);
}

/* Nearest e4m3fn, ties to even, of |x| <= 448. Below 2^-6 the code is the integer nearest to |x| 2^9, which adding 2^14
 * leaves in the low bits; above, the mantissa is rounded to three bits and the exponent moved. */
static inline uint8_t to_e4m3(float x) {
    uint32_t bits, low;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 24 & 0x80;
    bits &= 0x7FFFFFFFu;
    const float raised = from_bits(bits) + 0x1p14f;
    memcpy(&low, &raised, 4);
    const uint32_t high = (bits + 0x7FFFF + (bits >> 20 & 1) - (120u << 23)) >> 20;
    return (uint8_t)(sign | (bits < 121u << 23 ? low & 0xFF : high));
}

static inline void encode_fp8(const float *in, int64_t dim, uint8_t *row) {
    for (int64_t b = 0; b < dim / BLOCK; b++, in += BLOCK) {
        const float largest = largest_of(in);
        uint32_t bits; /* the smallest power of two under which the largest value is at most 448 = 1.75 * 2^8 */
        memcpy(&bits, &largest, 4);
        const int32_t raised = (int32_t)(bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000);
        const uint32_t scale = raised > 0 ? (uint32_t)raised : 0;
        const float inverse = from_bits((254u - scale) << 23);
        for (int j = 0; j < BLOCK; j++) row[b * BLOCK + j] = to_e4m3(clamped(in[j]) * inverse);
        row[dim + b] = (uint8_t)scale;
    }
}

static inline void encode_int(const float *in, int64_t dim, uint8_t *row, int bits_per_value) {
    const float top = bits_per_value == 8 ? 127.0f : 7.0f;
    const int64_t size = dim * bits_per_value / 8;
    for (int64_t b = 0; b < dim / BLOCK; b++, in += BLOCK) {
        const float largest = largest_of(in), step = largest / top;
        uint32_t bits;
        memcpy(&bits, &step, 4);
        uint16_t high = (uint16_t)((bits + 0xFFFF) >> 16); /* rounded up to bfloat16 */
        if (largest > 0 && high == 0) high = 1;
        const float scale = high ? from_bits((uint32_t)high << 16) : 1.0f;
        int8_t whole[BLOCK];
        for (int j = 0; j < BLOCK; j++) {
            const float x = __builtin_rintf(clamped(in[j]) / scale);
            whole[j] = (int8_t)(x > top ? top : x < -top ? -top : x);
        }
        if (bits_per_value == 8) memcpy(row + b * BLOCK, whole, BLOCK);
        else
            for (int j = 0; j < BLOCK / 2; j++)
                row[b * (BLOCK / 2) + j] = (uint8_t)((whole[j] & 15) | (uint8_t)whole[j + BLOCK / 2] << 4);
        memcpy(row + size + 2 * b, &high, 2);
    }
}

typedef struct {
    const Encoded *table;
    const float *in;
    const int64_t *ids;
    int64_t first;
} Encode;

/* Stores in[i] as row ids[i], or as row first + i where ids is NULL, for i in [lo, hi). Values were checked to be finite;
 * product quantisers are encoded by the caller. */
CLONES
int64_t engram_encode(const Encode *a, int64_t lo, int64_t hi) {
    EXACT
    const Encoded *t = a->table;
    const float *in = a->in;
    const int64_t d = t->dim;
    for (int64_t i = lo; i < hi; i++) {
        uint8_t *row = t->data + (a->ids ? a->ids[i] : a->first + i) * t->row_bytes;
        switch (t->codec) {
        case FP8: encode_fp8(in + i * d, d, row); break;
        case INT8: encode_int(in + i * d, d, row, 8); break;
        default: encode_int(in + i * d, d, row, 4);
        }
    }
    return -1;
}
