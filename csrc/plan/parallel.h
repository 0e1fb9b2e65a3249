// How work is spread over threads: by torch's thread pool, or by what a test puts in its place.
#pragma once

#include <cstdint>

namespace syncbn {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);

  // Calls body on consecutive parts of [begin, end), each at least `grain` long.
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
  int64_t threads;

  template <class F>
  void operator()(int64_t count, int64_t grain, F body) const {
    if (threads == 1 || count <= grain) {
      if (count > 0) body(int64_t(0), count);
      return;
    }
    Body call = [](int64_t begin, int64_t end, void* context) {
      (*static_cast<F*>(context))(begin, end);
    };
    run(0, count, grain, call, &body);
  }
};

}  // namespace syncbn
