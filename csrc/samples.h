// The moments and gradient sums of samples, added up so that no split of the batch changes them.
// Formulas and shapes: src/syncbn/reproducible.py.
#pragma once

#include "steps.h"

namespace syncbn {

// What a rank sends: its count, and the representations of both sums of its samples' moments.
// samples: `n` rows of packed moments.
inline void represent_moments(const ReproducibleLoops& loops, const double* samples, int64_t n,
                              int64_t channels, double* result) {
  result[0] = 0;
  const int64_t row = 1 + 2 * channels, block = 128;  // channels whose terms the cache holds
  for (int64_t s = 0; s < n; ++s) result[0] += samples[s * row];
  Scratch scratch(6 * n * block);
  double *firsts = scratch.take(2 * n * block), *seconds = scratch.take(4 * n * block);
  for (int64_t c = 0; c < channels; c += block) {
    const int64_t some = channels - c < block ? channels - c : block;
    for (int64_t s = 0; s < n; ++s) {
      const double *sample = samples + s * row, *mean = sample + 1 + c;
      loops.moment_terms(some, sample[0], mean, mean + channels, firsts + 2 * s * some,
                         seconds + 4 * s * some);
    }
    loops.represent(firsts, 2 * n, some, result + 1 + c, channels);
    loops.represent(seconds, 4 * n, some, result + 1 + loops.numbers * channels + c, channels);
  }
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
  loops.total(received + 1 + loops.numbers * channels, ranks, stride, channels, sums[2], sums[3]);
  loops.moments_of_sums(channels, packed[0], sums[0], sums[1], sums[2], sums[3], packed + 1,
                        packed + 1 + channels);
}

}  // namespace syncbn
