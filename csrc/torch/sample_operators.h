// The operators that add samples up so that no split of the batch changes the sums. Their shapes
// stand in src/syncbn/kernels/composite.py, method and proof in
// src/syncbn/numerics/reproducible.py.
#pragma once

#include <vector>

#include "steps/samples.h"
#include "torch/tensors.h"

namespace syncbn::operators {

// The samples of x: each is an element of dimension 0 or, with lengths, sample n is lengths[n] of
// them. There are none if x has no values.
class Samples {
 public:
  Samples(const char* op, const Tensor& x, const OptionalTensor& lengths)
      : size_(lengths ? lengths->numel() : x.size(0)), rows_(x.numel() == x.size(0) * x.size(1)) {
    if (lengths) check_lengths(op, x, *lengths);
    if (x.numel() == 0) size_ = 0;
  }
  int64_t size() const { return size_; }
  int64_t begin(int64_t n) const { return begins_.empty() ? n : begins_[size_t(n)]; }
  int64_t count(int64_t n) const { return begin(n + 1) - begin(n); }
  // Whether sample n, or every one, is a single value per channel.
  bool single(int64_t n) const { return rows_ && count(n) == 1; }
  bool single() const { return rows_ && begins_.empty(); }

  // x and perhaps dy, to be viewed sample by sample. Whether they are copied, and so which loops
  // run, must follow from a sample's own strides, however many other samples there are.
  Problem problem(const char* op, Dtype dtype, const Tensor& x, const Tensor* dy) const {
    check_apart(op, x);
    if (dy) check_apart(op, *dy);
    Problem p = unviewed_problem(dtype, x, dy, nullptr);
    const int64_t one = begins_.empty() ? 1 : x.size(0);
    if (size_ > 0 && !p.view_samples(0, one)) {
      for (int t = 0; t < p.count; ++t) p.tensors[t] = contiguous_copy(p.tensors[t]);
      SYNCBN_CHECK(p.view_samples(0, one), "syncbn: no loops for contiguous samples");
    }
    return p;
  }

 private:
  // A sample's view would reach into others, and past the last.
  static void check_apart(const char* op, const Tensor& t) {
    int64_t reach = t.numel() > 0 ? 1 : 0;
    for (int64_t d = 1; d < t.dim() && reach > 0; ++d) reach += (t.size(d) - 1) * t.stride(d);
    SYNCBN_CHECK(t.size(0) <= 1 || t.stride(0) >= reach, "syncbn::", op,
                 ": expected samples that lie one after the other, got shape ", shape_text(t),
                 " with ", t.stride(0), " numbers from one to the next, which is of ", reach);
  }

  void check_lengths(const char* op, const Tensor& x, const Tensor& lengths) {
    SYNCBN_CHECK(torch_dtype(lengths) == aoti_torch_dtype_int64() && lengths.is_contiguous(),
                 "syncbn::", op, ": expected lengths as contiguous int64 numbers");
    check_held("lengths", lengths, 8);
    const int64_t* counts = static_cast<const int64_t*>(lengths.data_ptr());
    begins_.push_back(0);
    bool fit = true;
    for (int64_t n = 0; n < size_; ++n) {
      fit = fit && counts[n] >= 0 && counts[n] <= x.size(0) - begins_.back();
      begins_.push_back(fit ? begins_.back() + counts[n] : 0);
    }
    SYNCBN_CHECK(fit && begins_.back() == x.size(0), "syncbn::", op,
                 ": expected lengths that add up to ", x.size(0), ", the size of x");
  }

  int64_t size_;
  bool rows_;  // whether an element of dimension 0 is one value per channel
  std::vector<int64_t> begins_;
};

// The values of element n of dimension 0 of t, one per channel, as doubles.
inline void read_element(const Tensor& t, Dtype dtype, int64_t n, double* values) {
  read_parameter({true, element(t, dtype, n), dtype, t.stride(1)}, t.size(1), 0, values);
}

inline Tensor measure_samples(const Tensor& x, const OptionalTensor& lengths) {
  const Dtype dtype = check_input("measure_samples", x);
  const int64_t channels = x.size(1), row = 1 + 2 * channels;
  const Samples samples("measure_samples", x, lengths);
  const ReproducibleLoops& loops = best_loopset().reproducible;
  Tensor result = empty_doubles(1 + 2 * accumulator_rows * channels);
  as_doubles(result)[0] = double(x.numel() / channels);
  const Problem all = samples.problem("measure_samples", dtype, x, nullptr);
  accumulate_in_parts(parallel(), loops, samples.size(), x.numel(), 2, channels,
                      as_doubles(result) + 1, [&](int64_t begin, int64_t end, double* sums) {
    if (samples.single()) {
      add_values(loops, channels, dtype != Dtype::float64, begin, end, sums,
                 [&](int64_t n, double* values) { read_element(x, dtype, n, values); });
      return;
    }
    Problem p = all;
    add_moments(loops, channels, begin, end, sums, [&](int64_t n, double* packed) {
      if (samples.count(n) == 0) return void(std::fill(packed, packed + row, 0.0));
      p.view_samples(samples.begin(n), samples.count(n));
      syncbn::measure(parallel(), p.work, p.views[0], packed);
    });
  });
  return result;
}

inline Tensor merge_samples(const Tensor& received) {
  const int64_t numbers = 2 * accumulator_rows;
  SYNCBN_CHECK(torch_dtype(received) == aoti_torch_dtype_float64() && received.dim() == 2 &&
                   received.size(0) > 0 && received.stride(1) == 1 &&
                   received.size(1) % numbers == 1,
               "syncbn::merge_samples: expected float64 numbers of shape (W, 1 + ", numbers,
               "·C), got shape ", shape_text(received));
  check_held("what the ranks sent", received, 8);
  const int64_t channels = received.size(1) / numbers;
  Tensor packed = empty_doubles(1, 1 + 2 * channels);
  merge_accumulators(best_loopset().reproducible, as_doubles(received), received.size(0),
                     received.stride(0), channels, as_doubles(packed));
  return packed;
}

inline Tensor gradient_sums_samples(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                    const Tensor& invstd, const OptionalTensor& lengths) {
  const Dtype dtype = check_gradient("gradient_sums_samples", dy, x);
  const int64_t channels = x.size(1), columns = 2 * channels;
  const double* means = check_doubles("gradient_sums_samples", "mean", mean, channels);
  const double* invstds = check_doubles("gradient_sums_samples", "invstd", invstd, channels);
  const Samples samples("gradient_sums_samples", x, lengths);
  const ReproducibleLoops& loops = best_loopset().reproducible;
  Tensor result = empty_doubles(accumulator_rows, columns);
  const Problem all = samples.problem("gradient_sums_samples", dtype, x, &dy);
  accumulate_in_parts(parallel(), loops, samples.size(), x.numel(), 1, columns, as_doubles(result),
                      [&](int64_t begin, int64_t end, double* total) {
    Problem p = all;
    add_rows(loops, columns, begin, end, total, [&](int64_t n, double* sums) {
      if (samples.count(n) == 0) return void(std::fill(sums, sums + columns, 0.0));
      if (!samples.single(n)) {
        p.view_samples(samples.begin(n), samples.count(n));
        syncbn::gradient_sums(parallel(), p.work, p.views[1], p.views[0], means, invstds, sums);
        return;
      }
      double* dots = sums + channels;
      read_element(dy, dtype, samples.begin(n), sums);
      read_element(x, dtype, samples.begin(n), dots);
      for (int64_t c = 0; c < channels; ++c)
        dots[c] = sums[c] * ((dots[c] - means[c]) * invstds[c]);
    });
  });
  return result;
}

inline Tensor total_samples(const Tensor& received) {
  SYNCBN_CHECK(torch_dtype(received) == aoti_torch_dtype_float64() && received.dim() == 3 &&
                   received.size(0) > 0 && received.size(1) == accumulator_rows &&
                   received.size(2) % 2 == 0 && received.is_contiguous(),
               "syncbn::total_samples: expected contiguous float64 numbers of shape (W, ",
               accumulator_rows, ", 2·C), got shape ", shape_text(received));
  check_held("what the ranks sent", received, 8);
  const int64_t columns = received.size(2);
  Tensor sums = empty_doubles(2, columns / 2);
  Scratch scratch(columns);
  best_loopset().reproducible.finalise(as_doubles(received), received.size(0),
                                       accumulator_rows * columns, columns, as_doubles(sums),
                                       scratch.take(columns));
  return sums;
}

}  // namespace syncbn::operators
