// Runs of positions in consecutive planes, and sums over them.
//
// Included once per instruction set, inside its namespace (see loops.h).

// How many elements are summed in the arithmetic's own precision before the sum goes on in double:
// 32 for each lane of the four vectors of sums, which keeps the statistics' rounding below 1e-6.
constexpr int64_t block = 32 * 4 * SYNCBN_VECTOR_BYTES / 4;
// Values are summed about a shift near their mean. The first chunk of a channel's values is read
// twice: its own mean is the shift. Each later chunk takes the mean so far, and has up to four
// times as many values as came before. That loses nothing: the square of the distance between that
// mean and the chunk's own enters M2 itself, with a weight of n/5 or more for a chunk of n values.
constexpr int64_t first_chunk = 1024;
constexpr int64_t largest_chunk = 16384;

struct Sums {
  double first, second;
};

// Part of a tile: `planes` runs of `length` positions, the same in consecutive planes.
struct Run {
  int64_t outer, inner, length, planes;
};

SYNCBN_INLINE Run first_run(const View& x, int64_t position) {
  return {position / x.inner, position % x.inner, 0, 1};
}

// Calls body(run) for runs that make up positions [begin, end). Short whole planes come several at
// a time, up to most() elements.
template <class Most, class Body>
SYNCBN_INLINE void for_runs(const View& x, int64_t begin, int64_t end, Most most, Body body) {
  Run run = first_run(x, begin);
  for (int64_t left = end - begin; left > 0;) {
    const int64_t bound = most();
    run.length = x.inner - run.inner < left ? x.inner - run.inner : left;
    if (run.length > bound) run.length = bound;
    run.planes = 1;
    if (run.length == x.inner) {
      const int64_t whole = left / x.inner, some = (bound < block ? bound : block) / x.inner;
      run.planes = some < 1 ? 1 : whole < some ? whole : some;
    }
    body(run);
    left -= run.length * run.planes;
    run.inner += run.length;
    if (run.inner == x.inner) {
      run.inner = 0;
      run.outer += run.planes;
    }
  }
}

// Adds up the pairs of terms that a stream yields. A stream has pair(i, first, second), which adds
// those of the 2·lanes elements from i on to two vectors each, and one(i, n, first, second), which
// adds those of n ≤ lanes elements.
template <class R, class Stream>
SYNCBN_INLINE Sums sum_stream(int64_t length, int64_t planes, Stream stream) {
  constexpr int64_t w = lanes<R>;
  Sums sums{0, 0};
  for (int64_t start = 0; start < length; start += block) {
    const int64_t end = length - start < block ? length : start + block;
    Vector<R> first[4] = {}, second[4] = {};
    for (int64_t plane = 0; plane < planes; ++plane) {
      const auto here = stream.plane(plane);
      int64_t i = start;
      for (; i + 4 * w <= end; i += 4 * w) {
        here.pair(i, first, second);
        here.pair(i + 2 * w, first + 2, second + 2);
      }
      if (i + 2 * w <= end) {
        here.pair(i, first, second);
        i += 2 * w;
      }
      if (i + w <= end) {
        here.one(i, w, first[2], second[2]);
        i += w;
      }
      if (i < end) here.one(i, end - i, first[3], second[3]);
    }
    sums.first += sum<R>((first[0] + first[1]) + (first[2] + first[3]));
    sums.second += sum<R>((second[0] + second[1]) + (second[2] + second[3]));
  }
  return sums;
}
