// What the loops should give: every output against long double, with room for its rounding.
#pragma once

#include <cstdio>

#include "calls.h"

namespace syncbn::test {

struct Judge {
  const Case& c;
  const char *operation, *set;
  // How well sums are taken; of the short types a thousandth of their own rounding.
  Exact sums = c.dtype == Dtype::float64 ? 1e-13L : c.dtype == Dtype::float32 ? 1e-6L : 4e-6L;
  Exact one = 8 * rounding(arithmetic(c.dtype));  // the rounding of a few operations
  int failures = 0;

  void fail(const char* what) {
    if (++failures == 1)
      std::printf("FAILED %s (%s), %s: %s\n", operation, set, c.name.c_str(), what);
  }
  void close(const char* what, int64_t at, Exact got, Exact expected, Exact tolerance) {
    if (std::fabs(got - expected) <= tolerance || (std::isinf(expected) && got == expected)) return;
    char line[200];
    std::snprintf(line, sizeof line, "%s[%lld]: expected %.17Lg, got %.17Lg, tolerance %.3Lg", what,
                  (long long)at, expected, got, tolerance);
    fail(line);
  }
  Exact weight(int64_t j) const { return c.has_weight ? c.weight.get(j) : 1; }
  // The magnitude of x − shift, where the shift is the mean as the arithmetic has it.
  Exact deviation(Exact x, Exact mean) const {
    return std::fabs(x - mean) + rounding(arithmetic(c.dtype)) * std::fabs(mean);
  }
};

void judge_measure(Judge& j, const Output& o) {
  j.close("count", 0, o.numbers[0], j.c.count, 0);
  for (int64_t k = 0; k < j.c.channels; ++k) {
    const Moments& m = j.c.own[size_t(k)];
    const Errors e(m, j.sums);
    j.close("mean", k, o.numbers[size_t(1 + k)], m.mean, e.mean);
    j.close("M2", k, o.numbers[size_t(1 + j.c.channels + k)], m.m2, e.relative * m.m2 + e.m2);
  }
}

void judge_running(Judge& j, const Output& o, const std::vector<Moments>& expected, Exact sums) {
  const Case& c = j.c;
  const Exact step = c.cumulative ? Exact(1) / Exact(c.batches + 1) : c.momentum;
  const bool moves = c.has_running && expected[0].count > 0;
  for (int64_t k = 0; k < c.channels; ++k) {
    const Moments& m = expected[size_t(k)];
    const Errors e(m, sums);
    const Exact unbiased = m.m2 / std::max<Exact>(m.count - 1, 1);
    auto follows = [&](const char* what, const Array& old, const Array& now, Exact to,
                       Exact error) {
      Exact next = old.get(k) + (moves ? step * (to - old.get(k)) : 0);
      if (std::fabs(next) >= overflow(old.dtype)) next *= INFINITY;
      j.close(what, k, now.get(k), next, moves ? error + 2 * last_place(old.dtype, next) : 0);
    };
    const Exact slack = 1e-15L * std::fabs(c.mean.get(k));
    follows("running_mean", c.mean, o.arrays[1], m.mean, e.mean + slack);
    follows("running_var", c.var, o.arrays[2], unbiased, e.relative * unbiased + e.m2 + 1e-15L);
  }
}

// y, mean, invstd and running statistics, from statistics of which sums are this good.
void judge_output(Judge& j, const Output& o, const std::vector<Moments>& expected, Exact sums) {
  const Case& c = j.c;
  judge_running(j, o, expected, sums);
  j.close("count", 0, o.numbers[size_t(2 * c.channels)], expected[0].count, 0);
  j.close("batches", 0, o.numbers[size_t(2 * c.channels + 1)], c.batches + 1, 0);
  for (int64_t k = 0; k < c.channels; ++k) {
    const Moments& m = expected[size_t(k)];
    const Errors e(m, sums);
    const Exact var = m.m2 / std::max<Exact>(m.count, 1), invstd = 1 / std::sqrt(var + c.eps);
    const Exact relative = e.relative + e.m2 / c.eps + 1e-15L, s = invstd * j.weight(k);
    const Exact bias = c.has_bias ? c.bias.get(k) : 0;
    j.close("mean", k, o.numbers[size_t(k)], m.mean, e.mean);
    j.close("invstd", k, o.numbers[size_t(c.channels + k)], invstd, relative * invstd);
    for (int64_t i = k * c.count; i < (k + 1) * c.count; ++i) {
      const Exact x = c.x.get(i), y = (x - m.mean) * s + bias;
      const Exact size = j.deviation(x, m.mean) * std::fabs(s);
      j.close("y", i, o.arrays[0].get(i), y,
              j.one * (size + std::fabs(bias)) + relative * size + e.mean * std::fabs(s) +
                  last_place(c.dtype, y));
    }
  }
  if (!o.arrays[0].gaps_untouched()) j.fail("writes to gaps of y");
}

void judge_normalise(Judge& j, const Output& o) { judge_output(j, o, j.c.all, 1e-14L); }
void judge_forward(Judge& j, const Output& o) { judge_output(j, o, j.c.own, j.sums); }

struct Totals {
  Exact total = 0, dot = 0, total_error = 0, dot_error = 0;
};

Totals totals(const Judge& j, int64_t k) {
  const Case& c = j.c;
  const Exact mean = c.means[size_t(k)], invstd = c.invstds[size_t(k)];
  Totals t;
  for (int64_t i = k * c.count; i < (k + 1) * c.count; ++i) {
    const Exact dy = c.dy.get(i), x = c.x.get(i);
    t.total += dy, t.dot += dy * (x - mean) * invstd;
    t.total_error += j.sums * std::fabs(dy);
    t.dot_error += j.sums * std::fabs(dy) * j.deviation(x, mean) * invstd;
  }
  return t;
}

void judge_gradient_sums(Judge& j, const Output& o) {
  for (int64_t k = 0; k < j.c.channels; ++k) {
    const Totals t = totals(j, k);
    j.close("sum of dy", k, o.numbers[size_t(k)], t.total, t.total_error);
    j.close("sum of dy·x̂", k, o.numbers[size_t(j.c.channels + k)], t.dot, t.dot_error);
  }
}

void judge_gradient(Judge& j, const Array& dx, int64_t k, Exact n, const Totals& t) {
  const Case& c = j.c;
  const Exact mean = c.means[size_t(k)], invstd = c.invstds[size_t(k)], s = invstd * j.weight(k);
  for (int64_t i = k * c.count; i < (k + 1) * c.count; ++i) {
    const Exact x = c.x.get(i), dy = c.dy.get(i),
                expected = s * (dy - t.total / n - (x - mean) * invstd * t.dot / n);
    const Exact normal = j.deviation(x, mean) * invstd;
    const Exact size = std::fabs(dy) + std::fabs(t.total / n) + normal * std::fabs(t.dot / n);
    const Exact error = j.one * size + t.total_error / n + normal * t.dot_error / n;
    j.close("dx", i, dx.get(i), expected, std::fabs(s) * error + last_place(c.dtype, expected));
  }
}

void judge_input_gradient(Judge& j, const Output& o) {
  const Case& c = j.c;
  for (int64_t k = 0; k < c.channels; ++k)
    judge_gradient(j, o.arrays[0], k, std::max<Exact>(c.all[0].count, 1),
                   {c.sums[size_t(k)], c.sums[size_t(c.channels + k)], 0, 0});
  if (!o.arrays[0].gaps_untouched()) j.fail("writes to gaps of dx");
}

void judge_backward(Judge& j, const Output& o) {
  judge_gradient_sums(j, o);
  for (int64_t k = 0; k < j.c.channels; ++k)
    judge_gradient(j, o.arrays[0], k, j.c.count, totals(j, k));
  if (!o.arrays[0].gaps_untouched()) j.fail("writes to gaps of dx");
}

}  // namespace syncbn::test
