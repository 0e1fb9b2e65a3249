// Ranks that are threads exchange through memory that they share: in order, whole, however late
// they are, with fewer cores than ranks, over the wrap of the numbers, and with ends.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "exchange/shared_memory.h"

namespace syncbn::exchange::test {

std::atomic<int> faults;

void check(bool right, const char* what) {
  if (!right) ++faults, std::printf("FAILED: %s\n", what);
}

struct World {
  World(int64_t size, int64_t capacity, uint32_t first)
      : bytes(size_t(size) * (sizeof(Line) + 2 * size_t(capacity)) + 128),
        memory{align(bytes.data()), size, capacity} {
    for (int64_t rank = 0; rank < size; ++rank) memory.line(rank).published = first;
  }
  static char* align(char* p) { return p + (128 - uintptr_t(p) % 128) % 128; }
  std::vector<char> bytes;
  Memory memory;
};

template <class F>
void on_ranks(const World& world, F run) {
  std::vector<std::thread> ranks;
  for (int64_t rank = 0; rank < world.memory.world; ++rank) ranks.emplace_back(run, rank);
  for (std::thread& rank : ranks) rank.join();
}

int64_t value(int64_t rank, uint32_t number, int64_t i) { return rank * 1000003 + number * 31 + i; }

// Messages of changing lengths, with ranks that are late now and then.
void exchanges(int64_t size, uint32_t first, const Patience& patience) {
  const int64_t most = 40;
  const World world(size, most * 8, first);
  on_ranks(world, [&](int64_t rank) {
    std::vector<int64_t> sent(most), received(size_t(size * most));
    for (uint32_t number = first + 1; number != first + 401; ++number) {
      if (number % 97 == uint32_t(rank)) std::this_thread::yield();
      const int64_t count = number % (most + 1);
      for (int64_t i = 0; i < count; ++i) sent[size_t(i)] = value(rank, number, i);
      publish(world.memory, rank, number, whole(sent.data(), count * 8));
      int64_t from = 0;
      while (from >= 0 && from < size)
        from = receive(world.memory, number, reinterpret_cast<char*>(received.data()), count * 8,
                       count * 8, from, patience);
      check(from == size, "all messages come");
      bool right = true;
      for (int64_t other = 0; other < size; ++other)
        for (int64_t i = 0; i < count; ++i)
          right = right && received[size_t(other * count + i)] == value(other, number, i);
      check(right, "a message arrives as it was sent");
    }
  });
}

// A head and a body that lie apart arrive as one message; heads that differ are seen.
void heads_and_bodies() {
  const World world(3, 64, 0);
  on_ranks(world, [&](int64_t rank) {
    const Patience patience{10, 1, 1000000000000};
    for (uint32_t number = 1; number <= 60; ++number) {
      const bool differ = number % 3 == 0 && rank == 2;
      const int64_t head[2] = {number, differ ? 1 : 0}, body[2] = {rank, number};
      publish(
          world.memory, rank, number,
          {reinterpret_cast<const char*>(head), 16, reinterpret_cast<const char*>(body), 16, 48});
      check(wait_for_all(world.memory, number, 0, patience) == 3, "all heads come");
      check(begin_alike(world.memory, number, 16) == (number % 3 != 0), "heads are compared");
      int64_t bodies[6], messages[18];
      copy_all(world.memory, number, 16, reinterpret_cast<char*>(bodies), 16, 16);
      copy_all(world.memory, number, 0, reinterpret_cast<char*>(messages), 48, 48);
      for (int64_t other = 0; other < 3; ++other) {
        const int64_t* message = messages + 6 * other;
        check(bodies[2 * other] == other && bodies[2 * other + 1] == number, "bodies arrive");
        check(message[0] == number && message[2] == other && message[4] == 0 && message[5] == 0,
              "messages arrive, filled up with zeros");
      }
    }
  });
}

void an_end_wakes_who_waits() {
  const World world(3, 8, 0);
  on_ranks(world, [&](int64_t rank) {
    if (rank == 1) {
      while (world.memory.line(1).sleepers.load() != 2) std::this_thread::yield();
      end(world.memory, 1);
      return;
    }
    publish(world.memory, rank, 1, whole(nullptr, 0));
    check(receive(world.memory, 1, nullptr, 0, 0, 0, {10, 1, 1000000000000}) == 1,
          "who waits sees the end");
  });
}

void time_ends() {
  const World world(2, 8, 0);
  publish(world.memory, 0, 1, whole(nullptr, 0));
  check(receive(world.memory, 1, nullptr, 0, 0, 0, {10, 1, 1000000}) == 1, "time ends a wait");
}

}  // namespace syncbn::exchange::test

int main() {
  using namespace syncbn::exchange::test;
  alarm(300);  // ends who sleeps on because nothing woke it: waits are longer than that
  for (int64_t size : {1, 2, 3, 8}) {
    exchanges(size, 0, {100, 10, 1000000000});
    exchanges(size, UINT32_MAX - 200, {0, 0, 1000000000});
    exchanges(size, 7, {0, 0, 1000});  // nearly no patience: they come back again and again
  }
  heads_and_bodies();
  an_end_wakes_who_waits();
  time_ends();
  std::printf("exchange: %d failed\n", int(faults));
  return faults ? 1 : 0;
}
