// Which instruction sets there are loops for, and the best that this processor has.
#pragma once

#include "types.h"

namespace syncbn {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SYNCBN_X86_LEVELS
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

// Calls use(loopset) for each set this processor can run, the best first.
template <class Use>
void for_loopsets(Use use) {
#ifdef SYNCBN_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) use(v4::loopset);
  if (__builtin_cpu_supports("x86-64-v3")) use(v3::loopset);
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
