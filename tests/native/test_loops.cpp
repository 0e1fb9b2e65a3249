// Random shapes, layouts and values through every loop, compared with long double, without torch.
// Usage: test_loops [seed] [cases] [first case: the first 24 are large]. Built with sanitizers by
// `make test-native`.
#include <cstdio>
#include <cstdlib>

#include "judge.h"
#include "threads.h"

namespace syncbn::test {

struct Operation {
  const char* name;
  Output (*run)(const Call&);
  void (*judge)(Judge&, const Output&);
};
const Operation operations[] = {{"measure", run_measure, judge_measure},
                                {"normalise", run_normalise, judge_normalise},
                                {"gradient_sums", run_gradient_sums, judge_gradient_sums},
                                {"input_gradient", run_input_gradient, judge_input_gradient},
                                {"forward", run_forward, judge_forward},
                                {"backward", run_backward, judge_backward}};

struct Tally {
  int64_t passed = 0, failed = 0;
};

// Tensors without values only merge what others measured: torch/operators.h calls no loops on them.
void test(const Case& c, Tally& tally) {
  for (const Operation& operation : operations) {
    if (c.count == 0 && operation.run != run_normalise) continue;
    for_loopsets([&](const Loopset& set) {
      Judge judge{c, operation.name, set.name};
      const Output once = operation.run({c, set, serial});
      operation.judge(judge, once);
      for (const Parallel& parallel : parallels)
        if (c.x.numel() > 4096 && !(operation.run({c, set, parallel}) == once)) {
          const std::string threads = std::to_string(parallel.threads);
          judge.fail(("another result on " + threads + " threads than on one").c_str());
        }
      ++(judge.failures ? tally.failed : tally.passed);
    });
  }
}

}  // namespace syncbn::test

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int cases = argc > 2 ? std::atoi(argv[2]) : 150;
  const int first = argc > 3 ? std::atoi(argv[3]) : 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 4096);  // what failed is seen even if a sanitizer ends it
  syncbn::test::Tally tally;
  for (int number = first; number < first + cases; ++number)
    syncbn::test::test(syncbn::test::random_case(seed, number), tally);
  std::printf("seed %llu, %d cases\n%lld passed, %lld failed\n", (unsigned long long)seed, cases,
              (long long)tally.passed, (long long)tally.failed);
  return tally.failed ? 1 : 0;
}
