// Huge pages for large results, whose page faults cost more than the arithmetic.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace syncbn {

// The most that glibc lets its M_MMAP_THRESHOLD grow to. From here on nearly every tensor gets a
// mapping of its own, in which the kernel has to find and clear each page, and which goes when the
// tensor does. Smaller ones mostly get memory that has its pages and stays, where others come to
// lie.
constexpr int64_t least_for_huge_pages = int64_t(32) << 20;

#if defined(MADV_HUGEPAGE)
constexpr bool asks_for_huge_pages = true;
#else
constexpr bool asks_for_huge_pages = false;
#endif

// Asks for huge pages for memory that nobody has written to yet, as far as whole ones lie in it, if
// it is large. The system may refuse, and the memory of another allocator may have its pages
// already: then all is as it was.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
  if (!asks_for_huge_pages || bytes < least_for_huge_pages) return;
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;  // of most processors, else it is a multiple
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + uintptr_t(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data;
#endif
}

}  // namespace syncbn
