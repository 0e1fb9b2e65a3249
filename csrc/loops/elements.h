// How elements of each type are loaded into vectors of the arithmetic's type, and stored from them.
//
// Included once per instruction set, inside its namespace (see loops.h).

SYNCBN_INLINE Vector<float> load(const float* p) {
  Vector<float> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
SYNCBN_INLINE Vector<double> load(const double* p) {
  Vector<double> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
SYNCBN_INLINE void store(float* p, Vector<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
SYNCBN_INLINE void store(double* p, Vector<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Sixteen-bit elements become vectors of 32-bit ones, as many as fit.
SYNCBN_INLINE Bits load_shorts(const void* p) {
#if SYNCBN_AVX == 512
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif SYNCBN_AVX == 256
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE2__) && SYNCBN_VECTOR_BYTES == 16  // g++ 11 would convert them one by one
  return (Bits)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
#else
  Shorts s;
  __builtin_memcpy(&s, p, sizeof(s));
  return __builtin_convertvector(s, Bits);
#endif
}
SYNCBN_INLINE void store_shorts(void* p, Bits bits) {
#if SYNCBN_AVX == 512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bits));
#elif SYNCBN_AVX == 256
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#elif defined(__SSE2__) && SYNCBN_VECTOR_BYTES == 16  // SSE2 packs signed numbers only
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)bits, 16), 16);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(extended, extended));
#else
  Shorts s = __builtin_convertvector(bits, Shorts);
  __builtin_memcpy(p, &s, sizeof(s));
#endif
}

// bfloat16 is the upper half of a float.
SYNCBN_INLINE Vector<float> load(const BFloat16* p) {
  return bit_cast<Vector<float>>(load_shorts(p) << 16);
}
// Its bits after rounding to the nearest upper half, ties to even.
SYNCBN_INLINE Bits rounded(Vector<float> v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits even = bits + ((bits >> 16 & 1u) + 0x7fffu);
  return v == v ? even : Bits{} + 0x7fc00000u;
}
SYNCBN_INLINE void store(BFloat16* p, Vector<float> v) { store_shorts(p, rounded(v) >> 16); }

#if SYNCBN_AVX == 512
SYNCBN_INLINE Vector<float> load(const Half* p) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
SYNCBN_INLINE void store(Half* p, Vector<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif SYNCBN_AVX == 256
SYNCBN_INLINE Vector<float> load(const Half* p) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
SYNCBN_INLINE void store(Half* p, Vector<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// All ones where the bits, which have no sign, are more than a number; SSE2 compares signed
// numbers.
SYNCBN_INLINE Bits above(Bits bits, int32_t number) {
  typedef int32_t Signed __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
  return (Bits)((Signed)bits > number);
}
// A half's exponent and mantissa, moved into a float's place, are its value times 2⁻¹¹², even of
// a subnormal; infinity and NaN then need the full exponent.
SYNCBN_INLINE Vector<float> load(const Half* p) {
  Bits half = load_shorts(p);
  Bits sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
  Bits value = bit_cast<Bits>(bit_cast<Vector<float>>(rest) * 0x1p112f);
  Bits special = above(rest, 0x0f7fffff) & 0x7f800000u;
  return bit_cast<Vector<float>>(sign | value | special);
}
// Normal results round by an integer addition that carries into the exponent (and to infinity);
// subnormal ones by adding ½, whose last bit is the smallest half.
SYNCBN_INLINE void store(Half* p, Vector<float> v) {
  Bits bits = bit_cast<Bits>(v);
  Bits sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  Bits normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  Bits tiny = bit_cast<Bits>(bit_cast<Vector<float>>(rest) + 0.5f) - 0x3f000000u;
  Bits is_normal = above(rest, 0x387fffff);
  Bits is_big = above(rest, 0x477fffff), is_nan = above(rest, 0x7f800000);
  Bits half = (is_normal & normal) | (~is_normal & tiny);
  half = (is_big & 0x7c00u) | (~is_big & half) | (is_nan & 0x200u);
  store_shorts(p, sign | half);
}
#endif

// Two vectors of elements, 2·lanes of them. A type may have an order of its own for them: of
// bfloat16 it takes fewer instructions to widen the even elements, then the odd ones.
template <class T>
SYNCBN_INLINE Pair<Real<T>> load_pair(const T* p) {
  return {load(p), load(p + lanes<Real<T>>)};
}
template <class T>
SYNCBN_INLINE void store_pair(T* p, const Pair<Real<T>>& v) {
  store(p, v.a);
  store(p + lanes<Real<T>>, v.b);
}
SYNCBN_INLINE Pair<float> load_pair(const BFloat16* p) {
  Bits both;
  __builtin_memcpy(&both, p, sizeof(both));
  return {bit_cast<Vector<float>>(both << 16), bit_cast<Vector<float>>(both & 0xffff0000u)};
}
SYNCBN_INLINE void store_pair(BFloat16* p, const Pair<float>& v) {
  const Bits both = rounded(v.a) >> 16 | (rounded(v.b) & 0xffff0000u);
  __builtin_memcpy(p, &both, sizeof(both));
}

// Per-channel numbers for a pair of elements of type T: load_channels<T>(p) gives them in the order
// of load_pair(T*).
template <int... i>
SYNCBN_INLINE Pair<float> join(const Pair<float>& v, std::integer_sequence<int, i...>) {
  constexpr int w = sizeof...(i);
  return {shuffled<float, (i / 2 + i % 2 * w)...>(v.a, v.b),
          shuffled<float, (w / 2 + i / 2 + i % 2 * w)...>(v.a, v.b)};
}
template <class T>
SYNCBN_INLINE Pair<Real<T>> load_channels(const Real<T>* p) {
  const Pair<Real<T>> v = load_pair(p);
  if constexpr (std::is_same_v<T, BFloat16>)
    return split(v);
  else
    return v;
}
template <class T>
SYNCBN_INLINE void store_channels(Real<T>* p, const Pair<Real<T>>& v) {
  if constexpr (std::is_same_v<T, BFloat16>)
    store_pair(p, join(v, std::make_integer_sequence<int, lanes<float>>{}));
  else
    store_pair(p, v);
}

// One element, converted as vectors are.
template <class T>
SYNCBN_INLINE Real<T> first_of(const T* p) {
  if constexpr (std::is_same_v<T, Real<T>>) return *p;
  T some[lanes<Real<T>>] = {};
  __builtin_memcpy(some, p, sizeof(T));
  return load(some)[0];
}

// Copies n < bound elements in a few moves of a fixed size.
template <int64_t bound, class T>
SYNCBN_INLINE void copy_some(T* to, const T* from, int64_t n) {
  if constexpr (bound > 1) {
    constexpr int64_t half = bound / 2;
    if (n & half) {
      __builtin_memcpy(to, from, half * sizeof(T));
      to += half;
      from += half;
    }
    copy_some<half>(to, from, n);
  }
}

// The first n < lanes elements. The other lanes hold any finite numbers.
template <class T>
SYNCBN_INLINE Vector<Real<T>> load_some(const T* p, int64_t n) {
  T some[lanes<Real<T>>] = {};
  copy_some<lanes<Real<T>>>(some, p, n);
  return load(some);
}
template <class T>
SYNCBN_INLINE void store_some(T* p, int64_t n, Vector<Real<T>> v) {
  T some[lanes<Real<T>>];
  store(some, v);
  copy_some<lanes<Real<T>>>(p, some, n);
}
#if SYNCBN_AVX == 512  // loads and stores under a mask
SYNCBN_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
SYNCBN_INLINE Vector<float> load_some(const float* p, int64_t n) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
SYNCBN_INLINE void store_some(float* p, int64_t n, Vector<float> v) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
SYNCBN_INLINE Vector<double> load_some(const double* p, int64_t n) {
  return (Vector<double>)_mm512_maskz_loadu_pd((__mmask8)first_lanes(n), p);
}
SYNCBN_INLINE void store_some(double* p, int64_t n, Vector<double> v) {
  _mm512_mask_storeu_pd(p, (__mmask8)first_lanes(n), (__m512d)v);
}
template <class T>
SYNCBN_INLINE Vector<float> load_some_shorts(const T* p, int64_t n) {
  T some[16];
  _mm256_storeu_si256((__m256i*)some, _mm256_maskz_loadu_epi16(first_lanes(n), p));
  return load(some);
}
template <class T>
SYNCBN_INLINE void store_some_shorts(T* p, int64_t n, Vector<float> v) {
  T some[16];
  store(some, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256((const __m256i*)some));
}
SYNCBN_INLINE Vector<float> load_some(const BFloat16* p, int64_t n) {
  return load_some_shorts(p, n);
}
SYNCBN_INLINE Vector<float> load_some(const Half* p, int64_t n) { return load_some_shorts(p, n); }
SYNCBN_INLINE void store_some(BFloat16* p, int64_t n, Vector<float> v) {
  store_some_shorts(p, n, v);
}
SYNCBN_INLINE void store_some(Half* p, int64_t n, Vector<float> v) { store_some_shorts(p, n, v); }
#elif SYNCBN_AVX == 256
SYNCBN_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SYNCBN_INLINE Vector<float> load_some(const float* p, int64_t n) {
  return (Vector<float>)_mm256_maskload_ps(p, first_lanes(n));
}
SYNCBN_INLINE void store_some(float* p, int64_t n, Vector<float> v) {
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
}
#endif

// Whether those are single instructions, and so faster than a whole vector that crosses what is
// stored before it.
template <class T>
constexpr bool masked = SYNCBN_AVX == 512   ? sizeof(T) >= 4
                        : SYNCBN_AVX == 256 ? std::is_same_v<T, float>
                                            : false;
