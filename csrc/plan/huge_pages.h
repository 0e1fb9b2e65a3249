// Huge pages for large results, whose page faults otherwise cost several times the arithmetic.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace syncbn {

constexpr int64_t huge_page = int64_t(2) << 20;

// The size from which memory is always a fresh mapping, which the kernel has to fill with zeros
// page by page: the most that glibc lets its M_MMAP_THRESHOLD grow to. Smaller tensors mostly get
// memory that was used before, which has its pages.
constexpr int64_t least_for_huge_pages = int64_t(32) << 20;

// Asks for huge pages inside memory that was just allocated, if it is large. Whether they come is
// for the kernel to decide; the memory holds the same numbers either way.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < least_for_huge_pages) return;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + uintptr_t(bytes);
  const uintptr_t mask = uintptr_t(huge_page) - 1;
  const uintptr_t first = (begin + mask) & ~mask, last = end & ~mask;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace syncbn
