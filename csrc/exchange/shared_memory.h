// Messages among processes of one host, through memory that they share.
//
// Messages are numbered, the same on every rank. For each a rank copies what it sends into a slot
// of its own, publishes the number, waits until all others have published it, and copies theirs.
// Two slots per rank, in turn, are enough: who publishes number n has done with n - 1, so that all
// have done with n - 2 when n - 1 has come from everybody, and its slot may be written again.
#pragma once

#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace syncbn::exchange {

// What a rank tells the others beside its messages. The memory begins as zeros.
struct alignas(128) Line {
  std::atomic<uint32_t> published;  // the number of its last message, from 1, modulo 2^32
  std::atomic<uint32_t> ended;      // it will send no more
  std::atomic<uint32_t> sleepers;   // who wait for news of it in the kernel
  std::atomic<uint32_t> news;       // changes with the first two where somebody sleeps
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "processes share no lock");

struct Memory {
  char* lines;  // one Line per rank, then two times one slot per rank
  int64_t world;
  int64_t capacity;  // of a slot, in bytes

  Line& line(int64_t rank) const { return reinterpret_cast<Line*>(lines)[rank]; }
  char* slot(int64_t rank, uint32_t number) const {
    const int64_t before = (number & 1) * world + rank;
    return lines + world * int64_t(sizeof(Line)) + before * capacity;
  }
};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Sleeps while the word has this value, for that long at most. May wake up early.
inline void sleep_while(std::atomic<uint32_t>& word, uint32_t value, int64_t nanoseconds) {
#ifdef __linux__
  const timespec limit{time_t(nanoseconds / 1000000000), long(nanoseconds % 1000000000)};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &limit, nullptr, 0);
#else
  const timespec pause{0, 20000};
  nanosleep(&pause, nullptr);
  (void)word, (void)value, (void)nanoseconds;
#endif
}

// Wakes who sleep, and who are about to: they have counted themselves before they looked.
inline void wake_all(Line& line) {
  if (line.sleepers.load() == 0) return;
  line.news.fetch_add(1);
#ifdef __linux__
  syscall(SYS_futex, &line.news, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

inline bool has(const Line& line, uint32_t number) {
  return int32_t(line.published.load() - number) >= 0;
}

// How to wait: so many looks at the word, then so many turns that other processes may take, then
// asleep. A look takes about 40 ns.
struct Patience {
  int64_t looks;
  int64_t turns;
  int64_t nanoseconds;  // in all
};

// Whether the message has come. False when the time is over or the rank has ended.
inline bool wait(Line& line, uint32_t number, const Patience& patience) {
  for (int64_t i = 0; i < patience.looks; ++i, relax())
    if (has(line, number)) return true;
  for (int64_t i = 0; i < patience.turns; ++i, sched_yield())
    if (has(line, number)) return true;
  const int64_t end = now() + patience.nanoseconds;
  for (;;) {
    line.sleepers.fetch_add(1);
    const uint32_t news = line.news.load();  // before the look at what it tells of
    const bool ended = line.ended.load() != 0;
    const int64_t left = end - now();
    if (!has(line, number) && !ended && left > 0) sleep_while(line.news, news, left);
    line.sleepers.fetch_sub(1);
    if (has(line, number)) return true;
    if (ended || left <= 0) return false;
  }
}

// What one rank sends: parts that lie apart, one after the other, then zeros up to `length` bytes.
struct Message {
  const char* head;
  int64_t head_length;
  const char* body;
  int64_t body_length;
  int64_t length;
};

inline Message whole(const void* sent, int64_t length) {
  return {nullptr, 0, static_cast<const char*>(sent), length, length};
}

inline void publish(const Memory& memory, int64_t rank, uint32_t number, const Message& sent) {
  char* slot = memory.slot(rank, number);
  const int64_t end = sent.head_length + sent.body_length;
  if (sent.head_length > 0) std::memcpy(slot, sent.head, size_t(sent.head_length));
  if (sent.body_length > 0)
    std::memcpy(slot + sent.head_length, sent.body, size_t(sent.body_length));
  if (sent.length > end) std::memset(slot + end, 0, size_t(sent.length - end));
  Line& line = memory.line(rank);
  line.published.store(number);
  wake_all(line);
}

inline void end(const Memory& memory, int64_t rank) {
  Line& line = memory.line(rank);
  line.ended.store(1);
  wake_all(line);
}

// Waits until all ranks' messages have come. Returns world; or a rank whose message has not come,
// or that ended after it, so that the others need not begin what it has given up. Those before
// `from` are known to have sent theirs.
inline int64_t wait_for_all(const Memory& memory, uint32_t number, int64_t from,
                            const Patience& patience) {
  for (int64_t other = from; other < memory.world; ++other)
    if (!wait(memory.line(other), number, patience)) return other;
  for (int64_t other = 0; other < memory.world; ++other)
    if (memory.line(other).ended.load() != 0) return other;
  return memory.world;
}

// Whether the messages, which have come from all ranks, begin alike.
inline bool begin_alike(const Memory& memory, uint32_t number, int64_t length) {
  for (int64_t other = 1; other < memory.world; ++other)
    if (std::memcmp(memory.slot(0, number), memory.slot(other, number), size_t(length)) != 0)
      return false;
  return true;
}

// Copies `length` bytes of each message, which have come from all ranks, to places `stride` apart.
inline void copy_all(const Memory& memory, uint32_t number, int64_t begin, char* received,
                     int64_t stride, int64_t length) {
  if (length > 0)
    for (int64_t other = 0; other < memory.world; ++other)
      std::memcpy(received + other * stride, memory.slot(other, number) + begin, size_t(length));
}

// Both: the first `length` bytes of each message.
inline int64_t receive(const Memory& memory, uint32_t number, char* received, int64_t stride,
                       int64_t length, int64_t from, const Patience& patience) {
  const int64_t came = wait_for_all(memory, number, from, patience);
  if (came == memory.world) copy_all(memory, number, 0, received, stride, length);
  return came;
}

}  // namespace syncbn::exchange
