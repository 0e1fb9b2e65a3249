// The operators of the library "syncbn" on LibTorch's stable ABI: check, allocate, loop, register.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "local.h"
#include "samples.h"
#include "tensors.h"

namespace syncbn::operators {

Tensor measure(const Tensor& x) {
  const Dtype dtype = check_input("measure", x);
  const int64_t channels = x.size(1);
  Tensor packed = doubles(1 + 2 * channels);
  if (x.numel() == 0) {
    for (int64_t j = 0; j < 1 + 2 * channels; ++j) data(packed)[j] = 0;
    return packed;
  }
  const Problem p = make_problem(dtype, x, nullptr, nullptr);
  syncbn::measure(parallel(), p.work, p.views[0], data(packed));
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalise(
    const Tensor& x, const Tensor& sets, const Maybe& weight, const Maybe& bias,
    const Maybe& running_mean, const Maybe& running_var, const Maybe& num_batches_tracked,
    std::optional<double> momentum, double eps) {
  const Dtype dtype = check_input("normalise", x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(torch_dtype(sets) == aoti_torch_dtype_float64() && sets.dim() == 2 &&
                      sets.size(1) == 1 + 2 * channels && sets.stride(1) == 1,
                  "syncbn::normalise: expected sets as packed float64 moments of shape (k, ",
                  1 + 2 * channels, "), got shape ", shape(sets));
  const Running r = running("normalise", running_mean, running_var, num_batches_tracked, momentum, channels);
  const Affine affine{parameter("normalise", "weight", weight, channels),
                      parameter("normalise", "bias", bias, channels)};
  Tensor y = new_like(x), mean = doubles(channels), invstd = doubles(channels);
  Tensor count = allocate(nullptr, nullptr, 0, aoti_torch_dtype_float64());
  const Loopset& set = best_loopset();
  const ChannelLoops& loops = set.channels[int(dtype)];
  Scratch scratch(channels);
  double* m2 = scratch.take(channels);
  *data(count) = merge_sets(data(sets), sets.size(0), sets.stride(0), channels, loops, data(mean), m2);
  follow(loops, channels, *data(count), data(mean), m2, r, eps, data(invstd));
  if (x.numel() > 0) {
    const Problem p = make_problem(dtype, x, nullptr, &y);
    syncbn::normalise(parallel(), p.work, p.views[0], p.views[1], affine,
                      {*data(count), data(mean), data(invstd)});
  }
  return {y, mean, invstd, count};
}

Tensor gradient_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd) {
  const Dtype dtype = check_input("gradient_sums", x);
  check_gradient("gradient_sums", dy, x);
  const int64_t channels = x.size(1);
  const double* means = check_doubles("gradient_sums", "mean", mean, channels);
  const double* invstds = check_doubles("gradient_sums", "invstd", invstd, channels);
  Tensor sums = doubles(2, channels);
  if (x.numel() == 0) {
    for (int64_t j = 0; j < 2 * channels; ++j) data(sums)[j] = 0;
    return sums;
  }
  const Problem p = make_problem(dtype, x, &dy, nullptr);
  syncbn::gradient_sums(parallel(), p.work, p.views[1], p.views[0], means, invstds, data(sums));
  return sums;
}

Tensor input_gradient(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean,
                      const Tensor& invstd, const Tensor& sums, const Tensor& count) {
  const Dtype dtype = check_input("input_gradient", x);
  check_gradient("input_gradient", dy, x);
  const int64_t channels = x.size(1);
  const double* means = check_doubles("input_gradient", "mean", mean, channels);
  const double* invstds = check_doubles("input_gradient", "invstd", invstd, channels);
  const double* totals = check_doubles("input_gradient", "sums", sums, 2 * channels);
  const double* n = check_doubles("input_gradient", "count", count, 1);
  const Parameter weights = parameter("input_gradient", "weight", weight, channels);
  Tensor dx = new_like(x);
  if (x.numel() == 0) return dx;
  const Problem p = make_problem(dtype, x, &dy, &dx);
  syncbn::input_gradient(parallel(), p.work, p.views[1], p.views[0], p.views[2], weights,
                         {*n, const_cast<double*>(means), const_cast<double*>(invstds)}, totals);
  return dx;
}

// --- samples added up so that no split of the batch shows ----------------------------------------

// Calls body(n, begin, count) for each sample: of one element of dimension 0, or of lengths[n].
template <class Body>
void for_samples(const char* op, const Tensor& x, const Maybe& lengths, Body body) {
  if (!lengths) {
    for (int64_t n = 0; n < x.size(0); ++n) body(n, n, 1);
    return;
  }
  STD_TORCH_CHECK(torch_dtype(*lengths) == aoti_torch_dtype_int64() && lengths->is_contiguous(),
                  "syncbn::", op, ": expected lengths as contiguous int64 numbers");
  const int64_t* counts = static_cast<const int64_t*>(lengths->data_ptr());
  int64_t begin = 0;
  for (int64_t n = 0; n < lengths->numel(); begin += counts[n++]) {
    STD_TORCH_CHECK(counts[n] >= 0 && begin + counts[n] <= x.size(0), "syncbn::", op,
                    ": expected lengths that add up to ", x.size(0), ", the size of x");
    body(n, begin, counts[n]);
  }
}

int64_t count_samples(const Tensor& x, const Maybe& lengths) {
  return lengths ? lengths->numel() : x.size(0);
}

Tensor measure_samples(const Tensor& x, const Maybe& lengths) {
  check_input("measure_samples", x);
  const int64_t channels = x.size(1), samples = count_samples(x, lengths), row = 1 + 2 * channels;
  const ReproducibleLoops& loops = best_loopset().reproducible;
  Scratch scratch(samples * row);
  double* moments = scratch.take(samples * row);
  for_samples("measure_samples", x, lengths, [&](int64_t n, int64_t begin, int64_t count) {
    const Tensor packed = measure(narrow(x, begin, count));
    std::memcpy(moments + n * row, data(packed), size_t(row) * sizeof(double));
  });
  Tensor result = doubles(1 + 2 * loops.numbers * channels);
  represent_moments(loops, moments, samples, channels, data(result));
  return result;
}

Tensor merge_samples(const Tensor& received) {
  const ReproducibleLoops& loops = best_loopset().reproducible;
  const int64_t numbers = 2 * loops.numbers;
  STD_TORCH_CHECK(torch_dtype(received) == aoti_torch_dtype_float64() && received.dim() == 2 &&
                      received.stride(1) == 1 && received.size(1) % numbers == 1,
                  "syncbn::merge_samples: expected float64 numbers of shape (W, 1 + ", numbers,
                  "·C), got shape ", shape(received));
  const int64_t channels = received.size(1) / numbers;
  Tensor packed = doubles(1, 1 + 2 * channels);
  merge_represented(loops, data(received), received.size(0), received.stride(0), channels,
                    data(packed));
  return packed;
}

Tensor gradient_sums_samples(const Tensor& dy, const Tensor& x, const Tensor& mean,
                             const Tensor& invstd, const Maybe& lengths) {
  check_input("gradient_sums_samples", x);
  check_gradient("gradient_sums_samples", dy, x);
  const int64_t columns = 2 * x.size(1), samples = count_samples(x, lengths);
  const ReproducibleLoops& loops = best_loopset().reproducible;
  Scratch scratch(samples * columns);
  double* sums = scratch.take(samples * columns);
  for_samples("gradient_sums_samples", x, lengths, [&](int64_t n, int64_t begin, int64_t count) {
    const Tensor own = gradient_sums(narrow(dy, begin, count), narrow(x, begin, count), mean, invstd);
    std::memcpy(sums + n * columns, data(own), size_t(columns) * sizeof(double));
  });
  Tensor result = doubles(loops.numbers, columns);
  loops.represent(sums, samples, columns, data(result), columns);
  return result;
}

Tensor total_samples(const Tensor& received) {
  const ReproducibleLoops& loops = best_loopset().reproducible;
  STD_TORCH_CHECK(torch_dtype(received) == aoti_torch_dtype_float64() && received.dim() == 3 &&
                      received.size(1) == loops.numbers && received.size(2) % 2 == 0 &&
                      received.is_contiguous(),
                  "syncbn::total_samples: expected contiguous float64 numbers of shape (W, ",
                  loops.numbers, ", 2·C), got shape ", shape(received));
  const int64_t columns = received.size(2);
  Tensor sums = doubles(2, columns / 2);
  Scratch scratch(columns);
  loops.total(data(received), received.size(0), loops.numbers * columns, columns, data(sums),
              scratch.take(columns));
  return sums;
}

// --- one process -------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> batch_norm(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                      const Maybe& running_mean, const Maybe& running_var,
                                      const Maybe& num_batches_tracked,
                                      std::optional<double> momentum, double eps) {
  const Dtype dtype = check_input("batch_norm", x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(x.numel() > 0, "syncbn::batch_norm: expected a tensor with values, got shape ", shape(x));
  const Running r = running("batch_norm", running_mean, running_var, num_batches_tracked, momentum, channels);
  const Affine affine{parameter("batch_norm", "weight", weight, channels),
                      parameter("batch_norm", "bias", bias, channels)};
  check_mixture("batch_norm", affine, dtype);
  Tensor y = new_like(x), saved = doubles(2, channels);
  const Problem p = make_problem(dtype, x, nullptr, &y);
  forward(parallel(), p.work, p.views[0], p.views[1], affine, r, eps, data(saved),
          data(saved) + channels);
  return {y, saved};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& dy, const Tensor& x,
                                               const Maybe& weight, const Tensor& saved) {
  const Dtype dtype = check_input("batch_norm_backward", x);
  check_gradient("batch_norm_backward", dy, x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(x.numel() > 0, "syncbn::batch_norm_backward: expected a tensor with values, got shape ",
                  shape(x));
  const double* mean = check_doubles("batch_norm_backward", "saved", saved, 2 * channels);
  const Parameter weights = parameter("batch_norm_backward", "weight", weight, channels);
  Tensor dx = new_like(x);
  const int64_t one = 1;
  const int32_t type = weight ? torch_dtype(*weight) : aoti_torch_dtype_float32();
  Tensor dweight = allocate(&channels, &one, 1, type), dbias = allocate(&channels, &one, 1, type);
  const Problem p = make_problem(dtype, x, &dy, &dx);
  Scratch scratch(2 * channels);
  double* sums = scratch.take(2 * channels);
  backward(parallel(), p.work, p.views[1], p.views[0], p.views[2], weights, mean, mean + channels,
           sums);
  write(parameter("batch_norm_backward", "dbias", dbias, channels), channels, sums);
  write(parameter("batch_norm_backward", "dweight", dweight, channels), channels, sums + channels);
  return {dx, dweight, dbias};
}

}  // namespace syncbn::operators

STABLE_TORCH_LIBRARY(syncbn, m) {
  m.def("measure(Tensor x) -> Tensor");
  m.def(
      "normalise(Tensor x, Tensor sets, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> "
      "(Tensor y, Tensor mean, Tensor invstd, Tensor count)");
  m.def("gradient_sums(Tensor dy, Tensor x, Tensor mean, Tensor invstd) -> Tensor");
  m.def(
      "input_gradient(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, "
      "Tensor sums, Tensor count) -> Tensor");
  m.def("measure_samples(Tensor x, Tensor? lengths) -> Tensor");
  m.def("merge_samples(Tensor received) -> Tensor");
  m.def(
      "gradient_sums_samples(Tensor dy, Tensor x, Tensor mean, Tensor invstd, Tensor? lengths) -> "
      "Tensor");
  m.def("total_samples(Tensor received) -> Tensor");
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> "
      "(Tensor y, Tensor saved)");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor saved) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(syncbn, CPU, m) {
  m.impl("measure", TORCH_BOX(&syncbn::operators::measure));
  m.impl("normalise", TORCH_BOX(&syncbn::operators::normalise));
  m.impl("gradient_sums", TORCH_BOX(&syncbn::operators::gradient_sums));
  m.impl("input_gradient", TORCH_BOX(&syncbn::operators::input_gradient));
  m.impl("measure_samples", TORCH_BOX(&syncbn::operators::measure_samples));
  m.impl("merge_samples", TORCH_BOX(&syncbn::operators::merge_samples));
  m.impl("gradient_sums_samples", TORCH_BOX(&syncbn::operators::gradient_sums_samples));
  m.impl("total_samples", TORCH_BOX(&syncbn::operators::total_samples));
  m.impl("batch_norm", TORCH_BOX(&syncbn::operators::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&syncbn::operators::batch_norm_backward));
}
