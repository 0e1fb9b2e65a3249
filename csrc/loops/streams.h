// Runs of positions in consecutive planes, and sums over them.
//
// Included once per instruction set, inside its namespace (see loops.h).

// How many values a lane adds up in the arithmetic's own precision before the sum goes on in
// double, which keeps the statistics' rounding near 1e-6 at most, and far below it as a rule. A
// block is what four vectors of sums take.
constexpr int64_t terms = 32;
constexpr int64_t sums_width = 4 * SYNCBN_VECTOR_BYTES / 4;
constexpr int64_t block = terms * sums_width;

// Channels that are summed one after the other, and whose vectors of sums are then added up side by
// side: a vector of floats on every processor.
constexpr int64_t channel_group = 16;

// Part of a tile: `planes` runs of `length` positions, the same in consecutive planes.
struct Run {
  int64_t outer, inner, length, planes;

  SYNCBN_INLINE int64_t size() const { return length * planes; }
};

SYNCBN_INLINE Run first_run(const View& x, int64_t position) {
  return {position / x.inner, position % x.inner, 0, 1};
}

// Calls body(run) for runs that make up positions [begin, end), of up to most() elements. Short
// whole planes come as many at a time as make up a block.
template <class Most, class Body>
SYNCBN_INLINE void for_runs(const View& x, int64_t begin, int64_t end, Most most, Body body) {
  const int64_t together = terms / ((x.inner + sums_width - 1) / sums_width);
  Run run = first_run(x, begin);
  for (int64_t left = end - begin; left > 0;) {
    int64_t bound = most();
    if (bound > left) bound = left;
    run.length = x.inner - run.inner < bound ? x.inner - run.inner : bound;
    run.planes = 1;
    if (run.length == x.inner && together > 1)
      run.planes = bound / x.inner < together ? bound / x.inner : together;
    body(run);
    left -= run.size();
    run.inner += run.length;
    if (run.inner == x.inner) {
      run.inner = 0;
      run.outer += run.planes;
    }
  }
}

// Adds up, over positions [begin, end) of some planes, the pairs of terms that a stream yields. A
// stream has pair(i, first, second), which adds those of the 2·lanes elements from i on to two
// vectors each, and one(i, n, first, second), which adds those of n ≤ lanes elements.
template <class R, class Stream>
SYNCBN_INLINE void sum_block(const Stream& stream, int64_t begin, int64_t end, int64_t planes,
                             Vector<R>& total1, Vector<R>& total2) {
  constexpr int64_t w = lanes<R>;
  const int64_t rest = (end - begin) % (4 * w), many = end - rest, n = rest % w;
  Vector<R> first[4] = {}, second[4] = {};
  for (int64_t plane = 0; plane < planes; ++plane) {
    const auto here = stream.plane(plane);
    for (int64_t i = begin; i < many; i += 4 * w) {
      here.pair(i, first, second);
      here.pair(i + 2 * w, first + 2, second + 2);
    }
    if (rest & (2 * w)) here.pair(many, first, second);
    if (rest & w) here.one(end - n - w, w, first[2], second[2]);
    if (n > 0) here.one(end - n, n, first[3], second[3]);
  }
  total1 = (first[0] + first[1]) + (first[2] + first[3]);
  total2 = (second[0] + second[1]) + (second[2] + second[3]);
}

// Puts the sum of each of n vectors in a number's place, or adds it to the number.
template <class R>
SYNCBN_INLINE void sum_vectors(const Vector<R>* v, int64_t n, bool add, double* to) {
  constexpr int64_t w = lanes<R>;
  int64_t q = 0;
  for (; q + w <= n; q += w) {
    R some[w];
    store(some, sums<R>(v + q));
    for (int64_t j = 0; j < w; ++j) to[q + j] = (add ? to[q + j] : 0) + some[j];
  }
  for (; q < n; ++q) to[q] = (add ? to[q] : 0) + sum<R>(v[q]);
}

// The sums over a run of the two terms of each of n ≤ channel_group channels; stream(q) yields
// those of channel q. The second sums are left out where there is no place for them.
template <class R, class StreamOf>
SYNCBN_INLINE void sum_run(const Run& run, int64_t n, StreamOf stream, double* first,
                           double* second) {
  for (int64_t begin = 0; begin < run.length; begin += block) {
    const int64_t end = run.length - begin < block ? run.length : begin + block;
    Vector<R> firsts[channel_group], seconds[channel_group];
    for (int64_t q = 0; q < n; ++q)
      sum_block<R>(stream(q), begin, end, run.planes, firsts[q], seconds[q]);
    sum_vectors<R>(firsts, n, begin > 0, first);
    if (second) sum_vectors<R>(seconds, n, begin > 0, second);
  }
}
