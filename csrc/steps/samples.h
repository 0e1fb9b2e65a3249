// The moments and gradient sums of samples, added up so that no split of the batch changes them.
// Method, proof and shapes: src/syncbn/numerics/reproducible.py.
#pragma once

#include <algorithm>

#include "steps/steps.h"

namespace syncbn {

// Calls part(begin, end, sums) for parts of the samples, each with sums of its own to add to, in
// parallel where a sample alone is not worth it. result: `sets` representations of `columns` sums.
template <class Part>
void add_up(const Parallel& parallel, const ReproducibleLoops& loops, int64_t samples,
            int64_t elements, int64_t sets, int64_t columns, double* result, Part part) {
  int64_t parts = elements / 32768;  // see make_work
  if (parts >= 2 * samples) parts = 1;
  parts = at_least_one(std::min({parts, samples, parallel.threads}));
  const int64_t set = represented * columns, size = sets * set;
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

// Calls some(begin, n, rows) for samples [begin, end), n at a time: `rows` have room for `size`
// numbers of each, which the cache holds.
template <class Some>
void some_at_a_time(int64_t begin, int64_t end, int64_t size, Some some) {
  const int64_t most = std::min(std::max<int64_t>(32768 / size, 8), end - begin);
  Scratch scratch(most * size);
  double* rows = scratch.take(most * size);
  for (; begin < end; begin += most) some(begin, std::min(most, end - begin), rows);
}

// Adds Σ n·mean and Σ (M2 + n·mean²) per channel, in two representations, over samples of which
// moments(n, packed) gives the moments.
template <class Moments>
void add_moments(const ReproducibleLoops& loops, int64_t channels, int64_t begin, int64_t end,
                 double* sums, Moments moments) {
  constexpr int64_t block = 128;
  const int64_t row = 1 + 2 * channels;
  some_at_a_time(begin, end, row + 6 * block, [&](int64_t first, int64_t n, double* rows) {
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
      loops.add(seconds, 4 * n, some, sums + represented * channels + c, channels);
    }
  });
}

// The same over samples of one value per channel, which values(n, row) gives.
// exact: whether their squares are doubles.
template <class Values>
void add_values(const ReproducibleLoops& loops, int64_t channels, bool exact, int64_t begin,
                int64_t end, double* sums, Values values) {
  some_at_a_time(begin, end, 3 * channels, [&](int64_t first, int64_t n, double* rows) {
    double* squares = rows + n * channels;
    for (int64_t s = 0; s < n; ++s) values(first + s, rows + s * channels);
    loops.squares(n * channels, rows, squares, squares + n * channels);
    loops.add(rows, n, channels, sums, channels);
    loops.add(squares, exact ? n : 2 * n, channels, sums + represented * channels, channels);
  });
}

// Adds rows of numbers, which row(n, numbers) gives.
template <class Row>
void add_rows(const ReproducibleLoops& loops, int64_t columns, int64_t begin, int64_t end,
              double* sums, Row row) {
  some_at_a_time(begin, end, columns, [&](int64_t first, int64_t n, double* rows) {
    for (int64_t s = 0; s < n; ++s) row(first + s, rows + s * columns);
    loops.add(rows, n, columns, sums, columns);
  });
}

// Packed moments of the union of what `ranks` ranks sent.
inline void merge_represented(const ReproducibleLoops& loops, const double* received,
                              int64_t ranks, int64_t stride, int64_t channels, double* packed) {
  Scratch scratch(4 * channels);
  double* sums[4];
  for (double*& sum : sums) sum = scratch.take(channels);
  packed[0] = 0;
  for (int64_t r = 0; r < ranks; ++r) packed[0] += received[r * stride];
  loops.total(received + 1, ranks, stride, channels, sums[0], sums[1]);
  loops.total(received + 1 + represented * channels, ranks, stride, channels, sums[2], sums[3]);
  loops.moments_of_sums(channels, packed[0], sums[0], sums[1], sums[2], sums[3], packed + 1,
                        packed + 1 + channels);
}

}  // namespace syncbn
