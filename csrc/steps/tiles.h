// The four loops over a tile. A float cannot hold everything that float32 and bfloat16 values lead
// to: squares of deviations and sums of products may be too large, coefficients too large or too
// small. The channels in which that happens are computed once more, value by value in double. It
// costs the others nothing: sums that are too large are no longer finite, and coefficients are made
// in double.
#pragma once

#include <type_traits>

#include "plan/parameters.h"
#include "plan/partial.h"
#include "plan/work.h"

namespace syncbn {

// Calls body(T{}, j) for those of the tile's columns j where needed(j). T: the elements' type.
template <class Needed, class Body>
void recompute_columns(const Work& w, const Tile& t, Needed needed, Body body) {
  Parameter like;
  like.dtype = w.dtype;
  with_elements(like, [&](auto* elements) {
    for (int64_t j = t.channel_begin; j < t.channel_end; ++j)
      if (needed(j)) body(std::remove_pointer_t<decltype(elements)>{}, j);
  });
}

// Calls body(outer, inner) for each of the tile's positions.
template <class Body>
void for_positions(const View& x, const Tile& t, Body body) {
  int64_t o = t.position_begin / x.inner, i = t.position_begin % x.inner;
  for (int64_t left = t.positions(); left > 0; --left) {
    body(o, i);
    if (++i < x.inner) continue;
    i = 0;
    ++o;
  }
}

// Calls body(T{}, j, c, o, i, x̂) at each position of the columns j, of channels c, whose
// coefficients a float cannot hold: their scale is NaN (see loops/moments.h). v: per channel, of
// which they are made.
template <class Body>
void recompute_values(const Work& w, const View& x, const Tile& t, const Coefficients& k,
                      const ChannelValues& v, Body body) {
  auto needed = [&](int64_t j) {
    return w.real_size == 4 && k.scales<float>()[j] != k.scales<float>()[j];
  };
  recompute_columns(w, t, needed, [&](auto type, int64_t j) {
    const int64_t c = w.channel(j);
    for_positions(x, t, [&](int64_t o, int64_t i) {
      const double value = widen(*x.at<decltype(type)>(j, o, i));
      body(type, j, c, o, i, (value - v.mean[c]) * v.invstd[c]);
    });
  });
}

inline void measure_tile(const Work& w, const View& x, const Tile& t, const MomentArrays& to) {
  if (w.loops->measure(x, t, to.first, to.second)) return;
  const double inverse = 1 / double(t.positions());
  recompute_columns(w, t, [&](int64_t j) { return !finite(to.second[j]); },
                    [&](auto type, int64_t j) {
    using T = decltype(type);
    double sum = 0, rest = 0, squares = 0;
    // Scaled, as a sum of doubles could be too large where the mean is not.
    for_positions(x, t, [&](int64_t o, int64_t i) { sum += widen(*x.at<T>(j, o, i)) * 0x1p-64; });
    const double mean = sum * inverse * 0x1p64;
    for_positions(x, t, [&](int64_t o, int64_t i) {
      const double deviation = widen(*x.at<T>(j, o, i)) - mean;
      rest += deviation;
      squares += deviation * deviation;
    });
    const double more = rest * inverse, m2 = squares - rest * more;
    to.first[j] = finite(more) ? mean + more : mean;
    to.second[j] = !finite(squares) ? squares : m2 < 0 ? 0 : m2;
  });
}

// k: coefficients per column, made of v per channel. fits: whether they all are held by k's type.
inline void normalise_tile(const Work& w, const View& x, const View& y, const Tile& t,
                           const Coefficients& k, const ChannelValues& v, bool fits) {
  w.loops->normalise(x, y, t, k);
  if (fits) return;
  recompute_values(w, x, t, k, v,
                   [&](auto type, int64_t j, int64_t c, int64_t o, int64_t i, double normal) {
    narrow(normal * v.weight[c] + v.bias[c], y.at<decltype(type)>(j, o, i));
  });
}

inline void gradient_sums_tile(const Work& w, const View& dy, const View& x, const Tile& t,
                               const void* shift, const MomentArrays& to) {
  if (w.loops->gradient_sums(dy, x, t, shift, to.first, to.second)) return;
  auto needed = [&](int64_t j) { return !finite(to.first[j]) || !finite(to.second[j]); };
  recompute_columns(w, t, needed, [&](auto type, int64_t j) {
    using T = decltype(type);
    const double center = w.real_size == 8 ? static_cast<const double*>(shift)[j]
                                           : double(static_cast<const float*>(shift)[j]);
    double total = 0, dot = 0;
    for_positions(x, t, [&](int64_t o, int64_t i) {
      const double gradient = widen(*dy.at<T>(j, o, i));
      total += gradient;
      dot += gradient * (widen(*x.at<T>(j, o, i)) - center);
    });
    to.first[j] = total;
    to.second[j] = dot;
  });
}

// total, projection: Σdy and Σdy·x̂ per channel, over `count` values. k, v and fits as above.
inline void input_gradient_tile(const Work& w, const View& dy, const View& x, const View& dx,
                                const Tile& t, const Coefficients& k, const ChannelValues& v,
                                double count, const double* total, const double* projection,
                                bool fits) {
  w.loops->input_gradient(dy, x, dx, t, k);
  if (fits) return;
  const double inverse = 1 / (count < 1 ? 1 : count);
  recompute_values(w, x, t, k, v,
                   [&](auto type, int64_t j, int64_t c, int64_t o, int64_t i, double normal) {
    using T = decltype(type);
    const double through = normal * (projection[c] * inverse) + total[c] * inverse;
    narrow((widen(*dy.at<T>(j, o, i)) - through) * (v.invstd[c] * v.weight[c]), dx.at<T>(j, o, i));
  });
}

}  // namespace syncbn
