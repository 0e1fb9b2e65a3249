// Random samples, added up in random parts and by every number of threads: always the same bits,
// and the sums of long double. Usage: test_samples [seed] [cases]. See test_loops.cpp.
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "loops/isa.h"
#include "steps/samples.h"
#include "threads.h"

namespace syncbn::test {

using Numbers = std::vector<double>;

struct Samples {
  int64_t size, channels;
  bool single;  // one value per channel each
  Numbers packed;

  const double* at(int64_t n) const { return packed.data() + n * (1 + 2 * channels); }
};

Samples random_samples(Random& r) {
  Samples s{
      r.below(r.chance(20) ? 3000 : 40), 1 + r.below(r.chance(30) ? 300 : 20), r.chance(40), {}};
  for (int64_t n = 0; n < s.size; ++n) {
    const int64_t count = s.single ? 1 : r.below(50);
    s.packed.push_back(double(count));
    for (int64_t c = 0; c < 2 * s.channels; ++c) {
      const double value = double(std::ldexp(r.normal(), int(c % 90) - 45));
      const bool is_mean = c < s.channels, none = count == 0 || (!is_mean && s.single);
      s.packed.push_back(none ? 0 : is_mean ? value : std::fabs(value) * double(count));
    }
  }
  return s;
}

// What a rank sends of samples [begin, end).
Numbers sent(const Samples& s, const Loopset& set, const Parallel& parallel, int64_t begin,
             int64_t end) {
  Numbers result(size_t(1 + 2 * accumulator_rows * s.channels));
  for (int64_t n = begin; n < end; ++n) result[0] += s.at(n)[0];
  const int64_t row = 1 + 2 * s.channels;
  accumulate_in_parts(parallel, set.reproducible, end - begin, 40000 * (end - begin), 2, s.channels,
                      result.data() + 1, [&](int64_t from, int64_t to, double* sums) {
    if (s.single)
      add_values(
          set.reproducible, s.channels, false, from, to, sums,
          [&](int64_t n, double* values) { std::copy_n(s.at(begin + n) + 1, s.channels, values); });
    else
      add_moments(set.reproducible, s.channels, from, to, sums,
                  [&](int64_t n, double* packed) { std::copy_n(s.at(begin + n), row, packed); });
  });
  return result;
}

Numbers merged(const Loopset& set, const std::vector<Numbers>& ranks, int64_t channels) {
  Numbers received, packed(size_t(1 + 2 * channels));
  for (const Numbers& rank : ranks) received.insert(received.end(), rank.begin(), rank.end());
  merge_accumulators(set.reproducible, received.data(), int64_t(ranks.size()),
                     int64_t(ranks[0].size()), channels, packed.data());
  return packed;
}

Numbers summed(const Samples& s, const Loopset& set, const Parallel& parallel) {
  const int64_t row = 1 + 2 * s.channels;
  Numbers result(size_t(accumulator_rows * row)), high(size_t(row), 0), low(size_t(row), 0);
  accumulate_in_parts(parallel, set.reproducible, s.size, 40000 * s.size, 1, row, result.data(),
                      [&](int64_t from, int64_t to, double* sums) {
    add_rows(set.reproducible, row, from, to, sums,
             [&](int64_t n, double* numbers) { std::copy_n(s.at(n), row, numbers); });
  });
  set.reproducible.finalise(result.data(), 1, 0, row, high.data(), low.data());
  return high;
}

bool near(Exact got, Exact expected, Exact size) {
  return std::fabs(got - expected) <= 0x1p-48L * size;
}

// Whether `packed` are the samples' moments and `sums` the sums of their numbers.
bool right(const Samples& s, const Numbers& packed, const Numbers& sums) {
  bool fine = true;
  for (int64_t c = 0; c < s.channels; ++c) {
    Exact count = 0, mean = 0, m2 = 0, largest = 0, total = 0, size = 0;
    for (int64_t n = 0; n < s.size; ++n) {
      count += s.at(n)[0], mean += s.at(n)[0] * Exact(s.at(n)[1 + c]);
      total += s.at(n)[1 + c], size += std::fabs(s.at(n)[1 + c]);
    }
    mean /= std::max<Exact>(count, 1);
    for (int64_t n = 0; n < s.size; ++n) {
      const Exact delta = s.at(n)[1 + c] - mean;
      m2 += s.at(n)[1 + s.channels + c] + s.at(n)[0] * delta * delta;
      largest = std::max(largest, std::fabs(Exact(s.at(n)[1 + c])));
    }
    fine = fine && packed[0] == count && near(packed[size_t(1 + c)], mean, largest) &&
           near(packed[size_t(1 + s.channels + c)], m2, m2 + count * mean * mean * 0x1p-20L) &&
           near(sums[size_t(1 + c)], total, size);
  }
  return fine;
}

// Of all numbers so far: the same for every compiler and processor.
uint32_t bits = 2166136261u;

void take_bits(const Numbers& numbers) {
  const unsigned char* p = reinterpret_cast<const unsigned char*>(numbers.data());
  for (size_t i = 0; i < numbers.size() * sizeof(double); ++i) bits = (bits ^ p[i]) * 16777619u;
}

int failures(uint64_t seed, int number) {
  Random r{std::mt19937_64(seed * 1000003 + uint64_t(number))};
  const Samples s = random_samples(r);
  Numbers first, first_sums;
  int failed = 0;
  auto check = [&](bool fine, const char* what, const char* set) {
    if (fine) return;
    ++failed;
    std::printf("FAILED %s (%s), case %d: %lld samples, %lld channels\n", what, set, number,
                (long long)s.size, (long long)s.channels);
  };
  for_loopsets([&](const Loopset& set) {
    const Numbers whole = sent(s, set, serial, 0, s.size),
                  packed = merged(set, {whole}, s.channels);
    const Numbers sums = summed(s, set, serial);
    if (first.empty()) first = packed, first_sums = sums, take_bits(packed), take_bits(sums);
    check(right(s, packed, sums), "sums", set.name);
    check(packed == first && sums == first_sums, "other bits on another processor", set.name);
    for (const Parallel& parallel : parallels)
      check(sent(s, set, parallel, 0, s.size) == whole && summed(s, set, parallel) == sums,
            "other bits on other threads", set.name);
    std::vector<Numbers> ranks;
    for (int64_t begin = 0; begin < s.size || ranks.empty();) {
      const int64_t end = begin + r.below(s.size - begin + 1);
      ranks.push_back(sent(s, set, serial, begin, end));
      begin = end;
    }
    check(merged(set, ranks, s.channels) == packed, "other bits of another split", set.name);
  });
  return failed;
}

}  // namespace syncbn::test

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int cases = argc > 2 ? std::atoi(argv[2]) : 150;
  int failed = 0;
  for (int number = 0; number < cases; ++number) failed += syncbn::test::failures(seed, number);
  std::printf("samples: seed %llu, %d cases, %d failed, bits %08x\n", (unsigned long long)seed,
              cases, failed, syncbn::test::bits);
  return failed ? 1 : 0;
}
