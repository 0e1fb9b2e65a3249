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

// A stream (see sum_stream) of the terms of Σ(x − shift) and Σ(x − shift)².
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

template <class T>
bool measure_planes(const View& x, const Tile& t, double* mean, double* m2) {
  using R = Real<T>;
  const Run start = first_run(x, t.position_begin);
  int64_t count = 0;
  auto most = [&]() SYNCBN_LAMBDA {
    return count == 0 ? first_chunk : count < largest_chunk / 4 ? 4 * count : largest_chunk;
  };
  for_runs(x, t.position_begin, t.position_end, most, [&](const Run& run) SYNCBN_LAMBDA {
    const int64_t n = run.length * run.planes;
    const Merge merge{double(count), double(n)};
    for (int64_t c = t.channel_begin; c < t.channel_end; ++c) {
      const T* p = x.at<T>(c, run.outer, run.inner);
      const R base = first_of(x.at<T>(c, start.outer, start.inner));
      auto sums_about = [&](R shift) SYNCBN_LAMBDA {
        return sum_stream<R>(run.length, run.planes,
                             Deviations<T>{p, x.outer_stride, broadcast<R>(shift)});
      };
      if (count == 0) {
        mean[c] = sums_about(base).first * merge.inverse2;  // until the end without the base
        m2[c] = 0;
      }
      const R shift = R(base + mean[c]);
      const Sums s = sums_about(shift);
      merge.sums(base, mean[c], m2[c], shift, s.first, s.second);
    }
    count += n;
  });
  for (int64_t c = t.channel_begin; c < t.channel_end; ++c)
    mean[c] += first_of(x.at<T>(c, start.outer, start.inner));
  return all_finite(t.channels(), m2 + t.channel_begin);
}

template <class T>
bool gradient_sums_planes(const View& dy, const View& x, const Tile& t, const void* shifts,
                          double* total, double* dot) {
  using R = Real<T>;
  for (int64_t c = t.channel_begin; c < t.channel_end; ++c) total[c] = dot[c] = 0;
  auto most = []() SYNCBN_LAMBDA { return block; };
  for_runs(x, t.position_begin, t.position_end, most, [&](const Run& run) SYNCBN_LAMBDA {
    for (int64_t c = t.channel_begin; c < t.channel_end; ++c) {
      const Products<T> products{dy.at<T>(c, run.outer, run.inner),
                                 x.at<T>(c, run.outer, run.inner), dy.outer_stride, x.outer_stride,
                                 broadcast(static_cast<const R*>(shifts)[c])};
      const Sums s = sum_stream<R>(run.length, run.planes, products);
      total[c] += s.first;
      dot[c] += s.second;
    }
  });
  return all_finite(t.channels(), total + t.channel_begin) &
         all_finite(t.channels(), dot + t.channel_begin);
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
  for_planes(x, t, [&](const Run& run) SYNCBN_LAMBDA {
    const Planes<T> values(x, run), results(y, run);
    const int64_t length = run.length;
    for (int64_t c = t.channel_begin; c < t.channel_end; ++c) {
      const T* from = values.at(c);
      T* to = results.at(c);
      const Vector<R> shift = broadcast(k.shifts<R>()[c]), scale = broadcast(k.scales<R>()[c]),
                      offset = broadcast(k.offsets<R>()[c]);
      auto result = [=](Vector<R> v) SYNCBN_LAMBDA { return (v - shift) * scale + offset; };
      int64_t j = 0;
      for (; j + 2 * w <= length; j += 2 * w) {
        const Pair<R> v = load_pair(from + j);
        store_pair(to + j, Pair<R>{result(v.a), result(v.b)});
      }
      if (j + w < length) {
        store(to + j, result(load(from + j)));
        j += w;
      }
      const int64_t n = length - j;
      if (n > 0 && length >= w)  // the last whole vector, some of it for the second time
        store(to + length - w, result(load(from + length - w)));
      else if (n > 0)
        store_some(to + j, n, result(load_some(from + j, n)));
    }
  });
}

template <class T>
void input_gradient_planes(const View& dy, const View& x, const View& dx, const Tile& t,
                           const Coefficients& k) {
  using R = Real<T>;
  constexpr int64_t w = lanes<R>;
  for_planes(x, t, [&](const Run& run) SYNCBN_LAMBDA {
    const Planes<T> gradients(dy, run), values(x, run), results(dx, run);
    const int64_t length = run.length;
    for (int64_t c = t.channel_begin; c < t.channel_end; ++c) {
      const T *g = gradients.at(c), *p = values.at(c);
      T* to = results.at(c);
      const Vector<R> shift = broadcast(k.shifts<R>()[c]), scale = broadcast(k.scales<R>()[c]),
                      slope = broadcast(k.slopes<R>()[c]), offset = broadcast(k.offsets<R>()[c]);
      auto result = [=](Vector<R> dy, Vector<R> x)
                        SYNCBN_LAMBDA { return dy * scale + ((x - shift) * slope + offset); };
      int64_t j = 0;
      for (; j + 2 * w <= length; j += 2 * w) {
        const Pair<R> gradient = load_pair(g + j), value = load_pair(p + j);
        store_pair(to + j, Pair<R>{result(gradient.a, value.a), result(gradient.b, value.b)});
      }
      if (j + w < length) {
        store(to + j, result(load(g + j), load(p + j)));
        j += w;
      }
      const int64_t n = length - j;
      if (n > 0 && length >= w)
        store(to + length - w, result(load(g + length - w), load(p + length - w)));
      else if (n > 0)
        store_some(to + j, n, result(load_some(g + j, n), load_some(p + j, n)));
    }
  });
}
