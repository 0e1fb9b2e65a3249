// Torch's tensors as the views that the loops take: allocation, strides, copies.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "loops/isa.h"
#include "plan/geometry.h"
#include "plan/huge_pages.h"
#include "steps/steps.h"
#include "torch/checks.h"

namespace syncbn::operators {

// --- threads and memory ----------------------------------------------------------------------

inline Parallel parallel() {
  auto run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {run, int64_t(torch::stable::get_num_threads())};
}

inline Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t dtype) {
  AtenTensorHandle handle;
  SYNCBN_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(),
                                        0, &handle) == AOTI_TORCH_SUCCESS,
               "sync_batch_norm: expected memory for a result of shape ", shape_text(dims, sizes),
               ", got none from torch, which says why above; take a smaller batch");
  Tensor result(handle);
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  ask_for_huge_pages(result.data_ptr(), bytes);
  return result;
}

// What torch.empty_like gives. The stable ABI has that too, through the dispatcher, which takes
// three times as long and has errors of its own.
inline Tensor new_like(const Tensor& x) {
  int64_t strides[most_dims];
  strides_like(x.dim(), x.sizes().data(), x.strides().data(), strides);
  return allocate(x.sizes().data(), strides, x.dim(), torch_dtype(x));
}

inline Tensor empty_doubles(int64_t n) {
  const int64_t one = 1;
  return allocate(&n, &one, 1, aoti_torch_dtype_float64());
}
inline Tensor empty_doubles(int64_t rows, int64_t n) {
  const int64_t sizes[] = {rows, n}, strides[] = {n, 1};
  return allocate(sizes, strides, 2, aoti_torch_dtype_float64());
}

// Where element n of dimension 0 of t begins.
inline void* element(const Tensor& t, Dtype dtype, int64_t n) {
  return static_cast<char*>(t.data_ptr()) + n * t.stride(0) * bytes_of[int(dtype)];
}

// --- tensors as views ------------------------------------------------------------------------

// Tensors of one shape (x, perhaps dy, perhaps a result), as views that there are loops for, and
// the work on them.
struct Problem {
  Dtype dtype;
  int count;
  Tensor tensors[3];
  View views[3];
  Work work;

  // Views `size` elements of dimension 0, from `begin` on. False if no loops fit the strides.
  bool view_samples(int64_t begin, int64_t size) {
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

// A problem that views nothing yet.
inline Problem unviewed_problem(Dtype dtype, const Tensor& x, const Tensor* dy,
                                const Tensor* like_x) {
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

// x, perhaps dy, and perhaps a result `like_x`, which is a new tensor like x, all of them viewed.
// Where no loops fit the strides, dy, then x too, is copied to the strides of a new tensor like x,
// which there are loops for.
inline Problem make_problem(Dtype dtype, const Tensor& x, const Tensor* dy, const Tensor* like_x) {
  Problem p = unviewed_problem(dtype, x, dy, like_x);
  const int64_t size = x.size(0);
  if (!p.view_samples(0, size)) {
    const Tensor model = like_x ? *like_x : new_like(x);
    if (dy) p.tensors[1] = copy_like(*dy, model);
    if (!p.view_samples(0, size)) p.tensors[0] = copy_like(x, model);
    SYNCBN_CHECK(p.view_samples(0, size), "syncbn: no loops for strides like those of x");
  }
  return p;
}

}  // namespace syncbn::operators
