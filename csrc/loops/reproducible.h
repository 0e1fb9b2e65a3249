// Sums that no split of their terms changes. The method and its proof stand in
// src/syncbn/numerics/reproducible.py.
//
// Included once per instruction set, inside its namespace (see loops.h). All is double, and the
// compiler must round every operation by itself, never a product and a sum at once: the errors
// below are those of separate roundings.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

constexpr double slice_bits = 28;

using Doubles = Vector<double>;
using Words = VectorOf<double>::bits;

// Added to a small whole number, this gives a double whose last bits are that number.
constexpr double whole = 0x1p52;

SYNCBN_INLINE Doubles power_of_two(Doubles exponent) {
  return bit_cast<Doubles>(bit_cast<Words>(exponent + (whole + 1023)) << 52);
}

// The place of the highest slice that a term of this size has.
SYNCBN_INLINE Doubles top_of(Doubles size) {
  const Words exponent = bit_cast<Words>(size) >> 52 | bit_cast<Words>(broadcast(whole));
  const Doubles places = (bit_cast<Doubles>(exponent) - (whole + 1023)) / slice_bits;
  const Doubles cut = truncated(places), top = cut > places ? cut - 1 : cut;  // rounded down
  return top < lowest_top ? broadcast(lowest_top) : top;
}

// a + b, rounded, and the rounding's error (Knuth).
template <class R>
SYNCBN_INLINE void two_sum(R a, R b, R& sum, R& error) {
  sum = a + b;
  const R share = sum - a;
  error = (a - (sum - share)) + (b - share);
}

// a·b, rounded, and the rounding's error (Dekker where there is no instruction for it).
SYNCBN_INLINE void two_product(double a, double b, double& product, double& error) {
  product = a * b;
#if defined(__FMA__) || defined(__FP_FAST_FMA)
  error = __builtin_fma(a, b, -product);
#else
  const double sa = a * 134217729.0, sb = b * 134217729.0;  // 2²⁷ + 1
  const double ah = sa - (sa - a), bh = sb - (sb - b), al = a - ah, bl = b - bh;
  error = ((ah * bh - product) + ah * bl + al * bh) + al * bl;
#endif
  if (!(error - error == 0)) error = 0;
}

// The sums of neighbouring columns, one per lane, as slices: see accumulator_rows in types.h. Only
// the first n lanes are read from memory and written to it.
struct Accumulator {
  Doubles top, slice[slices], nonfinite;

  static SYNCBN_INLINE Accumulator at(const double* p, int64_t stride, int64_t n) {
    Accumulator s{load_columns(p, n), {}, load_columns(p + (1 + slices) * stride, n)};
    for (int64_t k = 0; k < slices; ++k) s.slice[k] = load_columns(p + (1 + k) * stride, n);
    return s;
  }
  SYNCBN_INLINE void to(double* p, int64_t stride, int64_t n) const {
    store_columns(p, n, top);
    for (int64_t k = 0; k < slices; ++k) store_columns(p + (1 + k) * stride, n, slice[k]);
    store_columns(p + (1 + slices) * stride, n, nonfinite);
  }
  static SYNCBN_INLINE Doubles load_columns(const double* p, int64_t n) {
    return n == lanes<double> ? load(p) : load_some(p, n);
  }
  static SYNCBN_INLINE void store_columns(double* p, int64_t n, Doubles v) {
    n == lanes<double> ? store(p, v) : store_some(p, n, v);
  }

  // The slice that is number k from another top down; zero where this sum has none there.
  SYNCBN_INLINE Doubles slice_below(Doubles other, int64_t k) const {
    const Doubles place = double(k) - (other - top);
    Doubles found = {};
    for (int64_t own = 0; own <= k; ++own) found = place == double(own) ? slice[own] : found;
    return found;
  }
  SYNCBN_INLINE void unite(const Accumulator& more) {
    const Doubles highest = top > more.top ? top : more.top;
    for (int64_t k = slices - 1; k >= 0; --k)
      slice[k] = slice_below(highest, k) + more.slice_below(highest, k);
    top = highest;
    nonfinite += more.nonfinite;
  }
};

// The sum of `rows` rows of terms, which lie `stride` numbers apart.
SYNCBN_INLINE Accumulator to_accumulator(const double* terms, int64_t rows, int64_t stride,
                                         int64_t n) {
  Accumulator sum{};
  Doubles largest = {};
  for (int64_t r = 0; r < rows; ++r) {
    const Doubles term = Accumulator::load_columns(terms + r * stride, n),
                  size = term < 0 ? -term : term;
    const Doubles finite = term - term == 0 ? size : Doubles{};
    sum.nonfinite += term - term == 0 ? Doubles{} : term;
    largest = finite > largest ? finite : largest;
  }
  sum.top = top_of(largest);
  Doubles up[slices], down[slices];
  for (int64_t k = 0; k < slices; ++k) {
    const Doubles bits = slice_bits * (sum.top - double(k));
    up[k] = power_of_two(bits);
    down[k] = power_of_two(-bits);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Doubles term = Accumulator::load_columns(terms + r * stride, n);
    Doubles rest = term - term == 0 ? term : Doubles{};
    for (int64_t k = 0; k < slices; ++k) {
      const Doubles slice = truncated(rest * down[k]);
      rest -= slice * up[k];
      sum.slice[k] += slice;
    }
  }
  return sum;
}

template <class Body>
SYNCBN_INLINE void for_columns(int64_t columns, Body body) {
  constexpr int64_t w = lanes<double>;
  int64_t j = 0;
  for (; j + w <= columns; j += w) body(j, w);
  if (j < columns) body(j, columns - j);
}

inline void add(const double* terms, int64_t rows, int64_t columns, double* into, int64_t stride) {
  for_columns(columns, [&](int64_t j, int64_t n) SYNCBN_LAMBDA {
    Accumulator sum = Accumulator::at(into + j, stride, n);
    sum.unite(to_accumulator(terms + j, rows, columns, n));
    sum.to(into + j, stride, n);
  });
}

inline void unite(int64_t columns, const double* from, double* into, int64_t stride) {
  for_columns(columns, [&](int64_t j, int64_t n) SYNCBN_LAMBDA {
    Accumulator sum = Accumulator::at(into + j, stride, n);
    sum.unite(Accumulator::at(from + j, stride, n));
    sum.to(into + j, stride, n);
  });
}

inline void finalise(const double* received, int64_t sets, int64_t stride, int64_t columns,
                     double* high, double* low) {
  for_columns(columns, [&](int64_t j, int64_t n) SYNCBN_LAMBDA {
    Accumulator all = Accumulator::at(received + j, columns, n);
    for (int64_t s = 1; s < sets; ++s)
      all.unite(Accumulator::at(received + s * stride + j, columns, n));
    Doubles sum = all.nonfinite, rest = {};
    for (int64_t k = 0; k < slices; ++k) {
      Doubles error;
      two_sum(sum, all.slice[k] * power_of_two(slice_bits * (all.top - double(k))), sum, error);
      rest += error;
    }
    Accumulator::store_columns(high + j, n, sum);
    Accumulator::store_columns(low + j, n, sum - sum == 0 ? rest : Doubles{});
  });
}

inline void squares(int64_t count, const double* __restrict values, double* __restrict squares,
                    double* __restrict errors) {
  for (int64_t j = 0; j < count; ++j) two_product(values[j], values[j], squares[j], errors[j]);
}

// What a sample adds to the sums of moments, as terms that are doubles: two rows of `some` channels
// whose sum is n·mean, and four rows whose sum is M2 + n·mean².
inline void moment_terms(int64_t some, double n, const double* __restrict mean,
                         const double* __restrict m2, double* __restrict firsts,
                         double* __restrict seconds) {
  for (int64_t c = 0; c < some; ++c) {
    double sum, sum_low, square, square_low;
    two_product(n, mean[c], sum, sum_low);
    two_product(sum, mean[c], square, square_low);
    firsts[c] = sum;
    firsts[some + c] = sum_low;
    seconds[c] = square;
    seconds[some + c] = square_low;
    seconds[2 * some + c] = square - square == 0 ? sum_low * mean[c] : 0;  // never ∞ − ∞
    seconds[3 * some + c] = m2[c];
  }
}

// mean and M2 of `count` values from Σ n·mean (first) and Σ (M2 + n·mean²) (second), each given as
// a double and what it lacks. Σ(x − m)² = Σx² − m·(2·Σx − n·m) for any m, here the mean rounded to
// a double.
inline void moments_of_sums(int64_t channels, double count, const double* first,
                            const double* first_low, const double* second, const double* second_low,
                            double* mean, double* m2) {
  const double n = count < 1 ? 1 : count;
  for (int64_t c = 0; c < channels; ++c) {
    const double m = (first[c] + first_low[c]) / n;
    double product, product_low, inner, inner_low, outer, outer_low, square, square_low;
    two_product(n, m, product, product_low);
    two_sum(2 * first[c], -product, inner, inner_low);
    inner_low += 2 * first_low[c] - product_low;
    two_product(m, inner, outer, outer_low);
    two_sum(second[c], -outer, square, square_low);
    square_low += second_low[c] - outer_low - m * inner_low;
    const double sum = second[c] - second[c] == 0 ? square + square_low : second[c] + (m - m);
    mean[c] = m;
    m2[c] = sum < 0 ? 0 : sum;
  }
}

#ifndef __clang__
#pragma GCC pop_options
#endif
