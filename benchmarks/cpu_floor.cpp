// The plain two-pass loops that cpu_floor.py compiles: float32, one thread. Sums are plain float32
// sums, so these are no way to normalise; they are what reading and writing the tensors costs.
#include <cmath>
#include <cstdint>
#include <vector>

#include "plan/huge_pages.h"

namespace {

constexpr float eps = 1e-5f;

// y = scale·x + shift
void apply(const float* __restrict x, float* __restrict y, int64_t n, float scale, float shift) {
  for (int64_t i = 0; i < n; ++i) y[i] = scale * x[i] + shift;
}

// dx = scale·dy + slope·x + shift
void apply(const float* __restrict dy, const float* __restrict x, float* __restrict dx, int64_t n,
           float scale, float slope, float shift) {
  for (int64_t i = 0; i < n; ++i) dx[i] = scale * dy[i] + slope * x[i] + shift;
}

void add_up(const float* x, int64_t n, float& sum, float& squares) {
  float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < n; ++i) a += x[i], b += x[i] * x[i];
  sum += a, squares += b;
}

void add_up(const float* dy, const float* x, int64_t n, float& sum, float& dot) {
  float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < n; ++i) a += dy[i], b += dy[i] * x[i];
  sum += a, dot += b;
}

// From the two sums of n values of a channel to mean and invstd, in their place.
void finish_forward(float n, float& mean, float& invstd) {
  mean /= n;
  invstd = 1 / std::sqrt(invstd / n - mean * mean + eps);
}

// From the sums of dy and of dy·x to what the second pass applies: slope and shift, in their place.
void finish_backward(float n, float mean, float invstd, float& sum, float& dot) {
  const float slope = -invstd * invstd * invstd * (dot - mean * sum) / n;
  dot = -invstd * sum / n - slope * mean;
  sum = slope;
}

}  // namespace

// x of shape (outer, channels, inner), contiguous. saved: means, then inverse deviations.
extern "C" void forward_planes(const float* x, float* y, float* saved, int64_t outer,
                               int64_t channels, int64_t inner) {
  syncbn::ask_for_huge_pages(y, outer * channels * inner * int64_t(sizeof(float)));
  for (int64_t c = 0; c < channels; ++c) {
    float mean = 0, invstd = 0;
    for (int64_t n = 0; n < outer; ++n) add_up(x + (n * channels + c) * inner, inner, mean, invstd);
    finish_forward(float(outer * inner), mean, invstd);
    for (int64_t n = 0; n < outer; ++n) {
      const int64_t at = (n * channels + c) * inner;
      apply(x + at, y + at, inner, invstd, -mean * invstd);
    }
    saved[c] = mean, saved[channels + c] = invstd;
  }
}

extern "C" void backward_planes(const float* dy, const float* x, float* dx, const float* saved,
                                int64_t outer, int64_t channels, int64_t inner) {
  syncbn::ask_for_huge_pages(dx, outer * channels * inner * int64_t(sizeof(float)));
  for (int64_t c = 0; c < channels; ++c) {
    float sum = 0, dot = 0;
    for (int64_t n = 0; n < outer; ++n) {
      const int64_t at = (n * channels + c) * inner;
      add_up(dy + at, x + at, inner, sum, dot);
    }
    const float invstd = saved[channels + c];
    finish_backward(float(outer * inner), saved[c], invstd, sum, dot);
    for (int64_t n = 0; n < outer; ++n) {
      const int64_t at = (n * channels + c) * inner;
      apply(dy + at, x + at, dx + at, inner, invstd, sum, dot);
    }
  }
}

// x of shape (rows, channels), contiguous: as channels_last lies in memory.
extern "C" void forward_rows(const float* x, float* y, float* saved, int64_t rows,
                             int64_t channels) {
  syncbn::ask_for_huge_pages(y, rows * channels * int64_t(sizeof(float)));
  std::vector<float> sums(2 * size_t(channels));
  float* __restrict mean = sums.data();
  float* __restrict invstd = mean + channels;
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict row = x + r * channels;
    for (int64_t c = 0; c < channels; ++c) mean[c] += row[c], invstd[c] += row[c] * row[c];
  }
  for (int64_t c = 0; c < channels; ++c) finish_forward(float(rows), mean[c], invstd[c]);
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict row = x + r * channels;
    float* __restrict out = y + r * channels;
    for (int64_t c = 0; c < channels; ++c) out[c] = (row[c] - mean[c]) * invstd[c];
  }
  for (int64_t c = 0; c < 2 * channels; ++c) saved[c] = sums[size_t(c)];
}

extern "C" void backward_rows(const float* dy, const float* x, float* dx, const float* saved,
                              int64_t rows, int64_t channels) {
  syncbn::ask_for_huge_pages(dx, rows * channels * int64_t(sizeof(float)));
  std::vector<float> sums(2 * size_t(channels));
  float* __restrict sum = sums.data();
  float* __restrict dot = sum + channels;
  const float* __restrict invstd = saved + channels;
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict a = dy + r * channels;
    const float* __restrict b = x + r * channels;
    for (int64_t c = 0; c < channels; ++c) sum[c] += a[c], dot[c] += a[c] * b[c];
  }
  for (int64_t c = 0; c < channels; ++c)
    finish_backward(float(rows), saved[c], invstd[c], sum[c], dot[c]);
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict a = dy + r * channels;
    const float* __restrict b = x + r * channels;
    float* __restrict out = dx + r * channels;
    for (int64_t c = 0; c < channels; ++c) out[c] = invstd[c] * a[c] + sum[c] * b[c] + dot[c];
  }
}
