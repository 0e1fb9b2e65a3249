#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cstdint>
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4")
#define SYNCBN_ISA v4
#define SYNCBN_NAME "x86-64-v4"
#define SYNCBN_VECTOR_BYTES 64
#define SYNCBN_AVX 512
#include "loops.h"
#endif
