#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>
#define SYNCBN_ISA baseline
#if defined(__x86_64__)
#define SYNCBN_NAME "x86-64"
#elif defined(__aarch64__)
#define SYNCBN_NAME "AArch64"
#else
#define SYNCBN_NAME "baseline"
#endif
#define SYNCBN_VECTOR_BYTES 16
#define SYNCBN_AVX 0
#include "loops/loops.h"
