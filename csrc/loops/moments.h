// Per-channel arithmetic, all in double: how moments merge and what follows from them.
//
// Included once per instruction set, inside its namespace; plain loops over channels.
//
// Sets merge by the formula of Chan, Golub & LeVeque (1979): n = n₁+n₂, δ = m₂−m₁,
// m = m₁ + δ·n₂/n, M2 = M2₁ + M2₂ + δ²·n₁n₂/n.

// Means are kept as offsets from a base near them, the first set's, until the last set is in: at a
// mean of 10⁶ standard deviations each merge would otherwise round away six digits of what it adds.
// Only a base that is finite: what infinity minus itself is would be in the way of the formula.

struct Merge {
  double inverse2, keep, weight, product;  // 1/n₂, n₁/n, n₂/n, n₁n₂/n

  Merge(double n1, double n2)
      : inverse2(1 / n2), keep(n1 / (n1 + n2)), weight(n2 / (n1 + n2)), product(n1 * weight) {}

  // Adds to (base + offset, M2) of n₁ values those of n₂ more.
  SYNCBN_INLINE void moments(double base, double& offset, double& m2, double mean2,
                             double m22) const {
    const double offset2 = mean2 - base, delta = offset2 - offset;
    offset = offset * keep + offset2 * weight;  // an infinite one stays
    m2 += m22 + delta * delta * product;
  }
  // The same for n₂ values of which Σ(x − shift) and Σ(x − shift)² are known.
  SYNCBN_INLINE void sums(double base, double& offset, double& m2, double shift, double s1,
                          double s2) const {
    const double average = s1 * inverse2, within = s2 - s1 * average;
    const double delta = ((shift - base) - offset) + average;
    offset += delta * weight;
    m2 += (within < 0 ? 0 : within) + delta * delta * product;
  }
};

inline void merge_moments(int64_t channels, double n1, const double* __restrict base,
                          double* __restrict offset, double* __restrict m2, double n2,
                          const double* __restrict mean2, const double* __restrict m22) {
  const Merge merge{n1, n2};
  for (int64_t c = 0; c < channels; ++c) merge.moments(base[c], offset[c], m2[c], mean2[c], m22[c]);
}

// NaN where M2 is infinite: nothing is known of values that are past what it can hold.
inline void inverse_deviation(int64_t channels, double count, const double* __restrict m2,
                              double eps, double* __restrict invstd) {
  const double inverse = 1 / (count < 1 ? 1 : count);
  for (int64_t c = 0; c < channels; ++c)
    invstd[c] = 1 / __builtin_sqrt(m2[c] * inverse + eps) + (m2[c] - m2[c]);
}

// Zero if the arithmetic on R holds what becomes of a channel: values' differences from the mean,
// and a factor with all its digits. A small one loses some, which shows where values are large.
template <class R>
SYNCBN_INLINE int64_t extreme(double mean, double invstd, double factor) {
  if constexpr (sizeof(R) == sizeof(double)) return 0;
  const double far = mean < 0 ? -mean : mean, size = factor < 0 ? -factor : factor;
  const int64_t loses = (size < 0x1p-126 ? 1 : 0) & (size > 0 ? 1 : 0) & (invstd < 0x1p-20 ? 1 : 0);
  return loses | (far > 0x1p100 ? 1 : 0) | (size > 0x1p126 ? 1 : 0);
}

// Makes the scale of extreme channels NaN.
template <class R, class Extreme>
SYNCBN_INLINE void mark(int64_t channels, R* scale, Extreme extreme) {
  for (int64_t c = 0; c < channels; ++c)
    if (extreme(c)) scale[c] = R(__builtin_nan(""));
}

// y = (x − mean)·invstd·weight + bias as (x − shift)·scale + offset.
template <class R>
bool forward_coefficients(int64_t channels, const ChannelValues& v, const Coefficients& k) {
  const double *__restrict mean = v.mean, *__restrict invstd = v.invstd,
               *__restrict weight = v.weight, *__restrict bias = v.bias;
  R *__restrict shift = k.shifts<R>(), *__restrict scale = k.scales<R>(),
    *__restrict offset = k.offsets<R>();
  int64_t odd = 0;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    double s = invstd[c] * weight[c];
    odd |= extreme<R>(mean[c], invstd[c], s);
    shift[c] = R(mean[c]);
    scale[c] = R(s);
    offset[c] = R(bias[c] + (double(shift[c]) - mean[c]) * s);
  }
  if (odd)
    mark(channels, scale, [&](int64_t c) {
      return extreme<R>(mean[c], invstd[c], invstd[c] * weight[c]);
    });
  return !odd;
}

// dx = weight·invstd·(dy − Σdy/n − x̂·Σ(dy·x̂)/n) as dy·scale + (x − shift)·slope + offset.
template <class R>
bool backward_coefficients(int64_t channels, double count, const ChannelValues& v,
                           const double* __restrict total, const double* __restrict projection,
                           const Coefficients& k) {
  const double *__restrict mean = v.mean, *__restrict invstd = v.invstd,
               *__restrict weight = v.weight;
  R *__restrict shift = k.shifts<R>(), *__restrict scale = k.scales<R>(),
    *__restrict slope = k.slopes<R>(), *__restrict offset = k.offsets<R>();
  const double inverse = 1 / (count < 1 ? 1 : count);
  int64_t odd = 0;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    double s = invstd[c] * weight[c];
    double t = -projection[c] * inverse * invstd[c] * s;
    odd |= extreme<R>(mean[c], invstd[c], s) | extreme<R>(mean[c], invstd[c], t);
    shift[c] = R(mean[c]);
    scale[c] = R(s);
    slope[c] = R(t);
    offset[c] = R((double(shift[c]) - mean[c]) * t - total[c] * inverse * s);
  }
  if (odd)
    mark(channels, scale, [&](int64_t c) {
      const double s = invstd[c] * weight[c], t = projection[c] * inverse * invstd[c] * s;
      return extreme<R>(mean[c], invstd[c], s) | extreme<R>(mean[c], invstd[c], t);
    });
  return !odd;
}

// Whether all numbers are finite.
SYNCBN_INLINE bool all_finite(int64_t n, const double* numbers) {
  constexpr int64_t w = lanes<double>;
  Vector<double> odd{};  // of x − x, which is no number where x is not finite
  int64_t j = 0;
  for (; j + w <= n; j += w) odd += load(numbers + j) - load(numbers + j);
  double rest = sum<double>(odd);
  for (; j < n; ++j) rest += numbers[j] - numbers[j];
  return rest == 0;
}

template <class R>
void shifts(int64_t channels, const double* __restrict mean, void* shift) {
  R* __restrict to = static_cast<R*>(shift);
  for (int64_t c = 0; c < channels; ++c) to[c] = R(mean[c]);
}

// Σdy·(x − shift), with the shift above, becomes Σdy·x̂.
template <class R>
void project(int64_t channels, const ChannelValues& v, const double* __restrict total,
             double* __restrict dot) {
  const double *__restrict mean = v.mean, *__restrict invstd = v.invstd;
  for (int64_t c = 0; c < channels; ++c)
    dot[c] = (dot[c] + (double(R(mean[c])) - mean[c]) * total[c]) * invstd[c];
}
