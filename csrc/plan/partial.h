// The units of work leave moments, or sums of the backward pass, per segment and column (see
// work.h). This is how they become those of channels.
#pragma once

#include <cstdint>

#include "plan/work.h"

namespace syncbn {

#include "loops/merge.h"

// Means and M2, or Σdy and Σdy·(x − shift), as two arrays over columns or channels. Partial ones
// have a row of columns for each segment, and one more for the tail.
struct MomentArrays {
  double *first, *second;
  MomentArrays row(int64_t r, int64_t columns) const {
    return {first + r * columns, second + r * columns};
  }
};

// Which columns belong to a channel: at(c, g) for each g below `groups`.
struct ChannelColumns {
  int64_t groups, channel_stride, group_stride;

  explicit ChannelColumns(const Work& w)
      : groups(w.columns / w.channels),
        channel_stride(w.divide == 1 ? 1 : groups),
        group_stride(w.divide == 1 ? w.channels : 1) {}
  int64_t at(int64_t channel, int64_t group) const {
    return channel * channel_stride + group * group_stride;
  }
};

inline bool finite(double v) { return v - v == 0; }

// --- moments ---------------------------------------------------------------------------------

// Splits means into a base and an offset from it: see Merge in loops/merge.h.
inline void split_means(int64_t n, const double* mean, double* base, double* offset) {
  for (int64_t j = 0; j < n; ++j) base[j] = finite(mean[j]) ? mean[j] : 0;
  for (int64_t j = 0; j < n; ++j) offset[j] = mean[j] - base[j];
}

// Merges the moments of all segments of columns [begin, end), and of the tail, into those of the
// first segment. base: room for a number per column.
inline void merge_segments(const Work& w, const MomentArrays& partial, double* base, int64_t begin,
                           int64_t end) {
  if (w.segments == 1 && !w.tail) return;
  double *offset = partial.first, *m2 = partial.second;
  split_means(end - begin, offset + begin, base + begin, offset + begin);
  auto merge = [&](int64_t to, double n1, double n2, const MomentArrays& more) {
    w.per_channel->merge_moments(to - begin, n1, base + begin, offset + begin, m2 + begin, n2,
                                 more.first + begin, more.second + begin);
  };
  for (int64_t s = 1; s < w.segments; ++s)
    merge(end, double(s * w.segment), double(w.segment_length(s)), partial.row(s, w.columns));
  if (w.tail) merge(w.tail, double(w.positions), 1, partial.row(w.segments, w.columns));
  for (int64_t j = begin; j < end; ++j) offset[j] += base[j];
}

// Merges the moments of each channel's columns, which are the first segment's row. base: room for a
// number per channel.
inline void merge_columns(const Work& w, const MomentArrays& partial, double* base,
                          const MomentArrays& result) {
  const ChannelColumns columns(w);
  auto count = [&](int64_t g) { return double(w.positions + (g * w.channels < w.tail)); };
  for (int64_t c = 0; c < w.channels; ++c) result.first[c] = partial.first[columns.at(c, 0)];
  for (int64_t c = 0; c < w.channels; ++c) result.second[c] = partial.second[columns.at(c, 0)];
  split_means(w.channels, result.first, base, result.first);
  double before = count(0);
  for (int64_t g = 1; g < columns.groups; ++g) {
    const Merge merge(before, count(g));
    for (int64_t c = 0; c < w.channels; ++c) {
      const int64_t j = columns.at(c, g);
      merge.moments(base[c], result.first[c], result.second[c], partial.first[j],
                    partial.second[j]);
    }
    before += count(g);
  }
  for (int64_t c = 0; c < w.channels; ++c) result.first[c] += base[c];
}

// --- gradient sums ---------------------------------------------------------------------------

// Adds the sums of all segments of columns [begin, end) to those of the first segment.
inline void add_segments(const Work& w, const MomentArrays& partial, int64_t begin, int64_t end) {
  for (int64_t s = 1; s < w.segments; ++s) {
    const MomentArrays more = partial.row(s, w.columns);
    for (int64_t j = begin; j < end; ++j) partial.first[j] += more.first[j];
    for (int64_t j = begin; j < end; ++j) partial.second[j] += more.second[j];
  }
}

// Adds up the sums of each channel's columns, the tail's among them.
inline void add_columns(const Work& w, const MomentArrays& partial, const MomentArrays& result) {
  const ChannelColumns columns(w);
  const MomentArrays tail = partial.row(w.segments, w.columns);
  for (int64_t j = 0; j < w.tail; ++j) partial.first[j] += tail.first[j];
  for (int64_t j = 0; j < w.tail; ++j) partial.second[j] += tail.second[j];
  for (int64_t c = 0; c < w.channels; ++c) {
    double first = 0, second = 0;
    for (int64_t g = 0; g < columns.groups; ++g) first += partial.first[columns.at(c, g)];
    for (int64_t g = 0; g < columns.groups; ++g) second += partial.second[columns.at(c, g)];
    result.first[c] = first;
    result.second[c] = second;
  }
}

}  // namespace syncbn
