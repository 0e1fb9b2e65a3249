// The four steps of synchronised batch normalisation, on views. Their formulas and shapes stand in
// src/syncbn/kernels/composite.py.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>

#include "loops/types.h"
#include "plan/parallel.h"
#include "plan/parameters.h"
#include "plan/partial.h"
#include "plan/work.h"
#include "steps/tiles.h"

namespace syncbn {

// Memory for the numbers that a step needs in between, taken piece by piece.
class Scratch {
 public:
  explicit Scratch(int64_t doubles) : memory_(new double[size_t(doubles)]), next_(memory_.get()) {}
  double* take(int64_t doubles) {
    double* p = next_;
    next_ += doubles;
    return p;
  }

 private:
  std::unique_ptr<double[]> memory_;
  double* next_;
};

inline MomentArrays take_moments(Scratch& scratch, int64_t numbers) {
  return {scratch.take(numbers), scratch.take(numbers)};
}

inline Coefficients take_coefficients(Scratch& scratch, int64_t columns) {
  return {scratch.take(columns), scratch.take(columns), scratch.take(columns),
          scratch.take(columns)};
}

// Calls unit(tile, segment) for all units of work, from the last to the first where `backwards`:
// what a first pass touched last, a second pass still finds in the cache.
template <class Unit>
void over_units(const Parallel& parallel, const Work& w, bool backwards, Unit unit) {
  parallel(w.units(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t u = backwards ? end - 1 - (k - begin) : k;
      unit(w.unit_tile(u), w.unit_segment(u));
    }
  });
}

// --- coefficients per column -----------------------------------------------------------------

// Copies values per channel, at the front of an array, to the columns of each channel.
template <class R>
void spread(const Work& w, void* values) {
  R* v = static_cast<R*>(values);
  if (w.divide == 1)
    for (int64_t j = w.channels; j < w.columns; ++j) v[j] = v[j - w.channels];
  else
    for (int64_t j = w.columns - 1; j >= 0; --j) v[j] = v[j / w.divide];
}

inline void spread_coefficients(const Work& w, std::initializer_list<void*> arrays) {
  if (w.columns == w.channels) return;
  for (void* values : arrays)
    w.real_size == 8 ? spread<double>(w, values) : spread<float>(w, values);
}

// The coefficients of the channels from c on.
inline Coefficients from_channel(const Work& w, const Coefficients& k, int64_t c) {
  auto at = [&](void* p) { return static_cast<void*>(static_cast<char*>(p) + c * w.real_size); };
  return {at(k.shift), at(k.scale), at(k.offset), at(k.slope)};
}

// --- the steps -------------------------------------------------------------------------------

// The moments of the tail, as a last row of the partial ones.
inline void measure_tail(const Work& w, const View& x, const MomentArrays& partial) {
  const MomentArrays tail = partial.row(w.segments, w.columns);
  w.over_tail([&](const Tile& t) { measure_tile(w, x, t, tail); });
}

// Packed moments [count, mean…, M2…] of x.
inline void measure(const Parallel& parallel, const Work& w, const View& x, double* packed) {
  Scratch scratch(w.columns * (2 * w.segments + 3));
  MomentArrays result{packed + 1, packed + 1 + w.channels};
  MomentArrays partial = take_moments(scratch, w.columns * (w.segments + 1));
  packed[0] = double(w.count());
  const bool direct = w.columns == w.channels && w.segments == 1;
  if (direct) partial = result;
  over_units(parallel, w, false, [&](int64_t t, int64_t s) {
    measure_tile(w, x, w.tile(t, s), partial.row(s, w.columns));
  });
  if (direct) return;
  measure_tail(w, x, partial);
  double* base = scratch.take(w.columns);
  merge_segments(w, partial, base, 0, w.columns);
  merge_columns(w, partial, base, result);
}

struct Affine {
  Parameter weight, bias;
};

// The union of k sets of packed moments, `stride` doubles apart; returns its count.
inline double merge_sets(const double* sets, int64_t k, int64_t stride, int64_t channels,
                         const ChannelLoops& loops, double* mean, double* m2) {
  Scratch scratch(channels);
  double *base = scratch.take(channels), count = 0;
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = base[c] = 0;
  for (int64_t i = 0; i < k; ++i, sets += stride) {
    const double *means = sets + 1, *m2s = means + channels;
    if (sets[0] == 0) continue;  // an empty set weighs nothing
    if (count == 0) {
      split_means(channels, means, base, mean);
      for (int64_t c = 0; c < channels; ++c) m2[c] = m2s[c];
    } else {
      loops.merge_moments(channels, count, base, mean, m2, sets[0], means, m2s);
    }
    count += sets[0];
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] += base[c];
  return count;
}

// What both passes over the elements need to know of the union of all sets.
struct Statistics {
  double count;
  double *mean, *invstd;
};

inline void normalise(const Parallel& parallel, const Work& w, const View& x, const View& y,
                      const Affine& affine, const Statistics& statistics) {
  Scratch scratch(2 * w.channels + 4 * w.columns);
  double *weight = scratch.take(w.channels), *bias = scratch.take(w.channels);
  const Coefficients k = take_coefficients(scratch, w.columns);
  read_parameter(affine.weight, w.channels, 1, weight);
  read_parameter(affine.bias, w.channels, 0, bias);
  const ChannelValues v{statistics.mean, statistics.invstd, weight, bias};
  const bool fits = w.per_channel->forward_coefficients(w.channels, v, k);
  spread_coefficients(w, {k.shift, k.scale, k.offset});
  over_units(parallel, w, true,
             [&](int64_t t, int64_t s) { normalise_tile(w, x, y, w.tile(t, s), k, v, fits); });
  w.over_tail([&](const Tile& t) { normalise_tile(w, x, y, t, k, v, fits); });
}

// sums: room for Σdy and Σdy·x̂ per channel.
inline void gradient_sums(const Parallel& parallel, const Work& w, const View& dy, const View& x,
                          const double* mean, const double* invstd, double* sums) {
  Scratch scratch(w.columns + 2 * w.columns * (w.segments + 1));
  double* shift = scratch.take(w.columns);
  MomentArrays result{sums, sums + w.channels};
  MomentArrays partial = take_moments(scratch, w.columns * (w.segments + 1));
  w.per_channel->round_means(w.channels, mean, shift);
  spread_coefficients(w, {shift});
  over_units(parallel, w, false, [&](int64_t t, int64_t s) {
    gradient_sums_tile(w, dy, x, w.tile(t, s), shift, partial.row(s, w.columns));
  });
  const MomentArrays tail = partial.row(w.segments, w.columns);
  w.over_tail([&](const Tile& t) { gradient_sums_tile(w, dy, x, t, shift, tail); });
  add_segments(w, partial, 0, w.columns);
  add_columns(w, partial, result);
  w.per_channel->project(w.channels, {mean, invstd, nullptr, nullptr}, result.first, result.second);
}

// sums: Σdy and Σdy·x̂ over the union of all sets.
inline void input_gradient(const Parallel& parallel, const Work& w, const View& dy, const View& x,
                           const View& dx, const Parameter& weights, const Statistics& statistics,
                           const double* sums) {
  Scratch scratch(w.channels + 4 * w.columns);
  double* weight = scratch.take(w.channels);
  const Coefficients k = take_coefficients(scratch, w.columns);
  read_parameter(weights, w.channels, 1, weight);
  const double *dots = sums + w.channels, n = statistics.count;
  const ChannelValues v{statistics.mean, statistics.invstd, weight, nullptr};
  const bool fits = w.per_channel->backward_coefficients(w.channels, n, v, sums, dots, k);
  spread_coefficients(w, {k.shift, k.scale, k.slope, k.offset});
  auto over = [&](const Tile& t) {
    input_gradient_tile(w, dy, x, dx, t, k, v, n, sums, dots, fits);
  };
  over_units(parallel, w, true, [&](int64_t t, int64_t s) { over(w.tile(t, s)); });
  w.over_tail(over);
}

}  // namespace syncbn
