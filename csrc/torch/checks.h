// What the operators demand of torch's tensors, and what they say where it is not so. Some checks
// give what was checked, as the steps take it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "plan/geometry.h"
#include "plan/parameters.h"

namespace syncbn::operators {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int32_t torch_dtype(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// The dtype, where it is one that there are loops for.
inline std::optional<Dtype> floating_dtype(const Tensor& t) {
  static const int32_t codes[dtypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                        aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  const int32_t dtype = torch_dtype(t);
  for (int d = 0; d < dtypes; ++d)
    if (codes[d] == dtype) return Dtype(d);
  return std::nullopt;
}

// Throws an error whose text is the parts in a row. STD_TORCH_CHECK would add a file and a line.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

#define SYNCBN_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) refuse(__VA_ARGS__)

inline std::string shape_text(int64_t dims, const int64_t* sizes) {
  std::string text = "(";
  for (int64_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + ")";
}
inline std::string shape_text(const Tensor& t) { return shape_text(t.dim(), t.sizes().data()); }

constexpr int64_t bytes_of[dtypes] = {4, 8, 2, 2};

inline double* as_doubles(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

// Refuses t, of elements of `bytes` each, where its storage ends before its sizes and strides do.
// So does src/syncbn/tensors/storages.py, earlier, wherever a message would go out before an
// operator runs.
inline void check_held(const char* what, const Tensor& t, int64_t bytes) {
  int64_t held, end;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &end));
  const int64_t *sizes = t.sizes().data(), *strides = t.strides().data(), dims = t.dim();
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return;
    end += (sizes[d] - 1) * strides[d];
  }
  SYNCBN_CHECK(held >= (end + 1) * bytes, "sync_batch_norm: expected ", what,
               " with its values in memory, got a storage of ", held, " bytes where it needs ",
               (end + 1) * bytes,
               "; it was freed or shrunk, as sharding and offloading do: gather "
               "it or bring it back first");
}

inline Dtype check_input(const char* op, const Tensor& x) {
  SYNCBN_CHECK(x.dim() >= 2 && x.dim() <= most_dims && x.size(1) > 0, "syncbn::", op,
               ": expected x of shape (N, C, *) with C > 0 and at most ", most_dims,
               " dimensions, got shape ", shape_text(x));
  const std::optional<Dtype> dtype = floating_dtype(x);
  SYNCBN_CHECK(dtype, "syncbn::", op,
               ": expected x of dtype float32, float64, bfloat16 or float16, got another dtype");
  check_held("input", x, bytes_of[int(*dtype)]);
  return *dtype;
}

// Checks x too, and gives the dtype of both.
inline Dtype check_gradient(const char* op, const Tensor& dy, const Tensor& x) {
  check_input(op, x);
  const std::optional<Dtype> dtype = floating_dtype(dy);
  bool same = dtype && dy.dim() == x.dim() && torch_dtype(dy) == torch_dtype(x);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = dy.size(d) == x.size(d);
  SYNCBN_CHECK(same, "syncbn::", op, ": expected dy of x's dtype and shape ", shape_text(x),
               ", got shape ", shape_text(dy),
               torch_dtype(dy) == torch_dtype(x) ? "" : ", another dtype");
  check_held("the output's gradient", dy, bytes_of[int(*dtype)]);
  return *dtype;
}

// The numbers of a float64 tensor, `what`, that has to be contiguous and to hold n of them.
inline const double* check_doubles(const char* op, const char* what, const Tensor& t, int64_t n) {
  SYNCBN_CHECK(torch_dtype(t) == aoti_torch_dtype_float64() && t.numel() == n && t.is_contiguous(),
               "syncbn::", op, ": expected ", what, " as ", n,
               " contiguous float64 numbers, got shape ", shape_text(t));
  check_held(what, t, 8);
  return as_doubles(t);
}

inline Parameter check_parameter(const char* op, const char* what, const OptionalTensor& t,
                                 int64_t channels) {
  if (!t) return {};
  const std::optional<Dtype> dtype = floating_dtype(*t);
  SYNCBN_CHECK(dtype && t->dim() == 1 && t->size(0) == channels && t->is_cpu(), "syncbn::", op,
               ": expected ", what, " as a floating tensor of shape (", channels,
               ",) on the CPU, got shape ", shape_text(*t));
  check_held(what, *t, bytes_of[int(*dtype)]);
  return {true, t->data_ptr(), *dtype, t->stride(0)};
}

// num_batches_tracked. A cumulative average divides by it once it has counted this batch.
inline Counter check_counter(const char* op, const Tensor& t, bool cumulative) {
  struct Kind {
    int32_t dtype;
    int64_t bytes;
    double (*increment)(void*);
  };
  static const Kind kinds[] = {{aoti_torch_dtype_int64(), 8, increment<int64_t>},
                               {aoti_torch_dtype_int32(), 4, increment<int32_t>},
                               {aoti_torch_dtype_int16(), 2, increment<int16_t>},
                               {aoti_torch_dtype_int8(), 1, increment<int8_t>},
                               {aoti_torch_dtype_uint8(), 1, increment<uint8_t>},
                               {aoti_torch_dtype_float32(), 4, increment<float>},
                               {aoti_torch_dtype_float64(), 8, increment<double>},
                               {aoti_torch_dtype_bfloat16(), 2, increment<BFloat16>},
                               {aoti_torch_dtype_float16(), 2, increment<Half>}};
  const int32_t dtype = torch_dtype(t);
  const Kind* kind = nullptr;
  for (const Kind& one : kinds)
    if (one.dtype == dtype) {
      kind = &one;
      break;
    }
  SYNCBN_CHECK(kind && t.numel() == 1 && t.is_cpu(), "syncbn::", op,
               ": expected num_batches_tracked as one real number on the CPU, got shape ",
               shape_text(t));
  check_held("num_batches_tracked", t, kind->bytes);
  const Counter found{true, t.data_ptr(), kind->increment};
  if (cumulative) {
    alignas(8) char next[8];
    std::memcpy(next, found.data, size_t(kind->bytes));
    SYNCBN_CHECK(found.increment(next) > 0, "syncbn::", op,
                 ": expected num_batches_tracked that counts on to more than 0");
  }
  return found;
}

inline Running check_running(const char* op, const OptionalTensor& mean, const OptionalTensor& var,
                             const OptionalTensor& batches, std::optional<double> momentum,
                             int64_t channels) {
  Running r;
  r.mean = check_parameter(op, "running_mean", mean, channels);
  r.var = check_parameter(op, "running_var", var, channels);
  r.cumulative = !momentum.has_value();
  r.momentum = momentum.value_or(0);
  if (batches) r.batches = check_counter(op, *batches, r.cumulative);
  return r;
}

}  // namespace syncbn::operators
