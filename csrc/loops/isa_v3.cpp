// Compiled with -march=x86-64-v3: see setup.py.
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>
#define SYNCBN_ISA v3
#define SYNCBN_NAME "x86-64-v3"
#define SYNCBN_VECTOR_BYTES 32
#define SYNCBN_AVX 256
#include "loops/loops.h"
#endif
