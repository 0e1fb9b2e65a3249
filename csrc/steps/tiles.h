// The loops over a tile, and once more, value by value in double, over the channels whose numbers
// the loops cannot hold: of float32 and bfloat16, deviations whose square or products whose sum is
// past the largest float, and coefficients past the smallest or largest. All four find that out at
// no cost to others: sums that overflow are no longer finite, coefficients are looked at in double.
#pragma once

#include <type_traits>

#include "plan/parameters.h"
#include "plan/partial.h"
#include "plan/work.h"

namespace syncbn {

// Calls body(T{}, j) for the tile's columns where again(j).
template <class Again, class Body>
void for_columns_again(const Work& w, const Tile& t, Again again, Body body) {
  Parameter like;
  like.dtype = w.dtype;
  with_elements(like, [&](auto* elements) {
    for (int64_t j = t.channel_begin; j < t.channel_end; ++j)
      if (again(j)) body(std::remove_pointer_t<decltype(elements)>{}, j);
  });
}

// Calls body(o, i) for the tile's positions.
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

// The coefficients' maker marks with NaN a column that float cannot hold.
inline bool marked(const Work& w, const Coefficients& k, int64_t j) {
  return w.real_size == 4 && k.scales<float>()[j] != k.scales<float>()[j];
}

inline void measure_tile(const Work& w, const View& x, const Tile& t, const Pairs& to) {
  if (w.loops->measure(x, t, to.first, to.second)) return;
  const double inverse = 1 / double(t.positions());
  for_columns_again(w, t, [&](int64_t j) { return !finite(to.second[j]); }, [&](auto type, int64_t j) {
    using T = decltype(type);
    double sum = 0, rest = 0, squares = 0;
    // Of doubles the sum could overflow where the mean does not.
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

// fits: what the coefficients' maker returned. v: per channel, of which k is made.
inline void normalise_tile(const Work& w, const View& x, const View& y, const Tile& t,
                           const Coefficients& k, const ChannelValues& v, bool fits) {
  w.loops->normalise(x, y, t, k);
  if (fits) return;
  for_columns_again(w, t, [&](int64_t j) { return marked(w, k, j); }, [&](auto type, int64_t j) {
    using T = decltype(type);
    const int64_t c = w.channel(j);
    for_positions(x, t, [&](int64_t o, int64_t i) {
      const double normal = (widen(*x.at<T>(j, o, i)) - v.mean[c]) * v.invstd[c];
      narrow(normal * v.weight[c] + v.bias[c], y.at<T>(j, o, i));
    });
  });
}

inline void gradient_sums_tile(const Work& w, const View& dy, const View& x, const Tile& t,
                               const void* shift, const Pairs& to) {
  if (w.loops->gradient_sums(dy, x, t, shift, to.first, to.second)) return;
  auto again = [&](int64_t j) { return !finite(to.first[j]) || !finite(to.second[j]); };
  for_columns_again(w, t, again, [&](auto type, int64_t j) {
    using T = decltype(type);
    const double about = w.real_size == 8 ? static_cast<const double*>(shift)[j]
                                          : double(static_cast<const float*>(shift)[j]);
    double total = 0, dot = 0;
    for_positions(x, t, [&](int64_t o, int64_t i) {
      const double gradient = widen(*dy.at<T>(j, o, i));
      total += gradient;
      dot += gradient * (widen(*x.at<T>(j, o, i)) - about);
    });
    to.first[j] = total;
    to.second[j] = dot;
  });
}

// total, projection: Σdy and Σdy·x̂ per channel, over `count` values.
inline void input_gradient_tile(const Work& w, const View& dy, const View& x, const View& dx,
                                const Tile& t, const Coefficients& k, const ChannelValues& v,
                                double count, const double* total, const double* projection,
                                bool fits) {
  w.loops->input_gradient(dy, x, dx, t, k);
  if (fits) return;
  const double inverse = 1 / (count < 1 ? 1 : count);
  for_columns_again(w, t, [&](int64_t j) { return marked(w, k, j); }, [&](auto type, int64_t j) {
    using T = decltype(type);
    const int64_t c = w.channel(j);
    for_positions(x, t, [&](int64_t o, int64_t i) {
      const double normal = (widen(*x.at<T>(j, o, i)) - v.mean[c]) * v.invstd[c];
      const double through = normal * (projection[c] * inverse) + total[c] * inverse;
      narrow((widen(*dy.at<T>(j, o, i)) - through) * (v.invstd[c] * v.weight[c]), dx.at<T>(j, o, i));
    });
  });
}

}  // namespace syncbn
