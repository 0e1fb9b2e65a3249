// The six operations, called as torch/operators.h calls them.
#pragma once

#include <cstdlib>

#include "cases.h"
#include "loops/isa.h"
#include "steps/fused.h"

namespace syncbn::test {

struct Output {
  std::vector<double> numbers;
  std::vector<Array> arrays;

  bool operator==(const Output& other) const {
    const size_t bytes = numbers.size() * sizeof(double);
    bool same = bytes == 0 || std::memcmp(numbers.data(), other.numbers.data(), bytes) == 0;
    for (size_t k = 0; k < arrays.size(); ++k)
      same = same && arrays[k].memory == other.arrays[k].memory;
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
  for (size_t t = 0; t < arrays.size(); ++t)
    strided[t] = {arrays[t]->data(), arrays[t]->strides.data()};
  return make_views(arrays[0]->dims(), arrays[0]->sizes.data(), strided, int(arrays.size()), views,
                    layout);
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
  return given ? Parameter{true, a.data(), a.dtype, a.strides[0]} : Parameter{};
}

// Copies of what the operations take, and may change.
struct Parameters {
  Array mean, var, weight, bias;
  int64_t batches;

  explicit Parameters(const Case& c)
      : mean(c.mean), var(c.var), weight(c.weight), bias(c.bias), batches(c.batches) {}
  Running running(const Case& c) {
    const Counter counter{true, &batches, increment<int64_t>};
    return {parameter(c.has_running, mean), parameter(c.has_running, var), counter, c.cumulative,
            c.momentum};
  }
  Affine affine(const Case& c) {
    return {parameter(c.has_weight, weight), parameter(c.has_bias, bias)};
  }
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
  Parameters f(c);
  std::vector<double> out(size_t(2 * c.channels + 2)), m2(size_t(c.channels), 0);
  double *mean = out.data(), *invstd = mean + c.channels;
  const ChannelLoops& loops = k.set.channels[int(c.dtype)];
  const int64_t sets = (int64_t(c.sets.size()) + c.row - 1 - 2 * c.channels) / c.row;
  const double count = merge_sets(c.sets.data(), sets, c.row, c.channels, loops, mean, m2.data());
  const Running running = f.running(c);
  update_running(running, 0, c.channels, running.count_batch(), count, mean, m2.data());
  loops.inverse_deviation(c.channels, count, m2.data(), c.eps, invstd);
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
  gradient_sums(k.parallel, p.work, p.views[1], p.views[0], k.c.means.data(), k.c.invstds.data(),
                o.numbers.data());
  return o;
}

Output run_input_gradient(const Call& k) {
  const Case& c = k.c;
  Array x = c.x, dy = c.dy, dx = c.like, weight = c.weight;
  const Problem p = make_problem(k.set, {&x, &dy, &dx}, &dy, &dx);
  std::vector<double> means = c.means, invstds = c.invstds;
  input_gradient(k.parallel, p.work, p.views[1], p.views[0], p.views[2],
                 parameter(c.has_weight, weight),
                 {double(c.all[0].count), means.data(), invstds.data()}, c.sums.data());
  return {{}, {dx}};
}

Output run_forward(const Call& k) {
  const Case& c = k.c;
  Array x = c.x, y = c.like;
  Parameters f(c);
  std::vector<double> out(size_t(2 * c.channels + 2));
  const Problem p = make_problem(k.set, {&x, &y}, nullptr, &y);
  forward(k.parallel, p.work, p.views[0], p.views[1], f.affine(c), f.running(c), c.eps, out.data(),
          out.data() + c.channels);
  out[size_t(2 * c.channels)] = double(c.count),
                 out[size_t(2 * c.channels + 1)] = double(f.batches);
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

}  // namespace syncbn::test
