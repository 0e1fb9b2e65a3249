// How the moments of two sets become those of their union.
//
// Included once per instruction set, inside its namespace (see loops.h), and by plan/partial.h.

// The formula of Chan, Golub & LeVeque (1979): n = n₁+n₂, δ = m₂−m₁, m = m₁ + δ·n₂/n,
// M2 = M2₁ + M2₂ + δ²·n₁n₂/n.
//
// Until the last set is in, a mean is kept as an offset from a base near it, the first set's mean:
// at a mean of 10⁶ standard deviations each merge would otherwise round away six digits of what it
// adds. A base must be finite, as infinity minus itself is no number.
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
