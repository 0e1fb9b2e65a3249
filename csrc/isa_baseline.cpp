#include <cstdint>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#define SYNCBN_ISA baseline
#define SYNCBN_NAME "baseline"
#define SYNCBN_VECTOR_BYTES 16
#define SYNCBN_AVX 0
#include "loops.h"
