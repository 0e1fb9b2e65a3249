// Sums that no split of their terms changes: method, proof and shapes in src/syncbn/numerics/reproducible.py.
//
// Included once per instruction set, inside its namespace; plain loops over columns. All is double,
// and every operation rounds by itself: a sum must not swallow the rounding of a product before it.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

constexpr double slice_bits = 28;

using Doubles = Vector<double>;
using Words = VectorOf<double>::bits;

// A double of this size has a whole number in its last bits.
constexpr double whole = 0x1p52;

SYNCBN_INLINE Doubles power_of_two(Doubles exponent) {
  return bit_cast<Doubles>(bit_cast<Words>(exponent + (whole + 1023)) << 52);
}

// The place of the highest slice of a term of this size.
SYNCBN_INLINE Doubles top_of(Doubles size) {
  const Words exponent = bit_cast<Words>(size) >> 52 | bit_cast<Words>(broadcast(whole));
  const Doubles places = (bit_cast<Doubles>(exponent) - (whole + 1023)) / slice_bits;
  const Doubles cut = truncated(places), top = cut > places ? cut - 1 : cut;  // rounded down
  return top < lowest_top ? broadcast(lowest_top) : top;
}

template <class R>
SYNCBN_INLINE void two_sum(R a, R b, R& sum, R& error) {
  sum = a + b;
  const R share = sum - a;
  error = (a - (sum - share)) + (b - share);
}

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

// The representations of neighbouring columns' sums: how far the first n reach.
struct Sum {
  Doubles top, slice[slices], odd;

  static SYNCBN_INLINE Sum at(const double* p, int64_t stride, int64_t n) {
    Sum s{some(p, n), {}, some(p + (1 + slices) * stride, n)};
    for (int64_t k = 0; k < slices; ++k) s.slice[k] = some(p + (1 + k) * stride, n);
    return s;
  }
  SYNCBN_INLINE void to(double* p, int64_t stride, int64_t n) const {
    put(p, n, top);
    for (int64_t k = 0; k < slices; ++k) put(p + (1 + k) * stride, n, slice[k]);
    put(p + (1 + slices) * stride, n, odd);
  }
  static SYNCBN_INLINE Doubles some(const double* p, int64_t n) {
    return n == lanes<double> ? load(p) : load_some(p, n);
  }
  static SYNCBN_INLINE void put(double* p, int64_t n, Doubles v) {
    n == lanes<double> ? store(p, v) : store_some(p, n, v);
  }

  // Slice k below another top.
  SYNCBN_INLINE Doubles below(Doubles other, int64_t k) const {
    const Doubles place = double(k) - (other - top);
    Doubles found = {};
    for (int64_t own = 0; own <= k; ++own) found = place == double(own) ? slice[own] : found;
    return found;
  }
  SYNCBN_INLINE void unite(const Sum& more) {
    const Doubles highest = top > more.top ? top : more.top;
    for (int64_t k = slices - 1; k >= 0; --k)
      slice[k] = below(highest, k) + more.below(highest, k);
    top = highest;
    odd += more.odd;
  }
};

// Of `rows` rows of terms, `apart` numbers apart.
SYNCBN_INLINE Sum represent(const double* terms, int64_t rows, int64_t apart, int64_t n) {
  Sum sum{};
  Doubles largest = {};
  for (int64_t r = 0; r < rows; ++r) {
    const Doubles term = Sum::some(terms + r * apart, n), size = term < 0 ? -term : term;
    const Doubles finite = term - term == 0 ? size : Doubles{};
    sum.odd += term - term == 0 ? Doubles{} : term;
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
    const Doubles term = Sum::some(terms + r * apart, n);
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
    Sum sum = Sum::at(into + j, stride, n);
    sum.unite(represent(terms + j, rows, columns, n));
    sum.to(into + j, stride, n);
  });
}

inline void unite(int64_t columns, const double* from, double* into, int64_t stride) {
  for_columns(columns, [&](int64_t j, int64_t n) SYNCBN_LAMBDA {
    Sum sum = Sum::at(into + j, stride, n);
    sum.unite(Sum::at(from + j, stride, n));
    sum.to(into + j, stride, n);
  });
}

inline void total(const double* received, int64_t sets, int64_t apart, int64_t columns,
                  double* high, double* low) {
  for_columns(columns, [&](int64_t j, int64_t n) SYNCBN_LAMBDA {
    Sum all = Sum::at(received + j, columns, n);
    for (int64_t s = 1; s < sets; ++s) all.unite(Sum::at(received + s * apart + j, columns, n));
    Doubles sum = all.odd, rest = {};
    for (int64_t k = 0; k < slices; ++k) {
      Doubles error;
      two_sum(sum, all.slice[k] * power_of_two(slice_bits * (all.top - double(k))), sum, error);
      rest += error;
    }
    Sum::put(high + j, n, sum);
    Sum::put(low + j, n, sum - sum == 0 ? rest : Doubles{});
  });
}

inline void squares(int64_t count, const double* __restrict values, double* __restrict squares,
                    double* __restrict errors) {
  for (int64_t j = 0; j < count; ++j) two_product(values[j], values[j], squares[j], errors[j]);
}

// The terms of a sample's moments in `some` channels: two rows of Σ n·mean, four of
// Σ (M2 + n·mean²).
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

// mean and M2 of `count` values from Σ n·mean and Σ (M2 + n·mean²), as high + low.
// Σ(x − m)² = Σx² − m·(2·Σx − n·m) for any m, here the mean rounded to a double.
inline void moments_of_sums(int64_t channels, double count, const double* first,
                            const double* first_low, const double* second,
                            const double* second_low, double* mean, double* m2) {
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
