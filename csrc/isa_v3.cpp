#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cstdint>
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v3")
#define SYNCBN_ISA v3
#define SYNCBN_NAME "x86-64-v3"
#define SYNCBN_VECTOR_BYTES 32
#define SYNCBN_AVX 256
#include "loops.h"
#endif
