// Random shapes, layouts and values through every loop, compared with long double, without torch.
// Usage: test_loops [seed] [cases]. Built with sanitizers by `make test-native`.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "cases.h"
#include "isa.h"
#include "local.h"

namespace syncbn::test {

// --- threads ---------------------------------------------------------------------------------

template <int64_t threads>
void on_threads(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
  const int64_t parts = std::min(threads, ceil_div(end - begin, grain));
  const int64_t part = ceil_div(end - begin, parts);
  std::vector<std::thread> running;
  for (int64_t b = begin; b < end; b += part)
    running.emplace_back(body, b, std::min(b + part, end), context);
  for (std::thread& t : running) t.join();
}
const Parallel serial{nullptr, 1};  // one thread calls no run
const Parallel parallels[] = {{on_threads<2>, 2}, {on_threads<3>, 3}, {on_threads<7>, 7}};

// --- the six operations, called as register.cpp calls them --------------------------------------

struct Output {
  std::vector<double> numbers;
  std::vector<Array> arrays;

  bool operator==(const Output& other) const {
    const size_t bytes = numbers.size() * sizeof(double);
    bool same = bytes == 0 || std::memcmp(numbers.data(), other.numbers.data(), bytes) == 0;
    for (size_t k = 0; k < arrays.size(); ++k) same = same && arrays[k].memory == other.arrays[k].memory;
    return same;
  }
};

struct Call {
  const Case& c;
  const Loopset& set;
  const Parallel& parallel;
};

struct Problem {
  View views[3];
  Work work;
};

bool fit(const std::vector<Array*>& arrays, View* views, Layout* layout) {
  Strided strided[3];
  for (size_t t = 0; t < arrays.size(); ++t) strided[t] = {arrays[t]->data(), arrays[t]->strides.data()};
  return make_views(arrays[0]->dims(), arrays[0]->sizes.data(), strided, int(arrays.size()), views, layout);
}

// Of x first, then dy and the result where there are such; copies of what fits no loop.
Problem make_problem(const Loopset& set, std::vector<Array*> arrays, Array* dy, Array* result) {
  Problem p;
  Layout layout;
  if (!fit(arrays, p.views, &layout)) {
    Array& x = *arrays[0];
    Sizes strides(x.sizes.size());
    strides_like(x.dims(), x.sizes.data(), x.strides.data(), strides.data());
    if (result) *result = Array(x.dtype, x.sizes, strides, 0);
    if (dy) *dy = copied(*dy, strides);
    if (!fit(arrays, p.views, &layout)) x = copied(x, strides);
    if (!fit(arrays, p.views, &layout)) std::abort();
  }
  p.work = make_work(set, arrays[0]->dtype, layout, p.views, int(arrays.size()));
  return p;
}

Parameter parameter(bool given, Array& a) {
  return given ? Parameter{a.data(), a.dtype, a.strides[0]} : Parameter{};
}

struct Followed {
  Array mean, var, weight, bias;
  int64_t batches;

  explicit Followed(const Case& c)
      : mean(c.mean), var(c.var), weight(c.weight), bias(c.bias), batches(c.batches) {}
  Running running(const Case& c) {
    return {parameter(c.has_running, mean), parameter(c.has_running, var), &batches, c.cumulative, c.momentum};
  }
  Affine affine(const Case& c) { return {parameter(c.has_weight, weight), parameter(c.has_bias, bias)}; }
};

Output run_measure(const Call& k) {
  Array x = k.c.x;
  Output o{std::vector<double>(size_t(1 + 2 * k.c.channels)), {}};
  const Problem p = make_problem(k.set, {&x}, nullptr, nullptr);
  measure(k.parallel, p.work, p.views[0], o.numbers.data());
  return o;
}

Output run_normalise(const Call& k) {
  const Case& c = k.c;
  Array x = c.x, y = c.like;
  Followed f(c);
  std::vector<double> out(size_t(2 * c.channels + 2)), m2(size_t(c.channels), 0);
  double *mean = out.data(), *invstd = mean + c.channels;
  const ChannelLoops& loops = k.set.channels[int(c.dtype)];
  const int64_t sets = (int64_t(c.sets.size()) + c.row - 1 - 2 * c.channels) / c.row;
  const double count = merge_sets(c.sets.data(), sets, c.row, c.channels, loops, mean, m2.data());
  follow(loops, c.channels, count, mean, m2.data(), f.running(c), c.eps, invstd);
  if (c.count > 0) {
    const Problem p = make_problem(k.set, {&x, &y}, nullptr, &y);
    normalise(k.parallel, p.work, p.views[0], p.views[1], f.affine(c), {count, mean, invstd});
  }
  out[size_t(2 * c.channels)] = count, out[size_t(2 * c.channels + 1)] = double(f.batches);
  return {out, {y, f.mean, f.var}};
}

Output run_gradient_sums(const Call& k) {
  Array x = k.c.x, dy = k.c.dy;
  Output o{std::vector<double>(size_t(2 * k.c.channels)), {}};
  const Problem p = make_problem(k.set, {&x, &dy}, &dy, nullptr);
  gradient_sums(k.parallel, p.work, p.views[1], p.views[0], k.c.means.data(), k.c.invstds.data(), o.numbers.data());
  return o;
}

Output run_input_gradient(const Call& k) {
  const Case& c = k.c;
  Array x = c.x, dy = c.dy, dx = c.like, weight = c.weight;
  const Problem p = make_problem(k.set, {&x, &dy, &dx}, &dy, &dx);
  std::vector<double> means = c.means, invstds = c.invstds;
  input_gradient(k.parallel, p.work, p.views[1], p.views[0], p.views[2], parameter(c.has_weight, weight),
                 {double(c.all[0].count), means.data(), invstds.data()}, c.sums.data());
  return {{}, {dx}};
}

Output run_forward(const Call& k) {
  const Case& c = k.c;
  Array x = c.x, y = c.like;
  Followed f(c);
  std::vector<double> out(size_t(2 * c.channels + 2));
  const Problem p = make_problem(k.set, {&x, &y}, nullptr, &y);
  forward(k.parallel, p.work, p.views[0], p.views[1], f.affine(c), f.running(c), c.eps, out.data(),
          out.data() + c.channels);
  out[size_t(2 * c.channels)] = double(c.count), out[size_t(2 * c.channels + 1)] = double(f.batches);
  return {out, {y, f.mean, f.var}};
}

Output run_backward(const Call& k) {
  const Case& c = k.c;
  Array x = c.x, dy = c.dy, dx = c.like, weight = c.weight;
  Output o{std::vector<double>(size_t(2 * c.channels)), {}};
  const Problem p = make_problem(k.set, {&x, &dy, &dx}, &dy, &dx);
  backward(k.parallel, p.work, p.views[1], p.views[0], p.views[2], parameter(c.has_weight, weight),
           c.means.data(), c.invstds.data(), o.numbers.data());
  o.arrays = {dx};
  return o;
}

// --- what they should give ----------------------------------------------------------------------

struct Judge {
  const Case& c;
  const char *operation, *set;
  // How well sums are taken; of the short types a thousandth of their own rounding.
  Exact sums = c.dtype == Dtype::float64 ? 1e-13L : c.dtype == Dtype::float32 ? 1e-6L : 4e-6L;
  Exact one = 8 * rounding(arithmetic(c.dtype));            // the rounding of a few operations
  int failures = 0;

  void fail(const char* what) {
    if (++failures == 1) std::printf("FAILED %s (%s), %s: %s\n", operation, set, c.name.c_str(), what);
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
    auto follows = [&](const char* what, const Array& old, const Array& now, Exact to, Exact error) {
      Exact next = old.get(k) + (moves ? step * (to - old.get(k)) : 0);
      if (old.dtype == Dtype::float16 && std::fabs(next) >= 65520) next *= INFINITY;
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
      j.close("y", i, o.arrays[0].get(i), y, j.one * (size + std::fabs(bias)) + relative * size +
                                                 e.mean * std::fabs(s) + last_place(c.dtype, y));
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
    const Exact x = c.x.get(i), dy = c.dy.get(i), expected = s * (dy - t.total / n - (x - mean) * invstd * t.dot / n);
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

// --- the test -----------------------------------------------------------------------------------

struct Operation {
  const char* name;
  Output (*run)(const Call&);
  void (*judge)(Judge&, const Output&);
};
const Operation operations[] = {{"measure", run_measure, judge_measure},
                                {"normalise", run_normalise, judge_normalise},
                                {"gradient_sums", run_gradient_sums, judge_gradient_sums},
                                {"input_gradient", run_input_gradient, judge_input_gradient},
                                {"forward", run_forward, judge_forward},
                                {"backward", run_backward, judge_backward}};

struct Tally {
  int64_t passed = 0, failed = 0;
};

// Tensors without values only merge what others measured: register.cpp calls no loops on them.
void test(const Case& c, Tally& tally) {
  for (const Operation& operation : operations) {
    if (c.count == 0 && operation.run != run_normalise) continue;
    for_loopsets([&](const Loopset& set) {
      Judge judge{c, operation.name, set.name};
      const Output once = operation.run({c, set, serial});
      operation.judge(judge, once);
      for (const Parallel& parallel : parallels)
        if (c.x.numel() > 4096 && !(operation.run({c, set, parallel}) == once)) {
          const std::string threads = std::to_string(parallel.threads);
          judge.fail(("another result on " + threads + " threads than on one").c_str());
        }
      ++(judge.failures ? tally.failed : tally.passed);
    });
  }
}

}  // namespace syncbn::test

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int cases = argc > 2 ? std::atoi(argv[2]) : 150;
  std::setvbuf(stdout, nullptr, _IOLBF, 4096);  // what failed is seen even if a sanitizer ends it
  syncbn::test::Tally tally;
  for (int number = 0; number < cases; ++number)
    syncbn::test::test(syncbn::test::random_case(seed, number), tally);
  std::printf("seed %llu, %d cases\n%lld passed, %lld failed\n", (unsigned long long)seed, cases,
              (long long)tally.passed, (long long)tally.failed);
  return tally.failed ? 1 : 0;
}
