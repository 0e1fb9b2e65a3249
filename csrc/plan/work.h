// How a tensor is cut into units of work. It follows from shape and dtype alone, never from the
// number of threads, and so do the results.
#pragma once

#include <cstdint>

#include "loops/types.h"

namespace syncbn {

// The loops see columns: the channels, or where these are too short for vectors, several columns
// per channel. Column j belongs to channel (j / divide) % channels, and columns before `tail` have
// one position more than the others.
struct Work {
  const Loops* loops;
  const ChannelLoops* per_channel;
  Dtype dtype;
  Layout layout;
  int64_t real_size;  // bytes of a coefficient
  int64_t channels, columns, divide, positions, tail;
  int64_t tile_columns, tiles, segment, segments;  // a unit: one tile of columns × one segment

  int64_t channel(int64_t column) const { return column / divide % channels; }
  int64_t units() const { return tiles * segments; }
  int64_t count() const { return (positions * columns + tail) / channels; }
  int64_t segment_length(int64_t s) const {
    return s + 1 < segments ? segment : positions - s * segment;
  }
  Tile tile(int64_t t, int64_t s) const {
    const int64_t begin = t * tile_columns, end = begin + tile_columns;
    return {begin, end < columns ? end : columns, s * segment, s * segment + segment_length(s)};
  }
  // Units follow the order in memory.
  int64_t unit_tile(int64_t u) const { return layout == Layout::planes ? u / segments : u % tiles; }
  int64_t unit_segment(int64_t u) const {
    return layout == Layout::planes ? u % segments : u / tiles;
  }
  // Calls body(tile) for tiles of the columns' last position.
  template <class Body>
  void over_tail(Body body) const {
    for (int64_t begin = 0; begin < tail; begin += tile_columns)
      body(Tile{begin, begin + tile_columns < tail ? begin + tile_columns : tail, positions,
                positions + 1});
  }
};

constexpr int64_t vector_multiple = 16;  // elements: a vector of floats on every processor

// Planes of a few elements, one after the other: each element of the plane becomes a column.
inline bool planes_to_columns(View* views, int count, Work& w) {
  const View& x = views[0];
  bool fits = w.layout == Layout::planes && x.inner < vector_multiple && x.outer >= 32;
  for (int t = 0; fits && t < count; ++t)
    fits = views[t].channel_stride == x.inner || x.channels == 1;
  if (!fits) return false;
  w.layout = Layout::rows;
  w.divide = x.inner;
  w.columns = x.channels * x.inner;
  for (int t = 0; t < count; ++t) {
    View& v = views[t];
    v = {v.data, w.columns, 1, v.outer, 1, 0, v.outer_stride};
  }
  return true;
}

// Rows that don't fill their last vector, without gaps: several rows become one.
inline bool join_rows(View* views, int count, Work& w) {
  const View& x = views[0];
  int64_t rows = 1;
  while (rows * x.channels % vector_multiple != 0) rows *= 2;
  bool fits = w.layout == Layout::rows && rows > 1 && x.outer == 1 && x.inner >= 64 * rows;
  for (int t = 0; fits && t < count; ++t) fits = views[t].inner_stride == x.channels;
  if (!fits) return false;
  w.columns = rows * x.channels;
  w.tail = x.inner % rows * x.channels;
  for (int t = 0; t < count; ++t) {
    View& v = views[t];
    const int64_t joined = v.inner / rows;  // and the tail follows as a row of another sample
    v = {v.data, w.columns, 1, joined, 1, joined * w.columns, w.columns};
  }
  return true;
}

inline int64_t at_least_one(int64_t n) { return n < 1 ? 1 : n; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Views are changed where columns differ from channels.
inline Work make_work(const Loopset& set, Dtype dtype, Layout layout, View* views, int count) {
  Work w{};
  w.per_channel = &set.channels[int(dtype)];
  w.dtype = dtype;
  w.layout = layout;
  w.real_size = dtype == Dtype::float64 ? 8 : 4;
  w.channels = w.columns = views[0].channels;
  w.divide = 1;
  planes_to_columns(views, count, w) || join_rows(views, count, w);
  w.loops = &set.elements[int(dtype)][int(w.layout)];
  w.positions = views[0].positions();

  // Some 32 thousand elements make a unit worth a thread; 256 units are enough for any machine.
  const int64_t elements = w.positions * w.columns;
  int64_t wanted = elements / 32768;
  wanted = wanted < 1 ? 1 : wanted > 256 ? 256 : wanted;
  int64_t shortest;
  if (w.layout == Layout::planes) {
    // Of short planes whole groups (channel_group of loops/streams.h), more than one of them only
    // where the nearest cache holds it all.
    w.tile_columns = at_least_one(4096 / views[0].inner);
    if (w.tile_columns >= vector_multiple) {
      const int64_t held = 8192 / at_least_one(w.positions);
      if (w.tile_columns > held) w.tile_columns = held;
      w.tile_columns = at_least_one(w.tile_columns / vector_multiple) * vector_multiple;
    }
    shortest = 8192;
  } else {
    w.tile_columns = widest_rows;
    shortest = 64;
  }
  if (w.tile_columns > w.columns) w.tile_columns = at_least_one(w.columns);
  w.tiles = ceil_div(w.columns, w.tile_columns);
  w.segments = ceil_div(wanted, at_least_one(w.tiles));
  const int64_t most = at_least_one(w.positions / shortest);
  if (w.segments > most) w.segments = most;
  w.segment = ceil_div(w.positions, w.segments);
  if (w.layout == Layout::planes && views[0].inner <= shortest)  // whole planes
    w.segment = ceil_div(w.segment, views[0].inner) * views[0].inner;
  w.segments = at_least_one(ceil_div(w.positions, at_least_one(w.segment)));
  return w;
}

}  // namespace syncbn
