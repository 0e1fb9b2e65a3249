// The moments and the gradient sums of samples, added up so that no split of the batch changes
// them. The method and its proof stand in src/syncbn/numerics/reproducible.py.
#pragma once

#include <algorithm>

#include "steps/steps.h"

namespace syncbn {

// Calls part(begin, end, sums) for parts of the samples, each with accumulators of its own to add
// to, and unites them in `result`. Parts run in parallel, unless a sample alone has work for all
// threads. result: `sets` accumulators of `columns` sums, one after the other.
template <class Part>
void accumulate_in_parts(const Parallel& parallel, const ReproducibleLoops& loops, int64_t samples,
                         int64_t elements, int64_t sets, int64_t columns, double* result,
                         Part part) {
  int64_t parts = elements / 32768;  // see make_work
  if (parts >= 2 * samples) parts = 1;
  parts = at_least_one(std::min({parts, samples, parallel.threads}));
  const int64_t set = accumulator_rows * columns, size = sets * set;
  Scratch scratch((parts - 1) * size);
  double* others = scratch.take((parts - 1) * size);
  auto sums_of = [&](int64_t k) { return k == 0 ? result : others + (k - 1) * size; };
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double* sums = sums_of(k);
      for (int64_t j = 0; j < size; ++j) sums[j] = j % set < columns ? lowest_top : 0;
      part(samples * k / parts, samples * (k + 1) / parts, sums);
    }
  });
  for (int64_t k = 1; k < parts; ++k)
    for (int64_t s = 0; s < sets; ++s)
      loops.unite(columns, sums_of(k) + s * set, result + s * set, columns);
}

// Calls batch(begin, n, rows) for samples [begin, end), n at a time, and so few that `rows`, with
// room for `size` numbers of each, fit into the cache.
template <class Batch>
void in_batches(int64_t begin, int64_t end, int64_t size, Batch batch) {
  const int64_t most = std::min(std::max<int64_t>(32768 / size, 8), end - begin);
  Scratch scratch(most * size);
  double* rows = scratch.take(most * size);
  for (; begin < end; begin += most) batch(begin, std::min(most, end - begin), rows);
}

// Adds Σ n·mean and Σ (M2 + n·mean²) per channel to two accumulators, over samples [begin, end), of
// which moments(n, packed) gives the moments.
template <class Moments>
void add_moments(const ReproducibleLoops& loops, int64_t channels, int64_t begin, int64_t end,
                 double* sums, Moments moments) {
  constexpr int64_t block = 128;
  const int64_t row = 1 + 2 * channels;
  in_batches(begin, end, row + 6 * block, [&](int64_t first, int64_t n, double* rows) {
    double *firsts = rows + n * row, *seconds = firsts + 2 * n * block;
    for (int64_t s = 0; s < n; ++s) moments(first + s, rows + s * row);
    for (int64_t c = 0; c < channels; c += block) {
      const int64_t some = std::min(channels - c, block);
      for (int64_t s = 0; s < n; ++s) {
        const double *packed = rows + s * row, *mean = packed + 1 + c;
        loops.moment_terms(some, packed[0], mean, mean + channels, firsts + 2 * s * some,
                           seconds + 4 * s * some);
      }
      loops.add(firsts, 2 * n, some, sums + c, channels);
      loops.add(seconds, 4 * n, some, sums + accumulator_rows * channels + c, channels);
    }
  });
}

// The same over samples of one value per channel, which values(n, row) gives. exact: whether a
// double holds the values' squares as they are.
template <class Values>
void add_values(const ReproducibleLoops& loops, int64_t channels, bool exact, int64_t begin,
                int64_t end, double* sums, Values values) {
  in_batches(begin, end, 3 * channels, [&](int64_t first, int64_t n, double* rows) {
    double* squares = rows + n * channels;
    for (int64_t s = 0; s < n; ++s) values(first + s, rows + s * channels);
    loops.squares(n * channels, rows, squares, squares + n * channels);
    loops.add(rows, n, channels, sums, channels);
    loops.add(squares, exact ? n : 2 * n, channels, sums + accumulator_rows * channels, channels);
  });
}

// Adds rows of numbers, one per sample, to an accumulator; row(n, numbers) gives them.
template <class Row>
void add_rows(const ReproducibleLoops& loops, int64_t columns, int64_t begin, int64_t end,
              double* sums, Row row) {
  in_batches(begin, end, columns, [&](int64_t first, int64_t n, double* rows) {
    for (int64_t s = 0; s < n; ++s) row(first + s, rows + s * columns);
    loops.add(rows, n, columns, sums, columns);
  });
}

// The packed moments of the union of what `ranks` ranks sent, `stride` numbers apart: each a count
// and two accumulators.
inline void merge_accumulators(const ReproducibleLoops& loops, const double* received,
                               int64_t ranks, int64_t stride, int64_t channels, double* packed) {
  Scratch scratch(4 * channels);
  double* sums[4];
  for (double*& sum : sums) sum = scratch.take(channels);
  packed[0] = 0;
  for (int64_t r = 0; r < ranks; ++r) packed[0] += received[r * stride];
  loops.finalise(received + 1, ranks, stride, channels, sums[0], sums[1]);
  loops.finalise(received + 1 + accumulator_rows * channels, ranks, stride, channels, sums[2],
                 sums[3]);
  loops.moments_of_sums(channels, packed[0], sums[0], sums[1], sums[2], sums[3], packed + 1,
                        packed + 1 + channels);
}

}  // namespace syncbn
