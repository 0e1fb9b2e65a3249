// What the loops and their callers agree on: element types, views of tensors, tables of loops.
#pragma once

#include <cstdint>

// For functions of which no object file may keep a copy. The linker takes one of several equal
// copies for all files: one compiled for a new processor would crash an old one.
#define SYNCBN_INLINE inline __attribute__((always_inline))
#define SYNCBN_LAMBDA __attribute__((always_inline))

namespace syncbn {

enum class Dtype : int { float32, float64, bfloat16, float16 };
constexpr int dtypes = 4;

// Torch's own types (torch/headeronly/util) would do as well, and would make the loops depend on
// torch's headers. Here they are only names: elements.h converts whole vectors of bits.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type in which loops over elements of type T compute: T's own or, of the short types, float.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using Real = typename Arithmetic<T>::type;

// A tensor as channels × positions. Positions run over `outer` × `inner`; strides count elements.
// Two layouts have loops: planes (inner_stride 1, as in contiguous NCHW) and rows (channel_stride
// 1, as in channels_last or (N, C)).
struct View {
  char* data;
  int64_t channels, outer, inner;
  int64_t channel_stride, outer_stride, inner_stride;

  SYNCBN_INLINE int64_t positions() const { return outer * inner; }

  template <class T>
  SYNCBN_INLINE T* at(int64_t channel, int64_t o, int64_t i) const {
    return reinterpret_cast<T*>(data) + channel * channel_stride + o * outer_stride +
           i * inner_stride;
  }
};

enum class Layout : int { planes, rows };
constexpr int layouts = 2;

constexpr int64_t widest_rows = 2048;  // a tile of rows has at most as many channels

// A part of a view: the unit of work.
struct Tile {
  int64_t channel_begin, channel_end, position_begin, position_end;

  SYNCBN_INLINE int64_t channels() const { return channel_end - channel_begin; }
  SYNCBN_INLINE int64_t positions() const { return position_end - position_begin; }
};

// Per-channel coefficients of y = (x − shift)·scale + offset and of
// dx = dy·scale + (x − shift)·slope + offset: arrays of the arithmetic's type. The shift is the
// mean rounded to that type: subtracting it is exact where it matters, whatever the mean is.
struct Coefficients {
  void *shift, *scale, *offset, *slope;

  template <class R>
  SYNCBN_INLINE R* shifts() const {
    return static_cast<R*>(shift);
  }
  template <class R>
  SYNCBN_INLINE R* scales() const {
    return static_cast<R*>(scale);
  }
  template <class R>
  SYNCBN_INLINE R* offsets() const {
    return static_cast<R*>(offset);
  }
  template <class R>
  SYNCBN_INLINE R* slopes() const {
    return static_cast<R*>(slope);
  }
};

// What the coefficients are made of, per channel.
struct ChannelValues {
  const double *mean, *invstd, *weight, *bias;
};

// The loops over elements, for one element type and layout. Arrays are indexed by channel.
struct Loops {
  // The moments of each channel of the tile: its mean, and M2, the sum of its squared deviations
  // from the mean. Returns whether all M2 are finite.
  bool (*measure)(const View& x, const Tile&, double* mean, double* m2);
  void (*normalise)(const View& x, const View& y, const Tile&, const Coefficients&);
  // Σdy and Σdy·(x − shift). Returns whether all are finite.
  bool (*gradient_sums)(const View& dy, const View& x, const Tile&, const void* shift,
                        double* total, double* dot);
  void (*input_gradient)(const View& dy, const View& x, const View& dx, const Tile&,
                         const Coefficients&);
};

// The loops over channels, for one type of arithmetic; see moments.h.
struct ChannelLoops {
  // Merges into the moments of n1 values, whose mean is base + offset, those of n2 more.
  void (*merge_moments)(int64_t channels, double n1, const double* base, double* offset, double* m2,
                        double n2, const double* mean2, const double* m22);
  // invstd = (M2 / count + eps)^(−1/2).
  void (*inverse_deviation)(int64_t channels, double count, const double* m2, double eps,
                            double* invstd);
  // The coefficients of y and of dx. They return whether the arithmetic's type can hold all of
  // them; in a channel where it cannot, the scale becomes NaN, and steps/tiles.h computes with
  // doubles.
  bool (*forward_coefficients)(int64_t channels, const ChannelValues&, const Coefficients&);
  bool (*backward_coefficients)(int64_t channels, double count, const ChannelValues&,
                                const double* total, const double* projection, const Coefficients&);
  // The shifts alone: the means in the arithmetic's type.
  void (*round_means)(int64_t channels, const double* mean, void* shift);
  // Turns Σdy·(x − shift) into Σdy·x̂.
  void (*project)(int64_t channels, const ChannelValues&, const double* total, double* dot);
};

// Sums that no split of their terms changes are kept in accumulators: of each column, the place of
// its highest slice, the slices, and the sum of what is not finite. Each is a row of the columns'
// numbers. Method and proof: src/syncbn/numerics/reproducible.py.
constexpr int64_t slices = 4;
constexpr int64_t accumulator_rows = 1 + slices + 1;
constexpr double lowest_top = -31;  // no top is lower: 2^(28·(−31 − 3)) still has a reciprocal

struct ReproducibleLoops {
  // Adds `rows` rows of terms to the accumulator `into`, whose rows lie `stride` numbers apart.
  void (*add)(const double* terms, int64_t rows, int64_t columns, double* into, int64_t stride);
  // Adds the accumulator `from` to `into`.
  void (*unite)(int64_t columns, const double* from, double* into, int64_t stride);
  // The sums in all of `sets` accumulators, which lie `stride` numbers apart: as high + low, the
  // nearest double and what it lacks.
  void (*finalise)(const double* received, int64_t sets, int64_t stride, int64_t columns,
                   double* high, double* low);
  // The squares of values, rounded, and the rounding's errors.
  void (*squares)(int64_t count, const double* values, double* squares, double* errors);
  // What samples' moments add to two such sums, and the moments that follow from the sums.
  void (*moment_terms)(int64_t some, double n, const double* mean, const double* m2, double* firsts,
                       double* seconds);
  void (*moments_of_sums)(int64_t channels, double count, const double* first,
                          const double* first_low, const double* second, const double* second_low,
                          double* mean, double* m2);
};

// All loops for one instruction set.
struct Loopset {
  const char* name;
  Loops elements[dtypes][layouts];
  ChannelLoops channels[dtypes];
  ReproducibleLoops reproducible;
};

}  // namespace syncbn
