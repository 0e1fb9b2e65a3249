// The steps of a process that is alone, fused: forward measures and normalises, backward sums and
// gives the input's gradient. Channels need nothing of each other, so both passes may go over one
// tile of channels before the next: the second finds in the cache what the first has read.
#pragma once

#include "steps/steps.h"

namespace syncbn {

// Whether to take both passes tile by tile, or the first over all and then the second. Tile by
// tile, every thread needs work: as many tiles as the others, or so many that one more does not
// matter. Results do not depend on it.
inline bool tile_by_tile(const Parallel& parallel, const Work& w) {
  const int64_t threads = parallel.threads;
  return w.columns == w.channels && (w.tiles % threads == 0 || w.tiles >= 4 * threads);
}

// Calls body(tile, begin, end) for all tiles, of channels [begin, end).
template <class Body>
void over_tiles(const Parallel& parallel, const Work& w, Body body) {
  parallel(w.tiles, ceil_div(2, w.segments), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      body(t, w.tile(t, 0).channel_begin, w.tile(t, 0).channel_end);
  });
}

inline ChannelValues from_channel(const ChannelValues& v, int64_t c) {
  return {v.mean + c, v.invstd + c, v.weight + c, v.bias ? v.bias + c : nullptr};
}

// Writes y, and per channel mean and invstd; moves the running statistics.
inline void forward(const Parallel& parallel, const Work& w, const View& x, const View& y,
                    const Affine& affine, const Running& running, double eps, double* mean,
                    double* invstd) {
  const double count = double(w.count()), momentum = running.count_batch();
  if (!tile_by_tile(parallel, w)) {
    Scratch scratch(1 + 2 * w.channels);
    double *packed = scratch.take(1 + 2 * w.channels), *m2 = packed + 1 + w.channels;
    measure(parallel, w, x, packed);
    for (int64_t c = 0; c < w.channels; ++c) mean[c] = packed[1 + c];
    update_running(running, 0, w.channels, momentum, count, mean, m2);
    w.per_channel->inverse_deviation(w.channels, count, m2, eps, invstd);
    normalise(parallel, w, x, y, affine, {count, mean, invstd});
    return;
  }
  Scratch scratch(w.columns * (2 * w.segments + 5) + 2 * w.channels);
  const MomentArrays partial = take_moments(scratch, w.columns * w.segments);
  double *weight = scratch.take(w.channels), *bias = scratch.take(w.channels);
  const Coefficients k = take_coefficients(scratch, w.columns);
  double* base = scratch.take(w.columns);
  read_parameter(affine.weight, w.channels, 1, weight);
  read_parameter(affine.bias, w.channels, 0, bias);
  const ChannelValues values{mean, invstd, weight, bias};
  over_tiles(parallel, w, [&](int64_t t, int64_t begin, int64_t end) {
    for (int64_t s = 0; s < w.segments; ++s)
      measure_tile(w, x, w.tile(t, s), partial.row(s, w.columns));
    merge_segments(w, partial, base, begin, end);
    const int64_t n = end - begin;
    for (int64_t c = begin; c < end; ++c) mean[c] = partial.first[c];
    w.per_channel->inverse_deviation(n, count, partial.second + begin, eps, invstd + begin);
    const bool fits = w.per_channel->forward_coefficients(n, from_channel(values, begin),
                                                          from_channel(w, k, begin));
    for (int64_t s = w.segments - 1; s >= 0; --s)
      normalise_tile(w, x, y, w.tile(t, s), k, values, fits);
  });
  update_running(running, 0, w.channels, momentum, count, mean, partial.second);
}

// Writes dx, and per channel Σdy and Σdy·x̂ into sums.
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
  const MomentArrays partial = take_moments(scratch, w.columns * w.segments);
  double* weight = scratch.take(w.channels);
  const Coefficients k = take_coefficients(scratch, w.columns);
  read_parameter(weights, w.channels, 1, weight);
  w.per_channel->round_means(w.channels, mean, k.shift);
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
    const bool fits =
        w.per_channel->backward_coefficients(n, count, here, total, dot, from_channel(w, k, begin));
    for (int64_t s = w.segments - 1; s >= 0; --s)
      input_gradient_tile(w, dy, x, dx, w.tile(t, s), k, values, count, sums, sums + w.channels,
                          fits);
  });
}

}  // namespace syncbn
