// What the test of the loops draws at random: shapes, layouts, values and parameters.
#pragma once

#include <algorithm>
#include <random>

#include "oracle.h"

namespace syncbn::test {

struct Random {
  std::mt19937_64 engine;

  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool chance(int percent) { return below(100) < percent; }
  template <class T>
  T one_of(std::initializer_list<T> from) {
    return from.begin()[below(int64_t(from.size()))];
  }
  Exact normal() {
    Exact sum = -6;
    for (int k = 0; k < 12; ++k) sum += Exact(engine() >> 11) * 0x1p-53L;
    return sum;
  }
};

// Sizes (N, C, *) with many units, segments and threads, or tails of joined rows wider than a tile.
const Sizes large_sizes[] = {{35001, 3},      {450, 130, 2},    {3, 2, 20011},  {20, 9, 19, 31},
                             {2001, 5, 3, 3}, {1, 7, 111, 113}, {1, 1, 100003}, {6001, 17},
                             {400, 16, 2, 9}, {3, 300, 11, 9},  {1039, 65},     {129, 65, 3, 3}};
constexpr int large = 12;

// Others around the widths of vectors and the limits in plan/work.h, where code paths part.
inline Sizes random_sizes(Random& r) {
  const int64_t channels[] = {1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65, 130, 257, 600};
  const int64_t lengths[] = {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65};
  Sizes sizes{r.chance(25) ? 1 : r.below(40) + 1, channels[r.below(r.chance(70) ? 8 : 14)]};
  for (int64_t rest = r.below(4); rest > 0; --rest) sizes.push_back(lengths[r.below(14)]);
  if (r.chance(20)) sizes[0] = 500 + r.below(1500);  // rows that join, planes that become columns
  if (r.chance(3)) return large_sizes[r.below(large)];
  int64_t numel = 1;
  for (int64_t size : sizes) numel *= size;
  for (size_t d = 0; numel > 120000 && d < sizes.size(); ++d) {
    numel /= sizes[d];
    sizes[d] = 1 + sizes[d] % 7;
    numel *= sizes[d];
  }
  if (r.chance(4)) sizes[size_t(r.chance(50) ? 0 : r.below(int64_t(sizes.size())))] = 0;
  if (sizes[1] == 0) sizes[1] = 1;
  return r.chance(2) ? Sizes(sizes.size(), 1) : sizes;
}

enum Kind { contiguous, channels_last, strided, permuted, kinds, expanded };
const char* const kind_names[] = {"contiguous", "channels_last", "strided", "permuted",
                                  "",           "expanded"};

inline Sizes random_strides(Random& r, const Sizes& sizes, int kind) {
  Sizes order;  // from the largest stride
  for (size_t d = 0; d < sizes.size(); ++d) order.push_back(int64_t(d));
  if (kind == channels_last || (kind == strided && r.chance(40))) {
    order.erase(order.begin() + 1);
    order.push_back(1);
  }
  if (kind == permuted)
    for (size_t d = order.size(); d > 1; --d)
      std::swap(order[d - 1], order[size_t(r.below(int64_t(d)))]);
  Sizes strides(sizes.size());
  int64_t next = kind == strided && r.chance(15) ? 2 : 1;
  const bool step = kind == strided;
  for (size_t k = order.size(); k-- > 0;) {
    strides[size_t(order[k])] = next;
    next *=
        std::max<int64_t>(sizes[size_t(order[k])], 1) + (step && r.chance(50) ? 1 + r.below(3) : 0);
  }
  for (int64_t& stride : strides)
    if (kind == expanded && r.chance(60)) stride = 0;
  return strides;
}

// Deviations near what a type holds, and those whose squares or inverses it does not.
inline Exact random_deviation(Random& r, Dtype dtype) {
  if (r.chance(70) || dtype == Dtype::float16) return r.one_of<Exact>({1, 1e-2L, 10});
  if (dtype == Dtype::float64) return r.one_of<Exact>({1e-100L, 1e100L, 1e140L});
  return r.one_of<Exact>({1e-12L, 1e15L, 1e20L, 1e30L, 3e37L});
}

// Around a mean of up to `ratio` deviations; sometimes constant, with a step, or after an outlier.
inline void fill(Random& r, Array& x) {
  static const Exact most[dtypes] = {1e4L, 1e6L, 100, 100};
  const Exact std = random_deviation(r, x.dtype),
              ratio = std < 1e35L || x.dtype == Dtype::float64 ? most[int(x.dtype)] : 0;
  const int64_t pattern = ratio > 0 ? r.below(8) : 4,
                n = x.numel() / std::max<int64_t>(x.sizes[1], 1);
  for (int64_t i = 0; i < x.numel(); i += n) {
    const Exact mean = std * ratio * r.one_of<Exact>({0, 1e-4L, 0.1L, 1, -1});
    for (int64_t j = 0; j < n; ++j) {
      Exact v = pattern == 0 ? mean : mean + std * r.normal();
      if (pattern == 1 && j > n / 2) v += 30 * std;
      if (pattern == 2 && j == 0) v += 1000 * std;
      if (pattern == 3) v = mean + std * (1 + r.normal() / 1000);  // rounded the same way each time
      x.set(i + j, v);
    }
  }
}

struct Case {
  std::string name;
  Random random;
  Dtype dtype;
  Array x, dy, like, mean, var, weight, bias;  // like: what results look like
  bool has_weight, has_bias, has_running, cumulative;
  double momentum, eps;
  Exact steepness;                        // the size of dy
  int64_t channels, count, batches, row;  // row: doubles from one packed set to the next
  std::vector<Moments> own, all;          // per channel: of x, and of all sets
  std::vector<double> sets, means, invstds, sums;
};

inline Array random_vector(Case& c, Exact offset) {
  Array v(Dtype(c.random.below(dtypes)), {c.channels}, {1 + c.random.below(2)}, c.random.below(2));
  for (int64_t i = 0; i < c.channels; ++i) v.set(i, offset + c.random.normal() / 4);
  return v;
}

// k packed sets, of which x's own is the first; some are empty.
inline void random_sets(Case& c) {
  const int64_t k = 1 + c.random.below(4);
  c.row = 1 + 2 * c.channels + c.random.below(3);
  c.sets.assign(size_t((k - 1) * c.row + 1 + 2 * c.channels), NAN);
  std::vector<std::vector<Moments>> sets(size_t(c.channels), std::vector<Moments>(size_t(k)));
  for (int64_t s = 0; s < k; ++s) {
    double* const packed = &c.sets[size_t(s * c.row)];
    packed[0] = double(s == 0                ? c.count
                       : c.random.chance(30) ? 0
                                             : 1 + c.random.below(2 * c.count + 9));
    for (int64_t j = 0; j < c.channels; ++j) {
      const Moments& m = c.own[size_t(j)];
      const Exact shift = s ? m.deviation() * c.random.normal() : 0;
      packed[1 + j] = packed[0] > 0 ? double(m.mean + shift) : 0;
      packed[1 + c.channels + j] = c.count ? double(m.m2 / c.count * packed[0]) : 0;
      sets[size_t(j)][size_t(s)] = {packed[0], packed[1 + j], packed[1 + c.channels + j]};
    }
  }
  for (const std::vector<Moments>& of_channel : sets) c.all.push_back(merged(of_channel));
}

inline void random_parameters(Case& c) {
  Random& r = c.random;
  c.has_weight = r.chance(70), c.has_bias = r.chance(70), c.has_running = r.chance(70);
  c.cumulative = r.chance(30);
  c.momentum = 0.1, c.eps = r.one_of({1e-5, 1e-3}), c.batches = r.below(5);
  c.weight = random_vector(c, 1), c.bias = random_vector(c, 0);
  c.mean = random_vector(c, 2), c.var = random_vector(c, 3);
  const std::vector<Exact> x = c.x.values();
  for (int64_t j = 0; j < c.channels; ++j)
    c.own.push_back(moments(x.data() + j * c.count, c.count));
  random_sets(c);
  for (int64_t j = 0; j < c.channels; ++j) {
    const Moments& m = c.all[size_t(j)];
    c.means.push_back(double(m.mean));
    c.invstds.push_back(double(1 / std::sqrt(m.m2 / std::max<Exact>(m.count, 1) + c.eps)));
  }
  for (int64_t j = 0; j < 2 * c.channels; ++j)
    c.sums.push_back(double(Exact(c.count) * c.steepness * r.normal()));
}

inline Case random_case(uint64_t seed, int number) {
  Case c;
  c.random.engine.seed(seed * 1000003 + uint64_t(number));
  Random& r = c.random;
  c.dtype = Dtype(r.below(dtypes));
  const bool all_run =
      number < 2 * large;  // each of the large ones in both layouts, whatever the seed
  const Sizes sizes = all_run ? large_sizes[number % large] : random_sizes(r);
  const int kind = all_run ? number / large : int(r.below(kinds));
  const int other = r.chance(15) ? int(expanded) : int(r.below(kinds));
  c.x = Array(c.dtype, sizes, random_strides(r, sizes, kind), r.below(2));
  const Sizes dy = r.chance(60) ? c.x.strides : random_strides(r, sizes, other);
  c.dy = Array(c.dtype, sizes, dy, r.below(2));
  Sizes strides(sizes.size());
  strides_like(c.x.dims(), sizes.data(), c.x.strides.data(), strides.data());
  c.like = Array(c.dtype, sizes, r.chance(20) ? c.x.strides : strides, r.below(2));
  c.channels = sizes[1], c.count = c.x.numel() / c.channels;
  fill(r, c.x);
  c.steepness = c.dtype == Dtype::float16 ? 1 : r.one_of<Exact>({1, 1, 1, 1e-12L, 1e12L});
  for (int64_t i = 0; i < c.dy.numel(); ++i) c.dy.set(i, c.steepness * (r.normal() + 0.5L));
  random_parameters(c);
  c.name = "case " + std::to_string(number) + ": " + format(c.dtype).name + " " + text(sizes) +
           " " + kind_names[kind] + ", strides x " + text(c.x.strides) + " dy " + text(dy) +
           " result " + text(c.like.strides) + ", skips " +
           text({c.x.skip, c.dy.skip, c.like.skip});
  return c;
}

}  // namespace syncbn::test
