// Weight, bias and running statistics: (C,) tensors of any floating type, read and written as double.
// And the counter of batches, of any type that counts.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "loops/types.h"

namespace syncbn {

struct Parameter {
  bool given = false;
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 1;
};

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

template <class F>
void with_elements(const Parameter& p, F body) {
  switch (p.dtype) {
    case Dtype::float32: return body(static_cast<float*>(p.data));
    case Dtype::float64: return body(static_cast<double*>(p.data));
    case Dtype::bfloat16: return body(static_cast<BFloat16*>(p.data));
    case Dtype::float16: return body(static_cast<Half*>(p.data));
  }
}

inline void read(const Parameter& p, int64_t channels, double otherwise, double* to) {
  if (!p.given) {
    for (int64_t c = 0; c < channels; ++c) to[c] = otherwise;
    return;
  }
  with_elements(p, [&](auto* from) {
    if (p.stride == 1)
      for (int64_t c = 0; c < channels; ++c) to[c] = widen(from[c]);
    else
      for (int64_t c = 0; c < channels; ++c) to[c] = widen(from[c * p.stride]);
  });
}

inline void write(const Parameter& p, int64_t channels, const double* from) {
  with_elements(p, [&](auto* to) {
    for (int64_t c = 0; c < channels; ++c) narrow(from[c], to + c * p.stride);
  });
}

// Adds one to the number at `data`, in its own type, and returns it.
template <class T>
double count_on(void* data) {
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
  double (*count_on)(void*) = nullptr;
};

// The running statistics and how they follow the batches'.
struct Running {
  Parameter mean, var;
  Counter batches;
  bool cumulative = false;  // momentum None: the average over all batches
  double momentum = 0;

  // Counts this batch; returns its weight.
  double step() const {
    const double counted = batches.given ? batches.count_on(batches.data) : 0;
    if (!cumulative) return momentum;
    return batches.given ? 1 / counted : 0;
  }
};

// Channels [begin, end) of the running statistics move by `step` towards the mean and unbiased
// variance of `count` values: (1 − step)·old + step·new, which keeps a small one beside a large.
inline void move_running(const Running& running, int64_t begin, int64_t end, double step,
                         double count, const double* mean, const double* m2) {
  if (step == 0) return;  // 0·∞ would be no number
  const double unbiased = 1 / (count - 1 < 1 ? 1 : count - 1), kept = 1 - step;
  auto move = [&](const Parameter& p, const double* target, double factor) {
    if (!p.given) return;
    with_elements(p, [&](auto* to) {
      for (int64_t c = begin; c < end; ++c) {
        const double old = widen(to[c * p.stride]);
        narrow(kept * old + step * (target[c] * factor), to + c * p.stride);
      }
    });
  };
  move(running.mean, mean, 1);
  move(running.var, m2, unbiased);
}

}  // namespace syncbn
