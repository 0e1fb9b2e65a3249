// Loops spread over threads as torch's pool does it.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "plan/parallel.h"
#include "plan/work.h"

namespace syncbn::test {

template <int64_t threads>
void on_threads(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
  const int64_t parts = std::min(threads, ceil_div(end - begin, grain));
  const int64_t part = ceil_div(end - begin, parts);
  std::vector<std::thread> running;
  for (int64_t b = begin; b < end; b += part)
    running.emplace_back(body, b, std::min(b + part, end), context);
  for (std::thread& t : running) t.join();
}
const Parallel serial{nullptr, 1};  // one thread calls no run
const Parallel parallels[] = {{on_threads<2>, 2}, {on_threads<3>, 3}, {on_threads<7>, 7}};

}  // namespace syncbn::test
