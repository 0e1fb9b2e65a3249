// Arithmetic per channel, all of it in double: how moments merge, and what follows from them.
//
// Included once per instruction set, inside its namespace (see loops.h). These are plain loops,
// which the compiler makes vectors of.

// An array that no other pointer of the function leads to.
template <class T>
using Unshared = T* __restrict;

inline void merge_moments(int64_t channels, double n1, const double* __restrict base,
                          double* __restrict offset, double* __restrict m2, double n2,
                          const double* __restrict mean2, const double* __restrict m22) {
  const Merge merge{n1, n2};
  for (int64_t c = 0; c < channels; ++c) merge.moments(base[c], offset[c], m2[c], mean2[c], m22[c]);
}

// NaN where M2 is infinite: nothing is known of a variance that a double cannot hold.
inline void inverse_deviation(int64_t channels, double count, const double* __restrict m2,
                              double eps, double* __restrict invstd) {
  const double inverse = 1 / (count < 1 ? 1 : count);
  for (int64_t c = 0; c < channels; ++c)
    invstd[c] = 1 / __builtin_sqrt(m2[c] * inverse + eps) + (m2[c] - m2[c]);
}

// Not zero where R cannot hold what the loops compute of a channel: the values' differences from
// the mean, and the factor they are multiplied by, with all its digits. A factor below the smallest
// normal number lacks some of them, which shows where deviations are large (a small invstd).
template <class R>
SYNCBN_INLINE int64_t is_extreme(double mean, double invstd, double factor) {
  if constexpr (sizeof(R) == sizeof(double)) return 0;
  const double far = mean < 0 ? -mean : mean, size = factor < 0 ? -factor : factor;
  const int64_t loses = (size < 0x1p-126 ? 1 : 0) & (size > 0 ? 1 : 0) & (invstd < 0x1p-20 ? 1 : 0);
  return loses | (far > 0x1p100 ? 1 : 0) | (size > 0x1p126 ? 1 : 0);
}

// Makes the scale of extreme channels NaN, which steps/tiles.h looks for.
template <class R, class Extreme>
SYNCBN_INLINE void mark_extreme(int64_t channels, R* scale, Extreme extreme) {
  for (int64_t c = 0; c < channels; ++c)
    if (extreme(c)) scale[c] = R(__builtin_nan(""));
}

// y = (x − mean)·invstd·weight + bias as (x − shift)·scale + offset.
template <class R>
bool forward_coefficients(int64_t channels, const ChannelValues& v, const Coefficients& k) {
  const Unshared<const double> mean = v.mean, invstd = v.invstd, weight = v.weight, bias = v.bias;
  const Unshared<R> shift = k.shifts<R>(), scale = k.scales<R>(), offset = k.offsets<R>();
  int64_t extreme = 0;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    double s = invstd[c] * weight[c];
    extreme |= is_extreme<R>(mean[c], invstd[c], s);
    shift[c] = R(mean[c]);
    scale[c] = R(s);
    offset[c] = R(bias[c] + (double(shift[c]) - mean[c]) * s);
  }
  if (extreme)
    mark_extreme(channels, scale, [&](int64_t c) {
      return is_extreme<R>(mean[c], invstd[c], invstd[c] * weight[c]);
    });
  return !extreme;
}

// dx = weight·invstd·(dy − Σdy/n − x̂·Σ(dy·x̂)/n) as dy·scale + (x − shift)·slope + offset.
template <class R>
bool backward_coefficients(int64_t channels, double count, const ChannelValues& v,
                           const double* __restrict total, const double* __restrict projection,
                           const Coefficients& k) {
  const Unshared<const double> mean = v.mean, invstd = v.invstd, weight = v.weight;
  const Unshared<R> shift = k.shifts<R>(), scale = k.scales<R>(), slope = k.slopes<R>(),
                    offset = k.offsets<R>();
  const double inverse = 1 / (count < 1 ? 1 : count);
  int64_t extreme = 0;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    double s = invstd[c] * weight[c];
    double t = -projection[c] * inverse * invstd[c] * s;
    extreme |= is_extreme<R>(mean[c], invstd[c], s) | is_extreme<R>(mean[c], invstd[c], t);
    shift[c] = R(mean[c]);
    scale[c] = R(s);
    slope[c] = R(t);
    offset[c] = R((double(shift[c]) - mean[c]) * t - total[c] * inverse * s);
  }
  if (extreme)
    mark_extreme(channels, scale, [&](int64_t c) {
      const double s = invstd[c] * weight[c], t = projection[c] * inverse * invstd[c] * s;
      return is_extreme<R>(mean[c], invstd[c], s) | is_extreme<R>(mean[c], invstd[c], t);
    });
  return !extreme;
}

// Whether all numbers are finite, which takes no comparison of each.
SYNCBN_INLINE bool all_finite(int64_t n, const double* numbers) {
  constexpr int64_t w = lanes<double>;
  Vector<double> differences{};  // x − x is zero, and no number where x is not finite
  int64_t j = 0;
  for (; j + w <= n; j += w) differences += load(numbers + j) - load(numbers + j);
  double rest = sum<double>(differences);
  for (; j < n; ++j) rest += numbers[j] - numbers[j];
  return rest == 0;
}

template <class R>
void round_means(int64_t channels, const double* __restrict mean, void* shift) {
  const Unshared<R> to = static_cast<R*>(shift);
  for (int64_t c = 0; c < channels; ++c) to[c] = R(mean[c]);
}

// Σdy·(x − shift), with the shift of round_means, becomes Σdy·x̂.
template <class R>
void project(int64_t channels, const ChannelValues& v, const double* __restrict total,
             double* __restrict dot) {
  const Unshared<const double> mean = v.mean, invstd = v.invstd;
  for (int64_t c = 0; c < channels; ++c)
    dot[c] = (dot[c] + (double(R(mean[c])) - mean[c]) * total[c]) * invstd[c];
}
