// From the sizes and strides of tensors to views that the loops understand.
#pragma once

#include <cstdint>

#include "loops/types.h"

namespace syncbn {

constexpr int64_t most_dims = 64;  // as torch's own sums

struct Strided {
  void* data;
  const int64_t* strides;
};

// Dimensions in the order of their strides, largest first; those of size one last. Equal strides
// keep their order.
inline void order_dims(int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t* order) {
  auto before = [&](int64_t a, int64_t b) {
    if (sizes[a] == 1 || sizes[b] == 1) return sizes[a] != 1;
    return strides[a] > strides[b];
  };
  for (int64_t d = 0; d < dims; ++d) {
    int64_t place = d;
    for (; place > 0 && before(d, order[place - 1]); --place) order[place] = order[place - 1];
    order[place] = d;
  }
}

// Views of tensors of the same sizes (N, C, *), as planes or rows. The dimensions other than C are
// taken in the order of the first tensor's strides, and two neighbours become one where they can in
// all tensors. False if more than two remain, or if no layout fits all tensors.
inline bool make_views(int64_t dims, const int64_t* sizes, const Strided* tensors, int count,
                       View* views, Layout* layout) {
  int64_t order[most_dims], groups = 0, size[2] = {1, 1}, last[2] = {-1, -1};
  order_dims(dims, sizes, tensors[0].strides, order);
  for (int64_t k = 0; k < dims; ++k) {
    const int64_t d = order[k];
    if (d == 1 || sizes[d] == 1) continue;
    bool joins = groups > 0;
    for (int t = 0; joins && t < count; ++t)
      joins = tensors[t].strides[last[groups - 1]] == sizes[d] * tensors[t].strides[d];
    if (!joins && groups == 2) return false;
    groups += !joins;
    size[groups - 1] *= sizes[d];
    last[groups - 1] = d;
  }
  const int64_t inner = groups - 1, outer = groups - 2;  // of the two groups, −1 for none
  bool planes = true, rows = true;
  for (int t = 0; t < count; ++t) {
    const int64_t* strides = tensors[t].strides;
    View& v = views[t];
    v.data = static_cast<char*>(tensors[t].data);
    v.channels = sizes[1];
    v.channel_stride = sizes[1] == 1 ? 1 : strides[1];
    v.inner = inner < 0 ? 1 : size[inner];
    v.outer = outer < 0 ? 1 : size[outer];
    v.inner_stride = inner < 0 ? 1 : strides[last[inner]];
    v.outer_stride = outer < 0 ? 0 : strides[last[outer]];
    planes = planes && v.inner_stride == 1;
    rows = rows && v.channel_stride == 1;
  }
  *layout =
      planes && (sizes[1] == 1 || views[0].inner > 1 || !rows) ? Layout::planes : Layout::rows;
  return planes || rows;
}

// Whether each element has its own place and there are no gaps between them.
inline bool is_dense(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t order[most_dims], expected = 1;
  order_dims(dims, sizes, strides, order);
  bool dense = true, empty = false;
  for (int64_t k = dims - 1; k >= 0; --k) {
    const int64_t d = order[k];
    empty = empty || sizes[d] == 0;
    if (sizes[d] == 1) continue;
    dense = dense && strides[d] == expected;
    expected *= sizes[d];
  }
  return dense || empty;
}

// The strides that torch.empty_like gives a tensor: its own where it is dense, else dense ones in
// the same order (at::infer_dense_strides, whose treatment of ties and zeros this follows).
inline void strides_like(int64_t dims, const int64_t* sizes, const int64_t* strides,
                         int64_t* result) {
  if (is_dense(dims, sizes, strides)) {
    for (int64_t d = 0; d < dims; ++d) result[d] = strides[d];
    return;
  }
  int64_t order[most_dims];  // from the smallest stride
  for (int64_t k = 0; k < dims; ++k) order[k] = dims - 1 - k;
  auto compare = [&](int64_t a, int64_t b) {
    if (strides[a] == 0 || strides[b] == 0) return 0;
    if (strides[a] != strides[b]) return strides[a] < strides[b] ? -1 : 1;
    return sizes[a] > sizes[b] ? 1 : 0;
  };
  for (int64_t k = 1; k < dims; ++k) {
    int64_t place = k;
    for (int64_t other = k - 1; other >= 0; --other) {
      const int comparison = compare(order[other], order[place]);
      if (comparison < 0) break;
      if (comparison == 0) continue;
      const int64_t swapped = order[other];
      order[other] = order[place];
      order[place] = swapped;
      place = other;
    }
  }
  int64_t expected = 1;
  for (int64_t k = 0; k < dims; ++k) {
    result[order[k]] = expected;
    expected *= sizes[order[k]];
  }
}

}  // namespace syncbn
