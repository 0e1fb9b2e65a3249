// Compiled with -march=x86-64-v4: see setup.py.
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>
#define SYNCBN_ISA v4
#define SYNCBN_NAME "x86-64-v4"
#define SYNCBN_VECTOR_BYTES 64
#define SYNCBN_AVX 512
#include "loops/loops.h"
#endif
