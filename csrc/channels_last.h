// Loops over rows: the channels of a position lie next to each other (channel_stride 1).
//
// Included once per instruction set, inside its namespace (see loops.h).

// How many rows are summed in the arithmetic's own precision before the sums go on in double, and
// how many channels go through them together, with their sums in a few kilobytes.
constexpr int64_t row_block = 32;
constexpr int64_t few_rows = 16;  // where nothing is summed
constexpr int64_t widest_tile = 512;

// Calls body(first, rows) for each block of at most `most` rows that lie equally spaced.
template <int64_t most, class Body>
SYNCBN_INLINE void for_row_blocks(const View& x, const Tile& t, Body body) {
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

// Neighbouring channels: four vectors of them (as two pairs, in the pairs' order), or one, or the
// first n elements of one.
template <class T, int vectors>
struct Group {
  using R = Real<T>;
  using V = Vector<R>;
  static constexpr int64_t w = lanes<R>;
  V v[vectors];

  static SYNCBN_INLINE Group zero() { return {}; }
  static SYNCBN_INLINE Group elements(const T* p, int64_t n) {
    if constexpr (vectors == 4) {
      const Pair<R> low = load_pair(p), high = load_pair(p + 2 * w);
      return {{low.a, low.b, high.a, high.b}};
    } else {
      return {{n == w ? load(p) : load_some(p, n)}};
    }
  }
  static SYNCBN_INLINE Group channels(const R* p, int64_t n) {
    if constexpr (vectors == 4) {
      const Pair<R> low = load_channels<T>(p), high = load_channels<T>(p + 2 * w);
      return {{low.a, low.b, high.a, high.b}};
    } else {
      return {{n == w ? load(p) : load_some(p, n)}};
    }
  }
  SYNCBN_INLINE void to_elements(T* p, int64_t n) const {
    if constexpr (vectors == 4) {
      store_pair(p, Pair<R>{v[0], v[1]});
      store_pair(p + 2 * w, Pair<R>{v[2], v[3]});
    } else {
      n == w ? store(p, v[0]) : store_some(p, n, v[0]);
    }
  }
  SYNCBN_INLINE void to_channels(R* p, int64_t n) const {
    if constexpr (vectors == 4) {
      store_channels<T>(p, Pair<R>{v[0], v[1]});
      store_channels<T>(p + 2 * w, Pair<R>{v[2], v[3]});
    } else {
      n == w ? store(p, v[0]) : store_some(p, n, v[0]);
    }
  }
};

// Calls body(group, c, n) over the channels [begin, end), where group is any Group of the size to
// use and n < lanes only for a part of a vector.
template <class T, class Body>
SYNCBN_INLINE void for_groups(int64_t begin, int64_t end, Body body) {
  constexpr int64_t w = lanes<Real<T>>;
  int64_t c = begin;
  for (; c + 4 * w <= end; c += 4 * w) body(Group<T, 4>{}, c, w);
  for (; c + w <= end; c += w) body(Group<T, 1>{}, c, w);
  if (c < end) body(Group<T, 1>{}, c, end - c);
}

// Per channel, over the rows of a block: Σ(x − shift) and Σ(x − shift)².
template <class T>
SYNCBN_INLINE void row_sums(const T* x, int64_t rows, int64_t stride, int64_t channels,
                            const Real<T>* shift, Real<T>* first, Real<T>* second) {
  for_groups<T>(0, channels, [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
    using G = decltype(group);
    const G k = G::channels(shift + c, n);
    G a = G::zero(), b = G::zero();
    const T* p = x + c;
    for (int64_t r = 0; r < rows; ++r, p += stride) {
      const G value = G::elements(p, n);
#pragma GCC unroll 4
      for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j) {
        const auto deviation = value.v[j] - k.v[j];
        a.v[j] += deviation;
        b.v[j] += deviation * deviation;
      }
    }
    a.to_channels(first + c, n);
    b.to_channels(second + c, n);
  });
}

template <class T>
void measure_rows(const View& x, const Tile& t, double* mean, double* m2) {
  using R = Real<T>;
  R base[widest_tile], shift[widest_tile], first[widest_tile], second[widest_tile];
  const int64_t begin = t.channel_begin, channels = t.channels();
  mean += begin;
  m2 += begin;
  int64_t count = 0;
  for_row_blocks<row_block>(x, t, [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    const T* p = x.at<T>(begin, o, i);
    const Merge merge{double(count), double(rows)};
    if (count == 0) {
      for_groups<T>(0, channels, [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
        decltype(group)::elements(p + c, n).to_channels(base + c, n);
      });
      row_sums(p, rows, x.inner_stride, channels, base, first, second);
      for (int64_t c = 0; c < channels; ++c) {
        mean[c] = first[c] * merge.inverse2;  // until the end less the base
        m2[c] = 0;
      }
    }
    for (int64_t c = 0; c < channels; ++c) shift[c] = R(base[c] + mean[c]);
    row_sums(p, rows, x.inner_stride, channels, shift, first, second);
    for (int64_t c = 0; c < channels; ++c)
      merge.sums(base[c], mean[c], m2[c], shift[c], first[c], second[c]);
    count += rows;
  });
  for (int64_t c = 0; c < channels; ++c) mean[c] += base[c];
}

template <class T>
void normalise_rows(const View& x, const View& y, const Tile& t, const Coefficients& k) {
  using R = Real<T>;
  for_row_blocks<few_rows>(x, t, [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    for_groups<T>(t.channel_begin, t.channel_end,
                  [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
      using G = decltype(group);
      const G shift = G::channels(k.shifts<R>() + c, n), scale = G::channels(k.scales<R>() + c, n),
              offset = G::channels(k.offsets<R>() + c, n);
      const T* from = x.at<T>(c, o, i);
      T* to = y.at<T>(c, o, i);
      for (int64_t r = 0; r < rows; ++r, from += x.inner_stride, to += y.inner_stride) {
        G v = G::elements(from, n);
#pragma GCC unroll 4
        for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j)
          v.v[j] = (v.v[j] - shift.v[j]) * scale.v[j] + offset.v[j];
        v.to_elements(to, n);
      }
    });
  });
}

template <class T>
void gradient_sums_rows(const View& dy, const View& x, const Tile& t, const void* shifts,
                        double* total, double* dot) {
  using R = Real<T>;
  for (int64_t c = t.channel_begin; c < t.channel_end; ++c) total[c] = dot[c] = 0;
  for_row_blocks<row_block>(x, t, [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    for_groups<T>(t.channel_begin, t.channel_end,
                  [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
      using G = decltype(group);
      constexpr int64_t size = sizeof(G) / sizeof(R);
      const G shift = G::channels(static_cast<const R*>(shifts) + c, n);
      G a = G::zero(), b = G::zero();
      const T *gradient = dy.at<T>(c, o, i), *value = x.at<T>(c, o, i);
      for (int64_t r = 0; r < rows; ++r, gradient += dy.inner_stride, value += x.inner_stride) {
        const G g = G::elements(gradient, n), v = G::elements(value, n);
#pragma GCC unroll 4
        for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j) {
          a.v[j] += g.v[j];
          b.v[j] += g.v[j] * (v.v[j] - shift.v[j]);
        }
      }
      R first[size], second[size];
      a.to_channels(first, lanes<R>);
      b.to_channels(second, lanes<R>);
      const int64_t some = n < lanes<R> ? n : size;
      for (int64_t j = 0; j < some; ++j) total[c + j] += first[j];
      for (int64_t j = 0; j < some; ++j) dot[c + j] += second[j];
    });
  });
}

template <class T>
void input_gradient_rows(const View& dy, const View& x, const View& dx, const Tile& t,
                         const Coefficients& k) {
  using R = Real<T>;
  for_row_blocks<few_rows>(x, t, [&](int64_t o, int64_t i, int64_t rows) SYNCBN_LAMBDA {
    for_groups<T>(t.channel_begin, t.channel_end,
                  [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
      using G = decltype(group);
      const G shift = G::channels(k.shifts<R>() + c, n), scale = G::channels(k.scales<R>() + c, n),
              slope = G::channels(k.slopes<R>() + c, n), offset = G::channels(k.offsets<R>() + c, n);
      const T *gradient = dy.at<T>(c, o, i), *value = x.at<T>(c, o, i);
      T* to = dx.at<T>(c, o, i);
      for (int64_t r = 0; r < rows; ++r) {
        G g = G::elements(gradient, n);
        const G v = G::elements(value, n);
#pragma GCC unroll 4
        for (unsigned j = 0; j < sizeof(G) / sizeof(G::v[0]); ++j)
          g.v[j] = g.v[j] * scale.v[j] + ((v.v[j] - shift.v[j]) * slope.v[j] + offset.v[j]);
        g.to_elements(to, n);
        gradient += dy.inner_stride;
        value += x.inner_stride;
        to += dx.inner_stride;
      }
    });
  });
}
