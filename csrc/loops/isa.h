// Which instruction sets there are loops for, and the best that this processor has.
#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "loops/types.h"

namespace syncbn {

#ifdef __x86_64__
namespace v4 {
extern const Loopset loopset;
}
namespace v3 {
extern const Loopset loopset;
}
#endif
namespace baseline {
extern const Loopset loopset;
}

#ifdef __x86_64__
// What isa_v3.cpp and isa_v4.cpp are compiled for. Not every compiler knows the levels' own names,
// or those of F16C, MOVBE and LZCNT.
inline bool has_v3() {
  unsigned a, b, ecx = 0, d, extended = 0;
  __get_cpuid(1, &a, &b, &ecx, &d);
  __get_cpuid(0x80000001, &a, &b, &extended, &d);
  const bool f16c = ecx >> 29 & 1, movbe = ecx >> 22 & 1, lzcnt = extended >> 5 & 1;
  return f16c && movbe && lzcnt && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
inline bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

// Calls use(loopset) for each set this processor can run, the best first.
template <class Use>
void for_loopsets(Use use) {
#ifdef __x86_64__
  if (has_v4()) use(v4::loopset);
  if (has_v3()) use(v3::loopset);
#endif
  use(baseline::loopset);
}

inline const Loopset& best_loopset() {
  static const Loopset& best = []() -> const Loopset& {
    const Loopset* first = nullptr;
    for_loopsets([&](const Loopset& set) {
      if (!first) first = &set;
    });
    return *first;
  }();
  return best;
}

}  // namespace syncbn
