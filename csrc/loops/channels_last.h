// Loops over rows: the channels of a position lie next to each other (channel_stride 1).
//
// Included once per instruction set, inside its namespace (see loops.h).

// How many rows are summed in the arithmetic's own precision before the sums go on in double.
constexpr int64_t row_block = 32;
constexpr int64_t first_rows = row_block / 4;  // see first_chunk in contiguous.h

// Whether to take several rows at a time, which saves loads of per-channel numbers. Memory is
// fastest read from end to end: several narrow rows still are, and rows of a page or more are
// several streams, each of which the processor prefetches. In between it is faster row by row.
template <class T>
SYNCBN_INLINE bool side_by_side(int64_t channels) {
  const int64_t bytes = channels * int64_t(sizeof(T));
  return bytes <= 256 || bytes >= 4096;
}

// Calls body(outer, inner, rows) for each block of at most `most` rows that lie equally spaced.
template <class Body>
SYNCBN_INLINE void for_row_blocks(const View& x, const Tile& t, int64_t most, Body body) {
  int64_t o = t.position_begin / x.inner, i = t.position_begin % x.inner;
  for (int64_t left = t.positions(); left > 0;) {
    int64_t rows = x.inner - i < left ? x.inner - i : left;
    if (rows > most) rows = most;
    body(o, i, rows);
    left -= rows;
    i += rows;
    if (i == x.inner) {
      i = 0;
      ++o;
    }
  }
}

// Calls body(some, group, r, c, n) for each group of channels (see for_groups), of some.value rows
// at a time from row r on.
template <class T, class Body>
SYNCBN_INLINE void over_rows(int64_t rows, int64_t channels, Body body) {
  int64_t r = 0;
  auto pass = [&](auto some) SYNCBN_LAMBDA {
    for (; r + some.value <= rows; r += some.value)
      for_groups<T>(0, channels, [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
        body(some, group, r, c, n);
      });
  };
  if (side_by_side<T>(channels)) pass(Count<4>{});
  pass(Count<1>{});
}

// What is read above this is read before what is read below. Clang 19 would otherwise read the last
// vectors of several rows, then those before them, which the processor doesn't prefetch.
SYNCBN_INLINE void keep_order() { asm volatile("" ::: "memory"); }

// Sums two terms per channel over the rows of a block: add(group, r, c, n, a, b) adds those of row
// r to a and b.
template <class T, class Add>
SYNCBN_INLINE void sum_rows(int64_t rows, int64_t channels, Real<T>* first, Real<T>* second,
                            Add add) {
  for (int64_t c = 0; c < channels; ++c) first[c] = second[c] = 0;
  over_rows<T>(rows, channels,
               [&](auto some, auto group, int64_t r, int64_t c, int64_t n) SYNCBN_LAMBDA {
    using G = decltype(group);
    G a = G::ordered(first + c, n), b = G::ordered(second + c, n);
#pragma GCC unroll 4
    for (int64_t q = r; q < r + some.value; ++q) {
      add(group, q, c, n, a, b);
      keep_order();
    }
    a.to_ordered(first + c, n);
    b.to_ordered(second + c, n);
  });
  for_groups<T>(0, channels, [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
    using G = decltype(group);
    G::ordered(first + c, n).to_channels(first + c, n);
    G::ordered(second + c, n).to_channels(second + c, n);
  });
}

template <class T>
bool measure_rows(const View& x, const Tile& t, double* mean, double* m2) {
  using R = Real<T>;
  R base[widest_rows], shift[widest_rows], first[widest_rows], second[widest_rows];
  const int64_t channels = t.channels(), stride = x.inner_stride;
  mean += t.channel_begin;
  m2 += t.channel_begin;
  int64_t count = 0;
  for_row_blocks(x, t, row_block, [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    const T* p = x.at<T>(t.channel_begin, o, i);
    const Merge merge{double(count), double(rows)};
    const int64_t some = rows < first_rows ? rows : first_rows;
    auto sums_about = [&](const R* about, int64_t n) SYNCBN_LAMBDA {  // Σ(x − shift), Σ(x − shift)²
      const Ordered<T> shifts(about, channels);
      sum_rows<T>(n, channels, first, second,
                  [&](auto group, int64_t r, int64_t c, int64_t n, auto& a, auto& b) SYNCBN_LAMBDA {
        using G = decltype(group);
        const G value = G::elements(p + r * stride + c, n), s = shifts.at(group, c, n);
#pragma GCC unroll 4
        for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j) {
          const auto deviation = value.v[j] - s.v[j];
          a.v[j] += deviation;
          b.v[j] += deviation * deviation;
        }
      });
    };
    if (count == 0) {
      for_groups<T>(0, channels, [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
        decltype(group)::elements(p + c, n).to_channels(base + c, n);
      });
      sums_about(base, some);
      for (int64_t c = 0; c < channels; ++c) {
        mean[c] = first[c] / double(some);  // until the end without the base
        m2[c] = 0;
      }
    }
    for (int64_t c = 0; c < channels; ++c) shift[c] = R(base[c] + mean[c]);
    sums_about(shift, rows);
    for (int64_t c = 0; c < channels; ++c)
      merge.sums(base[c], mean[c], m2[c], shift[c], first[c], second[c]);
    count += rows;
  });
  for (int64_t c = 0; c < channels; ++c) mean[c] += base[c];
  return all_finite(channels, m2);
}

template <class T>
void normalise_rows(const View& x, const View& y, const Tile& t, const Coefficients& k) {
  using R = Real<T>;
  const int64_t begin = t.channel_begin, channels = t.channels();
  const Ordered<T> shifts(k.shifts<R>() + begin, channels), scales(k.scales<R>() + begin, channels),
      offsets(k.offsets<R>() + begin, channels);
  for_row_blocks(x, t, t.positions(), [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    const T* from = x.at<T>(begin, o, i);
    T* to = y.at<T>(begin, o, i);
    over_rows<T>(rows, channels,
                 [&](auto some, auto group, int64_t r, int64_t c, int64_t n) SYNCBN_LAMBDA {
      using G = decltype(group);
      const G shift = shifts.at(group, c, n), scale = scales.at(group, c, n),
              offset = offsets.at(group, c, n);
#pragma GCC unroll 4
      for (int64_t q = r; q < r + some.value; ++q) {
        G v = G::elements(from + q * x.inner_stride + c, n);
#pragma GCC unroll 4
        for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j)
          v.v[j] = (v.v[j] - shift.v[j]) * scale.v[j] + offset.v[j];
        v.to_elements(to + q * y.inner_stride + c, n);
      }
    });
  });
}

template <class T>
bool gradient_sums_rows(const View& dy, const View& x, const Tile& t, const void* shift,
                        double* total, double* dot) {
  using R = Real<T>;
  R first[widest_rows], second[widest_rows];
  const int64_t channels = t.channels(), dy_stride = dy.inner_stride, x_stride = x.inner_stride;
  const Ordered<T> shifts(static_cast<const R*>(shift) + t.channel_begin, channels);
  total += t.channel_begin;
  dot += t.channel_begin;
  for (int64_t c = 0; c < channels; ++c) total[c] = dot[c] = 0;
  for_row_blocks(x, t, row_block, [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    const T *gradient = dy.at<T>(t.channel_begin, o, i), *value = x.at<T>(t.channel_begin, o, i);
    sum_rows<T>(rows, channels, first, second,
                [&](auto group, int64_t r, int64_t c, int64_t n, auto& a, auto& b) SYNCBN_LAMBDA {
      using G = decltype(group);
      const G g = G::elements(gradient + r * dy_stride + c, n),
              v = G::elements(value + r * x_stride + c, n), s = shifts.at(group, c, n);
#pragma GCC unroll 4
      for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j) {
        a.v[j] += g.v[j];
        b.v[j] += g.v[j] * (v.v[j] - s.v[j]);
      }
    });
    for (int64_t c = 0; c < channels; ++c) total[c] += first[c];
    for (int64_t c = 0; c < channels; ++c) dot[c] += second[c];
  });
  return all_finite(channels, total) & all_finite(channels, dot);
}

template <class T>
void input_gradient_rows(const View& dy, const View& x, const View& dx, const Tile& t,
                         const Coefficients& k) {
  using R = Real<T>;
  const int64_t begin = t.channel_begin, channels = t.channels();
  const Ordered<T> shifts(k.shifts<R>() + begin, channels), scales(k.scales<R>() + begin, channels),
      slopes(k.slopes<R>() + begin, channels), offsets(k.offsets<R>() + begin, channels);
  for_row_blocks(x, t, t.positions(), [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    const T *gradient = dy.at<T>(begin, o, i), *value = x.at<T>(begin, o, i);
    T* to = dx.at<T>(begin, o, i);
    over_rows<T>(rows, channels,
                 [&](auto some, auto group, int64_t r, int64_t c, int64_t n) SYNCBN_LAMBDA {
      using G = decltype(group);
      const G shift = shifts.at(group, c, n), scale = scales.at(group, c, n),
              slope = slopes.at(group, c, n), offset = offsets.at(group, c, n);
#pragma GCC unroll 4
      for (int64_t q = r; q < r + some.value; ++q) {
        G g = G::elements(gradient + q * dy.inner_stride + c, n);
        const G v = G::elements(value + q * x.inner_stride + c, n);
#pragma GCC unroll 4
        for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j)
          g.v[j] = g.v[j] * scale.v[j] + ((v.v[j] - shift.v[j]) * slope.v[j] + offset.v[j]);
        g.to_elements(to + q * dx.inner_stride + c, n);
      }
    });
  });
}
