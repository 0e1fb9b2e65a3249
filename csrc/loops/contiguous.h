// Loops over planes: the positions of a channel lie next to each other (inner_stride 1).
//
// Included once per instruction set, inside its namespace (see loops.h).

// The n ≤ lanes elements of p from i on, and `rest` in the other lanes. Where a whole vector ends
// with them it is loaded, which is faster than a part of one.
template <class T>
SYNCBN_INLINE Vector<Real<T>> load_end(const T* p, int64_t i, int64_t n, Vector<Real<T>> rest) {
  using R = Real<T>;
  constexpr int64_t w = lanes<R>;
  if (n == w) return load(p + i);
  if (i + n >= w) return last_or<R>(load(p + i + n - w), n, rest);
  return first_or<R>(load_some(p + i, n), n, rest);
}

// Where a run begins in each channel of a tensor. As far as a compiler knows, stores to tensors can
// change a view but no local variable like this, which it need not read again for every channel.
template <class T>
class Planes {
 public:
  SYNCBN_INLINE Planes(const View& x, const Run& run)
      : first_(x.at<T>(0, run.outer, run.inner)), stride_(x.channel_stride) {}
  SYNCBN_INLINE T* at(int64_t c) const { return first_ + c * stride_; }

 private:
  T* first_;
  int64_t stride_;
};

// A stream (see sum_block) of the terms of Σ(x − shift) and Σ(x − shift)².
template <class T>
struct Deviations {
  using R = Real<T>;
  const T* x;
  int64_t stride;
  Vector<R> shift;

  SYNCBN_INLINE Deviations plane(int64_t n) const { return {x + n * stride, stride, shift}; }
  SYNCBN_INLINE void add(Vector<R> value, Vector<R>& first, Vector<R>& second) const {
    const Vector<R> deviation = value - shift;
    first += deviation;
    second += deviation * deviation;
  }
  SYNCBN_INLINE void pair(int64_t i, Vector<R>* first, Vector<R>* second) const {
    const Pair<R> v = load_pair(x + i);
    add(v.a, first[0], second[0]);
    add(v.b, first[1], second[1]);
  }
  SYNCBN_INLINE void one(int64_t i, int64_t n, Vector<R>& first, Vector<R>& second) const {
    add(load_end(x, i, n, shift), first, second);
  }
};

// A stream of the terms of Σdy and Σdy·(x − shift).
template <class T>
struct Products {
  using R = Real<T>;
  const T *dy, *x;
  int64_t dy_stride, x_stride;
  Vector<R> shift;

  SYNCBN_INLINE Products plane(int64_t n) const {
    return {dy + n * dy_stride, x + n * x_stride, dy_stride, x_stride, shift};
  }
  SYNCBN_INLINE void add(Vector<R> dy, Vector<R> x, Vector<R>& first, Vector<R>& second) const {
    first += dy;
    second += dy * (x - shift);
  }
  SYNCBN_INLINE void pair(int64_t i, Vector<R>* first, Vector<R>* second) const {
    const Pair<R> gradient = load_pair(dy + i), value = load_pair(x + i);
    add(gradient.a, value.a, first[0], second[0]);
    add(gradient.b, value.b, first[1], second[1]);
  }
  SYNCBN_INLINE void one(int64_t i, int64_t n, Vector<R>& first, Vector<R>& second) const {
    add(load_end(dy, i, n, Vector<R>{}), load_end(x, i, n, shift), first, second);
  }
};

// Values are summed about a shift near their mean. Of a channel's first chunk that is the mean of
// its first half, which is read twice. Each later chunk takes the mean so far, and has up to four
// times as many values as came before. That loses nothing: the square of the distance between that
// mean and the chunk's own enters M2 itself, with a weight of n/5 or more for a chunk of n values.
constexpr int64_t first_chunk = 4096;
constexpr int64_t largest_chunk = 16384;

SYNCBN_INLINE Run first_half(const Run& run) {
  if (run.planes == 1) return {run.outer, run.inner, (run.length + 1) / 2, 1};
  return {run.outer, run.inner, run.length, (run.planes + 1) / 2};
}

// Calls body(c, n) for groups of the tile's channels, those of n from c on.
template <class Body>
SYNCBN_INLINE void for_channel_groups(const Tile& t, Body body) {
  for (int64_t c = t.channel_begin; c < t.channel_end; c += channel_group)
    body(c, t.channel_end - c < channel_group ? t.channel_end - c : channel_group);
}

// The moments of a group of channels.
template <class T>
SYNCBN_INLINE void measure_group(const View& x, const Tile& t, int64_t c, int64_t n, double* mean,
                                 double* m2) {
  using R = Real<T>;
  R base[channel_group], shift[channel_group];
  double first[channel_group], second[channel_group];
  auto sum_about_shift = [&](const Run& run, double* second) SYNCBN_LAMBDA {
    const Planes<T> values(x, run);
    auto stream = [&](int64_t q) SYNCBN_LAMBDA {
      return Deviations<T>{values.at(c + q), x.outer_stride, broadcast(shift[q])};
    };
    sum_run<R>(run, n, stream, first, second);
  };
  int64_t count = 0;
  auto most = [&]() SYNCBN_LAMBDA {
    return count == 0 ? first_chunk : count < largest_chunk / 4 ? 4 * count : largest_chunk;
  };
  for_runs(x, t.position_begin, t.position_end, most, [&](const Run& run) SYNCBN_LAMBDA {
    if (count == 0) {
      const Run half = first_half(run);
      const double inverse = 1 / double(half.size());
      for (int64_t q = 0; q < n; ++q)
        base[q] = shift[q] = first_of(x.at<T>(c + q, run.outer, run.inner));
      sum_about_shift(half, nullptr);
      for (int64_t q = 0; q < n; ++q)
        mean[q] = first[q] * inverse;  // until the end without the base
      for (int64_t q = 0; q < n; ++q) m2[q] = 0;
    }
    for (int64_t q = 0; q < n; ++q) shift[q] = R(base[q] + mean[q]);
    sum_about_shift(run, second);
    const Merge merge{double(count), double(run.size())};
    for (int64_t q = 0; q < n; ++q)
      merge.sums(base[q], mean[q], m2[q], shift[q], first[q], second[q]);
    count += run.size();
  });
  for (int64_t q = 0; q < n; ++q) mean[q] += base[q];
}

template <class T>
bool measure_planes(const View& x, const Tile& t, double* mean, double* m2) {
  for_channel_groups(t, [&](int64_t c, int64_t n)
                            SYNCBN_LAMBDA { measure_group<T>(x, t, c, n, mean + c, m2 + c); });
  return all_finite(t.channels(), m2 + t.channel_begin);
}

template <class T>
bool gradient_sums_planes(const View& dy, const View& x, const Tile& t, const void* shift,
                          double* total, double* dot) {
  using R = Real<T>;
  const R* shifts = static_cast<const R*>(shift);
  auto most = []() SYNCBN_LAMBDA { return block; };
  for (int64_t c = t.channel_begin; c < t.channel_end; ++c) total[c] = dot[c] = 0;
  for_channel_groups(t, [&](int64_t c, int64_t n) SYNCBN_LAMBDA {
    double first[channel_group], second[channel_group];
    for_runs(x, t.position_begin, t.position_end, most, [&](const Run& run) SYNCBN_LAMBDA {
      const Planes<T> gradients(dy, run), values(x, run);
      auto stream = [&](int64_t q) SYNCBN_LAMBDA {
        return Products<T>{gradients.at(c + q), values.at(c + q), dy.outer_stride, x.outer_stride,
                           broadcast(shifts[c + q])};
      };
      sum_run<R>(run, n, stream, first, second);
      for (int64_t q = 0; q < n; ++q) total[c + q] += first[q];
      for (int64_t q = 0; q < n; ++q) dot[c + q] += second[q];
    });
  });
  return all_finite(t.channels(), total + t.channel_begin) &
         all_finite(t.channels(), dot + t.channel_begin);
}

// Calls body(run) for runs in one plane each that make up the tile.
template <class Body>
SYNCBN_INLINE void for_planes(const View& x, const Tile& t, Body body) {
  auto most = [&]() SYNCBN_LAMBDA { return x.inner; };
  for_runs(x, t.position_begin, t.position_end, most, body);
}

template <class T>
void normalise_planes(const View& x, const View& y, const Tile& t, const Coefficients& k) {
  using R = Real<T>;
  constexpr int64_t w = lanes<R>;
  const R *shifts = k.shifts<R>(), *scales = k.scales<R>(), *offsets = k.offsets<R>();
  const int64_t begin = t.channel_begin, end = t.channel_end;
  for_planes(x, t, [&](const Run& run) SYNCBN_LAMBDA {
    const Planes<T> values(x, run), results(y, run);
    const int64_t length = run.length, pairs = length / (2 * w) * (2 * w), whole = length / w * w,
                  n = length - whole;
    for (int64_t c = begin; c < end; ++c) {
      const T* from = values.at(c);
      T* to = results.at(c);
      const Vector<R> shift = broadcast(shifts[c]), scale = broadcast(scales[c]),
                      offset = broadcast(offsets[c]);
      auto result = [=](Vector<R> v) SYNCBN_LAMBDA { return (v - shift) * scale + offset; };
      for (int64_t j = 0; j < pairs; j += 2 * w) {
        const Pair<R> v = load_pair(from + j);
        store_pair(to + j, Pair<R>{result(v.a), result(v.b)});
      }
      if (pairs < whole) store(to + pairs, result(load(from + pairs)));
      if (n > 0 && (masked<T> || length < w))
        store_some(to + whole, n, result(load_some(from + whole, n)));
      else if (n > 0)  // the last whole vector, some of it for the second time
        store(to + length - w, result(load(from + length - w)));
    }
  });
}

template <class T>
void input_gradient_planes(const View& dy, const View& x, const View& dx, const Tile& t,
                           const Coefficients& k) {
  using R = Real<T>;
  constexpr int64_t w = lanes<R>;
  const R *shifts = k.shifts<R>(), *scales = k.scales<R>(), *offsets = k.offsets<R>(),
          *slopes = k.slopes<R>();
  const int64_t begin = t.channel_begin, end = t.channel_end;
  for_planes(x, t, [&](const Run& run) SYNCBN_LAMBDA {
    const Planes<T> gradients(dy, run), values(x, run), results(dx, run);
    const int64_t length = run.length, pairs = length / (2 * w) * (2 * w), whole = length / w * w,
                  n = length - whole;
    for (int64_t c = begin; c < end; ++c) {
      const T *g = gradients.at(c), *p = values.at(c);
      T* to = results.at(c);
      const Vector<R> shift = broadcast(shifts[c]), scale = broadcast(scales[c]),
                      slope = broadcast(slopes[c]), offset = broadcast(offsets[c]);
      auto result = [=](Vector<R> dy, Vector<R> x)
                        SYNCBN_LAMBDA { return dy * scale + ((x - shift) * slope + offset); };
      for (int64_t j = 0; j < pairs; j += 2 * w) {
        const Pair<R> gradient = load_pair(g + j), value = load_pair(p + j);
        store_pair(to + j, Pair<R>{result(gradient.a, value.a), result(gradient.b, value.b)});
      }
      if (pairs < whole) store(to + pairs, result(load(g + pairs), load(p + pairs)));
      if (n > 0 && (masked<T> || length < w))
        store_some(to + whole, n, result(load_some(g + whole, n), load_some(p + whole, n)));
      else if (n > 0)
        store(to + length - w, result(load(g + length - w), load(p + length - w)));
    }
  });
}
