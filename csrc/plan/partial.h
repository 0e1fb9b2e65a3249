// Moments and sums of segments and columns, and how they become those of channels.
#pragma once

#include <cstdint>

#include "plan/work.h"

namespace syncbn {

// Partial moments per segment and column, and the sums of the backward pass, are pairs of arrays.
struct Pairs {
  double *first, *second;
  Pairs row(int64_t r, int64_t columns) const {
    return {first + r * columns, second + r * columns};
  }
};

inline bool finite(double v) { return v - v == 0; }

// --- moments ---------------------------------------------------------------------------------

// Takes means apart into a base and an offset from it; see loops/moments.h.
inline void from_base(int64_t n, const double* mean, double* base, double* offset) {
  for (int64_t j = 0; j < n; ++j) base[j] = finite(mean[j]) ? mean[j] : 0;
  for (int64_t j = 0; j < n; ++j) offset[j] = mean[j] - base[j];
}

// Merges all segments of columns [begin, end), and the tail, into the first segment's.
// base: room for a number per column.
inline void merge_segments(const Work& w, const Pairs& partial, double* base, int64_t begin,
                           int64_t end) {
  if (w.segments == 1 && !w.tail) return;
  double *offset = partial.first, *m2 = partial.second;
  from_base(end - begin, offset + begin, base + begin, offset + begin);
  auto merge = [&](int64_t to, double n1, double n2, const Pairs& more) {
    w.per_channel->merge_moments(to - begin, n1, base + begin, offset + begin, m2 + begin, n2,
                                 more.first + begin, more.second + begin);
  };
  for (int64_t s = 1; s < w.segments; ++s)
    merge(end, double(s * w.segment), double(w.segment_length(s)), partial.row(s, w.columns));
  if (w.tail) merge(w.tail, double(w.positions), 1, partial.row(w.segments, w.columns));
  for (int64_t j = begin; j < end; ++j) offset[j] += base[j];
}

// Merges the columns of each channel. base: room for a number per channel.
inline void merge_columns(const Work& w, const Pairs& partial, double* base, const Pairs& result) {
  const int64_t groups = w.columns / w.channels;
  const int64_t step = w.divide == 1 ? 1 : groups, jump = w.divide == 1 ? w.channels : 1;
  auto count = [&](int64_t g) { return double(w.positions + (g * w.channels < w.tail)); };
  for (int64_t c = 0; c < w.channels; ++c) result.first[c] = partial.first[c * step];
  for (int64_t c = 0; c < w.channels; ++c) result.second[c] = partial.second[c * step];
  from_base(w.channels, result.first, base, result.first);
  double before = count(0);
  for (int64_t g = 1; g < groups; ++g) {
    const double more = count(g), all = before + more;
    const double keep = before / all, weight = more / all, product = before * weight;
    for (int64_t c = 0; c < w.channels; ++c) {
      const int64_t j = g * jump + c * step;
      const double offset = partial.first[j] - base[c], delta = offset - result.first[c];
      result.first[c] = result.first[c] * keep + offset * weight;
      result.second[c] += partial.second[j] + delta * delta * product;
    }
    before = all;
  }
  for (int64_t c = 0; c < w.channels; ++c) result.first[c] += base[c];
}

// --- gradient sums ---------------------------------------------------------------------------

inline void add_segments(const Work& w, const Pairs& partial, int64_t begin, int64_t end) {
  for (int64_t s = 1; s < w.segments; ++s) {
    const Pairs more = partial.row(s, w.columns);
    for (int64_t j = begin; j < end; ++j) partial.first[j] += more.first[j];
    for (int64_t j = begin; j < end; ++j) partial.second[j] += more.second[j];
  }
}

inline void add_columns(const Work& w, const Pairs& partial, const Pairs& result) {
  const int64_t groups = w.columns / w.channels;
  const Pairs tail = partial.row(w.segments, w.columns);
  for (int64_t j = 0; j < w.tail; ++j) partial.first[j] += tail.first[j];
  for (int64_t j = 0; j < w.tail; ++j) partial.second[j] += tail.second[j];
  const int64_t step = w.divide == 1 ? 1 : groups, jump = w.divide == 1 ? w.channels : 1;
  for (int64_t c = 0; c < w.channels; ++c) {
    double first = 0, second = 0;
    for (int64_t g = 0; g < groups; ++g) first += partial.first[g * jump + c * step];
    for (int64_t g = 0; g < groups; ++g) second += partial.second[g * jump + c * step];
    result.first[c] = first;
    result.second[c] = second;
  }
}

}  // namespace syncbn
