/* Floating point as IEEE 754 has it, whatever the calling thread has set: torch.set_flush_denormal switches one thread to
 * arithmetic that reads and writes denormal numbers as zeros, and results must not depend on the thread that computes. */
#ifndef ENGRAM_ROUNDING_H
#define ENGRAM_ROUNDING_H
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define FLUSH 0x8040u /* flush to zero, denormals are zero */
static inline uint32_t read_mode(void) { return __builtin_ia32_stmxcsr(); }
static inline void write_mode(uint32_t mode) { __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
#elif defined(__aarch64__) && defined(__GNUC__)
#define FLUSH (1u << 24)
static inline uint32_t read_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return (uint32_t)mode;
}
static inline void write_mode(uint32_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)mode) : "memory"); }
#else
#define FLUSH 0u
static inline uint32_t read_mode(void) { return 0; }
static inline void write_mode(uint32_t mode) { (void)mode; }
#endif

static inline uint32_t begin_exact(void) {
    const uint32_t mode = read_mode();
    if (mode & FLUSH) write_mode(mode & ~FLUSH);
    return mode;
}

static inline void end_exact(const uint32_t *mode) {
    if (*mode & FLUSH) write_mode(*mode);
}

/* First in a function: exact arithmetic until it returns. */
#define EXACT __attribute__((cleanup(end_exact), unused)) const uint32_t callers_mode = begin_exact();
#endif
