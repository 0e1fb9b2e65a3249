// Torch's tensors as the loops' views and parameters: types, checks, allocation.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "geometry.h"
#include "isa.h"
#include "steps.h"

namespace syncbn::operators {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// --- torch's side of the parts ---------------------------------------------------------------

inline Parallel parallel() {
  auto run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {run, int64_t(torch::stable::get_num_threads())};
}

inline int32_t torch_dtype(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline std::optional<Dtype> floating(const Tensor& t) {
  static const int32_t codes[dtypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                        aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  const int32_t dtype = torch_dtype(t);
  for (int d = 0; d < dtypes; ++d)
    if (codes[d] == dtype) return Dtype(d);
  return std::nullopt;
}

inline Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& x) {
  int64_t strides[most_dims];
  strides_like(x.dim(), x.sizes().data(), x.strides().data(), strides);
  return allocate(x.sizes().data(), strides, x.dim(), torch_dtype(x));
}

inline Tensor doubles(int64_t n) {
  const int64_t one = 1;
  return allocate(&n, &one, 1, aoti_torch_dtype_float64());
}
inline Tensor doubles(int64_t rows, int64_t n) {
  const int64_t sizes[] = {rows, n}, strides[] = {n, 1};
  return allocate(sizes, strides, 2, aoti_torch_dtype_float64());
}

// Where element n of dimension 0 of t begins.
inline void* element(const Tensor& t, Dtype dtype, int64_t n) {
  static const int64_t bytes[dtypes] = {4, 8, 2, 2};
  return static_cast<char*>(t.data_ptr()) + n * t.stride(0) * bytes[int(dtype)];
}

inline double* data(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

inline std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

// --- checks ----------------------------------------------------------------------------------

inline Dtype check_input(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.dim() <= most_dims && x.size(1) > 0, "syncbn::", op,
                  ": expected x of shape (N, C, *) with C > 0 and at most ", most_dims,
                  " dimensions, got shape ", shape(x));
  const std::optional<Dtype> dtype = floating(x);
  STD_TORCH_CHECK(dtype, "syncbn::", op,
                  ": expected x of dtype float32, float64, bfloat16 or float16, got another dtype");
  return *dtype;
}

inline void check_gradient(const char* op, const Tensor& dy, const Tensor& x) {
  bool same = dy.dim() == x.dim() && torch_dtype(dy) == torch_dtype(x);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = dy.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "syncbn::", op, ": expected dy of x's dtype and shape ", shape(x),
                  ", got shape ", shape(dy), torch_dtype(dy) == torch_dtype(x) ? "" : ", another dtype");
}

// A contiguous float64 tensor, `what`, of n numbers.
inline const double* check_doubles(const char* op, const char* what, const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(torch_dtype(t) == aoti_torch_dtype_float64() && t.numel() == n && t.is_contiguous(),
                  "syncbn::", op, ": expected ", what, " as ", n,
                  " contiguous float64 numbers, got shape ", shape(t));
  return data(t);
}

inline Parameter parameter(const char* op, const char* what, const Maybe& t, int64_t channels) {
  if (!t) return {};
  const std::optional<Dtype> dtype = floating(*t);
  STD_TORCH_CHECK(dtype && t->dim() == 1 && t->size(0) == channels && t->is_cpu(), "syncbn::", op,
                  ": expected ", what, " as a floating tensor of shape (", channels,
                  ",) on the CPU, got shape ", shape(*t));
  return {t->data_ptr(), *dtype, t->stride(0)};
}

inline Running running(const char* op, const Maybe& mean, const Maybe& var, const Maybe& batches,
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
inline void check_mixture(const char* op, const Affine& affine, Dtype dtype) {
  for (const Parameter& p : {affine.weight, affine.bias})
    STD_TORCH_CHECK(!p.data || p.dtype == dtype || p.dtype == Dtype::float32, "syncbn::", op,
                    ": mixed dtype: expected weight and bias of x's dtype or float32");
}

// --- tensors as views ------------------------------------------------------------------------

// Tensors of one shape, as views that loops exist for, and the work on them.
struct Problem {
  Dtype dtype;
  int count;
  Tensor tensors[3];
  View views[3];
  Work work;

  // Turns to `size` elements of dimension 0, from `begin` on. False if no loops fit the strides.
  bool look(int64_t begin, int64_t size) {
    const Tensor& x = tensors[0];
    int64_t sizes[most_dims];
    for (int64_t d = 0; d < x.dim(); ++d) sizes[d] = d == 0 ? size : x.size(d);
    Strided strided[3];
    for (int t = 0; t < count; ++t)
      strided[t] = {element(tensors[t], dtype, begin), tensors[t].strides().data()};
    Layout layout;
    if (!make_views(x.dim(), sizes, strided, count, views, &layout)) return false;
    work = make_work(best_loopset(), dtype, layout, views, count);
    return true;
  }
};

inline Problem problem_of(Dtype dtype, const Tensor& x, const Tensor* dy, const Tensor* like_x) {
  Problem p{dtype, 1, {x}, {}, {}};
  if (dy) p.tensors[p.count++] = *dy;
  if (like_x) p.tensors[p.count++] = *like_x;
  return p;
}

// A copy of t with the strides of `like`, which fills its memory without gaps.
inline Tensor copy_like(const Tensor& t, const Tensor& like) {
  Tensor copy = allocate(like.sizes().data(), like.strides().data(), like.dim(), torch_dtype(t));
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor contiguous_copy(const Tensor& t) {
  int64_t strides[most_dims], size = 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) strides[d] = size, size *= t.size(d);
  Tensor copy = allocate(t.sizes().data(), strides, t.dim(), torch_dtype(t));
  torch::stable::copy_(copy, t);
  return copy;
}

// x, perhaps dy, and perhaps a result `like_x`, a new tensor like x. Tensors whose strides fit no
// loop are copied; the copies follow the new tensor's strides, which then fit as well.
inline Problem make_problem(Dtype dtype, const Tensor& x, const Tensor* dy, const Tensor* like_x) {
  Problem p = problem_of(dtype, x, dy, like_x);
  const int64_t size = x.size(0);
  if (!p.look(0, size)) {
    const Tensor model = like_x ? *like_x : new_like(x);
    if (dy) p.tensors[1] = copy_like(*dy, model);
    if (!p.look(0, size)) p.tensors[0] = copy_like(x, model);
    STD_TORCH_CHECK(p.look(0, size), "syncbn: no loops for strides like those of x");
  }
  return p;
}

}  // namespace syncbn::operators
