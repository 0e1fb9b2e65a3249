// Weight, bias and running statistics: tensors of shape (C,) and of any floating type, read and
// written as doubles. And the counter of batches, of any type that counts.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "loops/types.h"

namespace syncbn {

// A tensor of shape (C,), which an operator's caller may leave out.
struct Parameter {
  bool given = false;
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 1;
};

// Scalars of every element type as doubles and back, rounded to nearest, ties to even; the same
// bits as elements.h gives for vectors.
inline double widen(float v) { return v; }
inline double widen(double v) { return v; }
inline double widen(BFloat16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline double widen(Half v) {
  const uint32_t rest = (v.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &rest, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= (rest >= 0x0f800000u ? 0x7f800000u : 0u) | uint32_t(v.bits & 0x8000u) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void narrow(double v, float* to) { *to = float(v); }
inline void narrow(double v, double* to) { *to = v; }
inline uint32_t float_bits(double v) {
  const float f = float(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline void narrow(double v, BFloat16* to) {
  const uint32_t bits = float_bits(v);
  to->bits = uint16_t(v != v ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(double v, Half* to) {
  const uint32_t bits = float_bits(v), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x47800000u) {
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: the last bit of f + ½ is the smallest half
    float f;
    std::memcpy(&f, &rest, 4);
    half = float_bits(double(f + 0.5f)) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  to->bits = uint16_t(sign | half);
}

// Calls body with the data as a pointer to its own type.
template <class F>
void with_elements(const Parameter& p, F body) {
  switch (p.dtype) {
    case Dtype::float32: return body(static_cast<float*>(p.data));
    case Dtype::float64: return body(static_cast<double*>(p.data));
    case Dtype::bfloat16: return body(static_cast<BFloat16*>(p.data));
    case Dtype::float16: return body(static_cast<Half*>(p.data));
  }
}

// The parameter's values, or `absent` for each channel where it was not given.
inline void read_parameter(const Parameter& p, int64_t channels, double absent, double* to) {
  if (!p.given) {
    for (int64_t c = 0; c < channels; ++c) to[c] = absent;
    return;
  }
  with_elements(p, [&](auto* from) {
    if (p.stride == 1)
      for (int64_t c = 0; c < channels; ++c) to[c] = widen(from[c]);
    else
      for (int64_t c = 0; c < channels; ++c) to[c] = widen(from[c * p.stride]);
  });
}

inline void write_parameter(const Parameter& p, int64_t channels, const double* from) {
  with_elements(p, [&](auto* to) {
    for (int64_t c = 0; c < channels; ++c) narrow(from[c], to + c * p.stride);
  });
}

// Adds one to the number at `data`, in its own type, and returns it.
template <class T>
double increment(void* data) {
  T* number = static_cast<T*>(data);
  if constexpr (std::is_integral_v<T>) {
    *number = T(std::make_unsigned_t<T>(*number) + 1u);
    return double(*number);
  } else {
    narrow(widen(*number) + 1, number);
    return widen(*number);
  }
}

// num_batches_tracked.
struct Counter {
  bool given = false;
  void* data = nullptr;
  double (*increment)(void*) = nullptr;
};

// The running statistics, and how far a batch moves them.
struct Running {
  Parameter mean, var;
  Counter batches;
  bool cumulative = false;  // momentum is None: they are averages over all batches
  double momentum = 0;

  // Counts this batch, and returns the momentum that is the batch's own: the weight of its
  // statistics in the running ones.
  double count_batch() const {
    const double counted = batches.given ? batches.increment(batches.data) : 0;
    if (!cumulative) return momentum;
    return batches.given ? 1 / counted : 0;
  }
};

// Moves channels [begin, end) of the running statistics towards the mean and the unbiased variance
// of `count` values, as (1 − momentum)·old + momentum·new: old + momentum·(new − old) would lose
// all digits of a new value that is small beside the old one.
inline void update_running(const Running& running, int64_t begin, int64_t end, double momentum,
                           double count, const double* mean, const double* m2) {
  if (count == 0 || momentum == 0) return;  // 0·∞ would be no number
  const double unbiased = 1 / (count - 1 < 1 ? 1 : count - 1), kept = 1 - momentum;
  auto move = [&](const Parameter& p, const double* target, double factor) {
    if (!p.given) return;
    with_elements(p, [&](auto* to) {
      for (int64_t c = begin; c < end; ++c) {
        const double old = widen(to[c * p.stride]);
        narrow(kept * old + momentum * (target[c] * factor), to + c * p.stride);
      }
    });
  };
  move(running.mean, mean, 1);
  move(running.var, m2, unbiased);
}

}  // namespace syncbn
