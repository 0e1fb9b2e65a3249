// Vectors of the arithmetic's type.
//
// Included once per instruction set, inside its namespace (see loops.h); SYNCBN_VECTOR_BYTES is
// the width of its registers. GCC and Clang compile the vector extension to plain instructions.

template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
};
template <class R>
using Vector = typename VectorOf<R>::type;
using Bits = VectorOf<float>::bits;
typedef uint16_t Shorts __attribute__((vector_size(SYNCBN_VECTOR_BYTES / 2)));

template <class R>
constexpr int64_t lanes = SYNCBN_VECTOR_BYTES / sizeof(R);

// A number as a type, for loops whose length the compiler knows.
template <int64_t n>
struct Count {
  static constexpr int64_t value = n;
};

template <class To, class From>
SYNCBN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class R>
SYNCBN_INLINE Vector<R> broadcast(R value) {
  return value - Vector<R>{};
}

// Rounded towards zero; |v| < 2⁵¹.
SYNCBN_INLINE Vector<double> truncated(Vector<double> v) {
#if SYNCBN_AVX == 512
  return (Vector<double>)_mm512_roundscale_pd((__m512d)v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif SYNCBN_AVX == 256
  return (Vector<double>)_mm256_round_pd((__m256d)v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
  const Vector<double> size = v < 0 ? -v : v, near = (size + 0x1p52) - 0x1p52;
  const Vector<double> cut = near > size ? near - 1 : near;
  return v < 0 ? -cut : cut;
#endif
}

// The first n elements of v, and those of `rest` in the other lanes.
template <class R>
SYNCBN_INLINE Vector<R> first_or(Vector<R> v, int64_t n, Vector<R> rest) {
  Vector<R> index;
  for (int64_t i = 0; i < lanes<R>; ++i) index[i] = R(i);
  return index < broadcast(R(n)) ? v : rest;
}

// The last n elements of v, and those of `rest` in the other lanes.
template <class R>
SYNCBN_INLINE Vector<R> last_or(Vector<R> v, int64_t n, Vector<R> rest) {
  return first_or<R>(rest, lanes<R> - n, v);
}

// The sum of a vector's elements, halving it until two are left.
template <class R, int bytes>
struct Halves {
  typedef R Whole __attribute__((vector_size(bytes)));
  typedef R Half __attribute__((vector_size(bytes / 2)));
  static SYNCBN_INLINE R sum(const Whole& v) {
    if constexpr (bytes == 2 * sizeof(R)) {
      return v[0] + v[1];
    } else {
      Half low, high;
      __builtin_memcpy(&low, &v, sizeof(low));
      __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
      return Halves<R, bytes / 2>::sum(low + high);
    }
  }
};
template <class R>
SYNCBN_INLINE R sum(const Vector<R>& v) {
  return Halves<R, SYNCBN_VECTOR_BYTES>::sum(v);
}

// Two vectors.
template <class R>
struct Pair {
  Vector<R> a, b;
};

template <class R, int... i>
SYNCBN_INLINE Vector<R> shuffled(const Vector<R>& a, const Vector<R>& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, i...);
#else  // Clang's name for it came with GCC 12
  return __builtin_shuffle(a, b, typename VectorOf<R>::bits{i...});
#endif
}
template <class R, int... i>
SYNCBN_INLINE Pair<R> split(const Pair<R>& v, std::integer_sequence<int, i...>) {
  return {shuffled<R, 2 * i...>(v.a, v.b), shuffled<R, 2 * i + 1 ...>(v.a, v.b)};
}
// The even elements of both, then the odd ones.
template <class R>
SYNCBN_INLINE Pair<R> split(const Pair<R>& v) {
  return split<R>(v, std::make_integer_sequence<int, lanes<R>>{});
}

// The sums of the elements of each of n vectors, in lanes/n parts, in the order of the vectors.
template <class R, int64_t n = lanes<R>>
SYNCBN_INLINE Vector<R> sums(const Vector<R>* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    const Pair<R> parts = split(Pair<R>{sums<R, n / 2>(v), sums<R, n / 2>(v + n / 2)});
    return parts.a + parts.b;
  }
}
