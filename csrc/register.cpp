// The operators of the library "syncbn" on LibTorch's stable ABI: check, allocate, loop, register.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "geometry.h"
#include "isa.h"
#include "local.h"

namespace syncbn::operators {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// --- torch's side of the parts ---------------------------------------------------------------

Parallel parallel() {
  auto run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {run, int64_t(torch::stable::get_num_threads())};
}

int32_t torch_dtype(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

std::optional<Dtype> floating(const Tensor& t) {
  static const int32_t codes[dtypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                        aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  const int32_t dtype = torch_dtype(t);
  for (int d = 0; d < dtypes; ++d)
    if (codes[d] == dtype) return Dtype(d);
  return std::nullopt;
}

Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_like(const Tensor& x) {
  int64_t strides[most_dims];
  strides_like(x.dim(), x.sizes().data(), x.strides().data(), strides);
  return allocate(x.sizes().data(), strides, x.dim(), torch_dtype(x));
}

Tensor doubles(int64_t n) {
  const int64_t one = 1;
  return allocate(&n, &one, 1, aoti_torch_dtype_float64());
}
Tensor doubles(int64_t rows, int64_t n) {
  const int64_t sizes[] = {rows, n}, strides[] = {n, 1};
  return allocate(sizes, strides, 2, aoti_torch_dtype_float64());
}

double* data(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

// --- checks ----------------------------------------------------------------------------------

Dtype check_input(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.dim() <= most_dims && x.size(1) > 0, "syncbn::", op,
                  ": expected x of shape (N, C, *) with C > 0 and at most ", most_dims,
                  " dimensions, got shape ", shape(x));
  const std::optional<Dtype> dtype = floating(x);
  STD_TORCH_CHECK(dtype, "syncbn::", op,
                  ": expected x of dtype float32, float64, bfloat16 or float16, got another dtype");
  return *dtype;
}

void check_gradient(const char* op, const Tensor& dy, const Tensor& x) {
  bool same = dy.dim() == x.dim() && torch_dtype(dy) == torch_dtype(x);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = dy.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "syncbn::", op, ": expected dy of x's dtype and shape ", shape(x),
                  ", got shape ", shape(dy), torch_dtype(dy) == torch_dtype(x) ? "" : ", another dtype");
}

// A contiguous float64 tensor, `what`, of n numbers.
const double* check_doubles(const char* op, const char* what, const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(torch_dtype(t) == aoti_torch_dtype_float64() && t.numel() == n && t.is_contiguous(),
                  "syncbn::", op, ": expected ", what, " as ", n,
                  " contiguous float64 numbers, got shape ", shape(t));
  return data(t);
}

Parameter parameter(const char* op, const char* what, const Maybe& t, int64_t channels) {
  if (!t) return {};
  const std::optional<Dtype> dtype = floating(*t);
  STD_TORCH_CHECK(dtype && t->dim() == 1 && t->size(0) == channels && t->is_cpu(), "syncbn::", op,
                  ": expected ", what, " as a floating tensor of shape (", channels,
                  ",) on the CPU, got shape ", shape(*t));
  return {t->data_ptr(), *dtype, t->stride(0)};
}

Running running(const char* op, const Maybe& mean, const Maybe& var, const Maybe& batches,
                std::optional<double> momentum, int64_t channels) {
  Running r;
  r.mean = parameter(op, "running_mean", mean, channels);
  r.var = parameter(op, "running_var", var, channels);
  if (batches) {
    STD_TORCH_CHECK(torch_dtype(*batches) == aoti_torch_dtype_int64() && batches->numel() == 1,
                    "syncbn::", op, ": expected num_batches_tracked as one int64 number, got shape ",
                    shape(*batches));
    r.batches = static_cast<int64_t*>(batches->data_ptr());
  }
  r.cumulative = !momentum.has_value();
  r.momentum = momentum.value_or(0);
  return r;
}

// As torch has it. The synchronised steps take any: ranks may differ in their input's dtype.
void check_mixture(const char* op, const Affine& affine, Dtype dtype) {
  for (const Parameter& p : {affine.weight, affine.bias})
    STD_TORCH_CHECK(!p.data || p.dtype == dtype || p.dtype == Dtype::float32, "syncbn::", op,
                    ": mixed dtype: expected weight and bias of x's dtype or float32");
}

// --- tensors as views ------------------------------------------------------------------------

struct Problem {
  Tensor tensors[3];
  View views[3];
  Work work;
};

// A copy of t with the strides of `like`, which fills its memory without gaps.
Tensor copy_like(const Tensor& t, const Tensor& like) {
  Tensor copy = allocate(like.sizes().data(), like.strides().data(), like.dim(), torch_dtype(t));
  torch::stable::copy_(copy, t);
  return copy;
}

// Views of x, perhaps dy, and perhaps a result `like_x`, a new tensor like x. Tensors whose strides
// fit no loop are copied; the copies follow the new tensor's strides, which then fit as well.
Problem make_problem(Dtype dtype, const Tensor& x, const Tensor* dy, const Tensor* like_x) {
  Problem p;
  int count = 0;
  p.tensors[count++] = x;
  if (dy) p.tensors[count++] = *dy;
  if (like_x) p.tensors[count++] = *like_x;
  Layout layout;
  auto views = [&] {
    Strided strided[3];
    for (int t = 0; t < count; ++t)
      strided[t] = {p.tensors[t].data_ptr(), p.tensors[t].strides().data()};
    return make_views(x.dim(), x.sizes().data(), strided, count, p.views, &layout);
  };
  if (!views()) {
    const Tensor model = like_x ? *like_x : new_like(x);
    if (dy) p.tensors[1] = copy_like(*dy, model);
    if (!views()) p.tensors[0] = copy_like(x, model);
    STD_TORCH_CHECK(views(), "syncbn: no loops for strides like those of x");
  }
  p.work = make_work(best_loopset(), dtype, layout, p.views, count);
  return p;
}

// --- operators -------------------------------------------------------------------------------

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
  m.impl("batch_norm", TORCH_BOX(&syncbn::operators::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&syncbn::operators::batch_norm_backward));
}
