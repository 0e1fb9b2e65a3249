// The operators of the library "syncbn" on LibTorch's stable ABI: each checks its arguments,
// allocates its results and runs a step. Formulas and shapes stand in
// src/syncbn/kernels/composite.py.
#pragma once

#include <tuple>

#include "steps/fused.h"
#include "torch/tensors.h"

namespace syncbn::operators {

inline Tensor measure(const Tensor& x) {
  const Dtype dtype = check_input("measure", x);
  const int64_t channels = x.size(1);
  Tensor packed = empty_doubles(1 + 2 * channels);
  if (x.numel() == 0) {
    for (int64_t j = 0; j < 1 + 2 * channels; ++j) as_doubles(packed)[j] = 0;
    return packed;
  }
  const Problem p = make_problem(dtype, x, nullptr, nullptr);
  syncbn::measure(parallel(), p.work, p.views[0], as_doubles(packed));
  return packed;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> normalise(
    const Tensor& x, const Tensor& sets, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  const Dtype dtype = check_input("normalise", x);
  const int64_t channels = x.size(1);
  SYNCBN_CHECK(torch_dtype(sets) == aoti_torch_dtype_float64() && sets.dim() == 2 &&
                   sets.size(1) == 1 + 2 * channels && sets.stride(1) == 1,
               "syncbn::normalise: expected sets as packed float64 moments of shape (k, ",
               1 + 2 * channels, "), got shape ", shape_text(sets));
  check_held("sets", sets, 8);
  const Running r = check_running("normalise", running_mean, running_var, num_batches_tracked,
                                  momentum, channels);
  const Affine affine{check_parameter("normalise", "weight", weight, channels),
                      check_parameter("normalise", "bias", bias, channels)};
  Tensor y = new_like(x), mean = empty_doubles(channels), invstd = empty_doubles(channels);
  Tensor count = allocate(nullptr, nullptr, 0, aoti_torch_dtype_float64());
  const ChannelLoops& loops = best_loopset().channels[int(dtype)];
  Scratch scratch(channels);
  double* m2 = scratch.take(channels);
  const double n = merge_sets(as_doubles(sets), sets.size(0), sets.stride(0), channels, loops,
                              as_doubles(mean), m2);
  *as_doubles(count) = n;
  update_running(r, 0, channels, r.count_batch(), n, as_doubles(mean), m2);
  loops.inverse_deviation(channels, n, m2, eps, as_doubles(invstd));
  if (x.numel() > 0) {
    const Problem p = make_problem(dtype, x, nullptr, &y);
    syncbn::normalise(parallel(), p.work, p.views[0], p.views[1], affine,
                      {n, as_doubles(mean), as_doubles(invstd)});
  }
  return {y, mean, invstd, count};
}

inline Tensor gradient_sums(const Tensor& dy, const Tensor& x, const Tensor& mean,
                            const Tensor& invstd) {
  const Dtype dtype = check_gradient("gradient_sums", dy, x);
  const int64_t channels = x.size(1);
  const double* means = check_doubles("gradient_sums", "mean", mean, channels);
  const double* invstds = check_doubles("gradient_sums", "invstd", invstd, channels);
  Tensor sums = empty_doubles(2, channels);
  if (x.numel() == 0) {
    for (int64_t j = 0; j < 2 * channels; ++j) as_doubles(sums)[j] = 0;
    return sums;
  }
  const Problem p = make_problem(dtype, x, &dy, nullptr);
  syncbn::gradient_sums(parallel(), p.work, p.views[1], p.views[0], means, invstds,
                        as_doubles(sums));
  return sums;
}

inline Tensor input_gradient(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                             const Tensor& mean, const Tensor& invstd, const Tensor& sums,
                             const Tensor& count) {
  const Dtype dtype = check_gradient("input_gradient", dy, x);
  const int64_t channels = x.size(1);
  const double* means = check_doubles("input_gradient", "mean", mean, channels);
  const double* invstds = check_doubles("input_gradient", "invstd", invstd, channels);
  const double* totals = check_doubles("input_gradient", "sums", sums, 2 * channels);
  const double* n = check_doubles("input_gradient", "count", count, 1);
  const Parameter weights = check_parameter("input_gradient", "weight", weight, channels);
  Tensor dx = new_like(x);
  if (x.numel() == 0) return dx;
  const Problem p = make_problem(dtype, x, &dy, &dx);
  syncbn::input_gradient(parallel(), p.work, p.views[1], p.views[0], p.views[2], weights,
                         {*n, const_cast<double*>(means), const_cast<double*>(invstds)}, totals);
  return dx;
}

// measure, before which everything is refused that normalise would refuse after the exchange.
inline Tensor measure_checked(const Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked,
                              std::optional<double> momentum) {
  check_input("measure", x);
  const int64_t channels = x.size(1);
  check_running("measure", running_mean, running_var, num_batches_tracked, momentum, channels);
  check_parameter("measure", "weight", weight, channels);
  check_parameter("measure", "bias", bias, channels);
  return measure(x);
}

// A new tensor for the gradient of a parameter, of the parameter's type.
inline Tensor gradient_of(const OptionalTensor& parameter, int64_t channels) {
  const int64_t one = 1;
  const int32_t type = parameter ? torch_dtype(*parameter) : aoti_torch_dtype_float32();
  return allocate(&channels, &one, 1, type);
}

// Those of weight and bias: sums (Σdy, Σdy·x̂) of this rank's samples.
inline std::tuple<Tensor, Tensor> parameter_gradients(const OptionalTensor& weight,
                                                      const OptionalTensor& bias,
                                                      const double* sums, int64_t channels) {
  Tensor dweight = gradient_of(weight, channels), dbias = gradient_of(bias, channels);
  write_parameter(check_parameter("gradient_sums", "dbias", dbias, channels), channels, sums);
  write_parameter(check_parameter("gradient_sums", "dweight", dweight, channels), channels,
                  sums + channels);
  return {dweight, dbias};
}

// gradient_sums, once weight is seen to be fit for input_gradient; and the parameters' gradients.
inline std::tuple<Tensor, Tensor, Tensor> gradient_sums_checked(const Tensor& dy, const Tensor& x,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias,
                                                                const Tensor& mean,
                                                                const Tensor& invstd) {
  check_input("gradient_sums", x);
  const int64_t channels = x.size(1);
  check_parameter("gradient_sums", "weight", weight, channels);
  Tensor sums = gradient_sums(dy, x, mean, invstd);
  auto [dweight, dbias] = parameter_gradients(weight, bias, as_doubles(sums), channels);
  return {sums, dweight, dbias};
}

// --- one process -------------------------------------------------------------------------------

inline std::tuple<Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& bias,
                                             const OptionalTensor& running_mean,
                                             const OptionalTensor& running_var,
                                             const OptionalTensor& num_batches_tracked,
                                             std::optional<double> momentum, double eps) {
  const Dtype dtype = check_input("batch_norm", x);
  const int64_t channels = x.size(1);
  SYNCBN_CHECK(x.numel() > 0, "syncbn::batch_norm: expected a tensor with values, got shape ",
               shape_text(x));
  const Running r = check_running("batch_norm", running_mean, running_var, num_batches_tracked,
                                  momentum, channels);
  const Affine affine{check_parameter("batch_norm", "weight", weight, channels),
                      check_parameter("batch_norm", "bias", bias, channels)};
  Tensor y = new_like(x), saved = empty_doubles(2, channels);
  const Problem p = make_problem(dtype, x, nullptr, &y);
  forward(parallel(), p.work, p.views[0], p.views[1], affine, r, eps, as_doubles(saved),
          as_doubles(saved) + channels);
  return {y, saved};
}

inline std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& dy, const Tensor& x,
                                                              const OptionalTensor& weight,
                                                              const OptionalTensor& bias,
                                                              const Tensor& saved) {
  const Dtype dtype = check_gradient("batch_norm_backward", dy, x);
  const int64_t channels = x.size(1);
  SYNCBN_CHECK(x.numel() > 0,
               "syncbn::batch_norm_backward: expected a tensor with values, got shape ",
               shape_text(x));
  const double* mean = check_doubles("batch_norm_backward", "saved", saved, 2 * channels);
  const Parameter weights = check_parameter("batch_norm_backward", "weight", weight, channels);
  Tensor dx = new_like(x);
  const Problem p = make_problem(dtype, x, &dy, &dx);
  Scratch scratch(2 * channels);
  double* sums = scratch.take(2 * channels);
  backward(parallel(), p.work, p.views[1], p.views[0], p.views[2], weights, mean, mean + channels,
           sums);
  auto [dweight, dbias] = parameter_gradients(weight, bias, sums, channels);
  return {dx, dweight, dbias};
}

}  // namespace syncbn::operators
