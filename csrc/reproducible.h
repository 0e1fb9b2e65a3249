// Sums that no split of their terms changes: method, proof and shapes in src/syncbn/reproducible.py.
//
// Included once per instruction set, inside its namespace; plain loops over columns. All is double,
// and every operation rounds by itself: a sum must not swallow the rounding of a product before it.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

constexpr int64_t slice_bits = 28, slices = 4, lowest_top = -31;
constexpr int64_t represented = 1 + slices + 1;  // top, slices, the sum of what is not finite

SYNCBN_INLINE double power_of_two(double exponent) {
  return bit_cast<double>(uint64_t(int64_t(exponent) + 1023) << 52);
}

// The place of the highest slice of |value|.
SYNCBN_INLINE double top_of(double value) {
  if (!(value > 0)) return lowest_top;
  const int64_t exponent = int64_t(bit_cast<uint64_t>(value) >> 52) - 1023;  // value ≥ 2^exponent
  const int64_t top = (exponent + 64 * slice_bits) / slice_bits - 64;        // rounded down
  return double(top < lowest_top ? lowest_top : top);
}

SYNCBN_INLINE void two_sum(double a, double b, double& sum, double& error) {
  sum = a + b;
  const double share = sum - a;
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

// The representation of the sums over `rows` rows of terms, which it uses up: rows of `columns`
// numbers, `stride` apart.
inline void represent(double* terms, int64_t rows, int64_t columns, double* result,
                      int64_t stride) {
  constexpr int64_t block = 128;  // columns at a time
  for (int64_t begin = 0; begin < columns; begin += block) {
    const int64_t some = columns - begin < block ? columns - begin : block;
    double top[block] = {}, odd[block] = {}, sum[block], up[block], down[block];
    for (int64_t r = 0; r < rows; ++r) {
      double* __restrict t = terms + r * columns + begin;
      for (int64_t j = 0; j < some; ++j) {
        const double value = t[j], finite = value - value == 0 ? value : 0;
        odd[j] += value - value == 0 ? 0 : value;
        t[j] = finite;
        const double size = __builtin_fabs(finite);
        top[j] = size > top[j] ? size : top[j];
      }
    }
    double* to = result + begin;
    for (int64_t j = 0; j < some; ++j) to[j] = top[j] = top_of(top[j]);
    for (int64_t place = 0; place < slices; ++place) {
      for (int64_t j = 0; j < some; ++j) {
        const double bits = slice_bits * (top[j] - double(place));
        up[j] = power_of_two(bits);
        down[j] = power_of_two(-bits);
        sum[j] = 0;
      }
      for (int64_t r = 0; r < rows; ++r) {
        double* __restrict t = terms + r * columns + begin;
        for (int64_t j = 0; j < some; ++j) {
          const double slice = __builtin_trunc(t[j] * down[j]);
          t[j] -= slice * up[j];
          sum[j] += slice;
        }
      }
      to += stride;
      for (int64_t j = 0; j < some; ++j) to[j] = sum[j];
    }
    to += stride;
    for (int64_t j = 0; j < some; ++j) to[j] = odd[j];
  }
}

// The sums that `sets` representations, `stride` doubles apart, stand for: high + low.
inline void total(const double* received, int64_t sets, int64_t stride, int64_t columns,
                  double* __restrict high, double* __restrict low) {
  for (int64_t j = 0; j < columns; ++j) {
    double top = lowest_top, sum = 0, rest = 0;
    for (int64_t s = 0; s < sets; ++s) {
      const double* set = received + s * stride;
      sum += set[(represented - 1) * columns + j];
      if (set[j] > top) top = set[j];
    }
    for (int64_t place = 0; place < slices; ++place) {
      double whole = 0;
      for (int64_t s = 0; s < sets; ++s) {
        const double* set = received + s * stride;
        const int64_t own = place - int64_t(top - set[j]);  // where the set keeps this slice
        if (own >= 0) whole += set[(1 + own) * columns + j];
      }
      double error;
      two_sum(sum, whole * power_of_two(slice_bits * (top - double(place))), sum, error);
      rest += error;
    }
    high[j] = sum;
    low[j] = sum - sum == 0 ? rest : 0;
  }
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
    seconds[2 * some + c] = sum_low * mean[c];
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
    const double sum = square + square_low;
    mean[c] = m;
    m2[c] = sum < 0 ? 0 : sum;
  }
}

#ifndef __clang__
#pragma GCC pop_options
#endif
