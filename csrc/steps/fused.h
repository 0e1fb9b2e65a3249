// Both passes of a single process in one go: what the first pass over a tile of channels leaves in
// the cache, the second finds there.
#pragma once

#include "steps/steps.h"

namespace syncbn {

// Whether to take whole channels, tile by tile, or one pass over all and then the other. It needs
// a tile or more for every thread, about as many for each. Results don't depend on it.
inline bool tile_by_tile(const Parallel& parallel, const Work& w) {
  const int64_t threads = parallel.threads;
  return w.columns == w.channels &&
         (w.tiles % threads == 0 || w.tiles >= 4 * threads);
}

template <class Body>
void over_tiles(const Parallel& parallel, const Work& w, Body body) {
  parallel(w.tiles, ceil_div(2, w.segments), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t, w.tile(t, 0).channel_begin, w.tile(t, 0).channel_end);
  });
}

inline ChannelValues from_channel(const ChannelValues& v, int64_t c) {
  return {v.mean + c, v.invstd + c, v.weight + c, v.bias ? v.bias + c : nullptr};
}

// y, and per channel mean and invstd.
inline void forward(const Parallel& parallel, const Work& w, const View& x, const View& y,
                    const Affine& affine, const Running& running, double eps, double* mean,
                    double* invstd) {
  const double count = double(w.count()), step = running.step();
  Scratch scratch(w.columns * (2 * w.segments + 7) + 4 * w.channels);
  Pairs partial{scratch.take(w.columns * (w.segments + 1)),
                scratch.take(w.columns * (w.segments + 1))};
  double *weight = scratch.take(w.channels), *bias = scratch.take(w.channels);
  const Coefficients k = take_coefficients(scratch, w.columns);
  double* base = scratch.take(w.columns);
  read(affine.weight, w.channels, 1, weight);
  read(affine.bias, w.channels, 0, bias);

  auto measure = [&](int64_t t, int64_t s) {
    measure_tile(w, x, w.tile(t, s), partial.row(s, w.columns));
  };
  const ChannelValues values{mean, invstd, weight, bias};
  auto conclude = [&](int64_t begin, int64_t end, const Pairs& moments) {
    const int64_t n = end - begin;
    for (int64_t c = begin; c < end; ++c) mean[c] = moments.first[c];
    move_running(running, begin, end, step, count, moments.first, moments.second);
    w.per_channel->inverse_deviation(n, count, moments.second + begin, eps, invstd + begin);
    return w.per_channel->forward_coefficients(n, from_channel(values, begin),
                                               from_channel(w, k, begin));
  };
  auto normalise = [&](const Tile& t, bool fits) { normalise_tile(w, x, y, t, k, values, fits); };

  if (tile_by_tile(parallel, w)) {
    over_tiles(parallel, w, [&](int64_t t, int64_t begin, int64_t end) {
      for (int64_t s = 0; s < w.segments; ++s) measure(t, s);
      merge_segments(w, partial, base, begin, end);
      const bool fits = conclude(begin, end, partial);
      for (int64_t s = w.segments - 1; s >= 0; --s) normalise(w.tile(t, s), fits);
    });
    return;
  }
  over_units(parallel, w, false, measure);
  measure_tail(w, x, partial);
  merge_segments(w, partial, base, 0, w.columns);
  const Pairs result{scratch.take(w.channels), scratch.take(w.channels)};
  merge_columns(w, partial, base, result);
  const bool fits = conclude(0, w.channels, result);
  spread_coefficients(w, {k.shift, k.scale, k.offset});
  over_units(parallel, w, true, [&](int64_t t, int64_t s) { normalise(w.tile(t, s), fits); });
  w.over_tail([&](const Tile& t) { normalise(t, fits); });
}

// dx, and per channel Σdy and Σdy·x̂ in sums.
inline void backward(const Parallel& parallel, const Work& w, const View& dy, const View& x,
                     const View& dx, const Parameter& weights, const double* mean,
                     const double* invstd, double* sums) {
  const double count = double(w.count());
  if (!tile_by_tile(parallel, w)) {
    gradient_sums(parallel, w, dy, x, mean, invstd, sums);
    input_gradient(parallel, w, dy, x, dx, weights,
                   {count, const_cast<double*>(mean), const_cast<double*>(invstd)}, sums);
    return;
  }
  Scratch scratch(2 * w.columns * w.segments + w.channels + 4 * w.columns);
  Pairs partial{scratch.take(w.columns * w.segments), scratch.take(w.columns * w.segments)};
  double* weight = scratch.take(w.channels);
  const Coefficients k = take_coefficients(scratch, w.columns);
  read(weights, w.channels, 1, weight);
  w.per_channel->shifts(w.channels, mean, k.shift);
  const ChannelValues values{mean, invstd, weight, nullptr};
  over_tiles(parallel, w, [&](int64_t t, int64_t begin, int64_t end) {
    for (int64_t s = 0; s < w.segments; ++s)
      gradient_sums_tile(w, dy, x, w.tile(t, s), k.shift, partial.row(s, w.columns));
    add_segments(w, partial, begin, end);
    const int64_t n = end - begin;
    double *total = sums + begin, *dot = sums + w.channels + begin;
    for (int64_t c = 0; c < n; ++c) total[c] = partial.first[begin + c];
    for (int64_t c = 0; c < n; ++c) dot[c] = partial.second[begin + c];
    const ChannelValues here = from_channel(values, begin);
    w.per_channel->project(n, here, total, dot);
    const bool fits = w.per_channel->backward_coefficients(n, count, here, total, dot,
                                                           from_channel(w, k, begin));
    for (int64_t s = w.segments - 1; s >= 0; --s)
      input_gradient_tile(w, dy, x, dx, w.tile(t, s), k, values, count, sums, sums + w.channels,
                          fits);
  });
}

}  // namespace syncbn
