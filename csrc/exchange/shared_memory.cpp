// What comm/shared_memory.py calls.
#include "exchange/shared_memory.h"

#define SYNCBN_EXPORT extern "C" __attribute__((visibility("default")))

using syncbn::exchange::Memory;

SYNCBN_EXPORT int64_t syncbn_exchange_size(int64_t world, int64_t capacity) {
  return world * (int64_t(sizeof(syncbn::exchange::Line)) + 2 * capacity);
}

SYNCBN_EXPORT void syncbn_exchange_publish(char* lines, int64_t world, int64_t capacity,
                                           int64_t rank, uint32_t number, const char* sent,
                                           int64_t length) {
  syncbn::exchange::publish({lines, world, capacity}, rank, number,
                            syncbn::exchange::whole(sent, length));
}

// A message in one call: a head and a body, filled up with zeros to `length`. Where all ranks'
// heads are alike, receives all bodies and returns world + 1; else as syncbn_exchange_receive(),
// which may follow.
SYNCBN_EXPORT int64_t syncbn_exchange_swap(char* lines, int64_t world, int64_t capacity,
                                           int64_t rank, uint32_t number, const char* head,
                                           int64_t head_length, const char* body,
                                           int64_t body_length, int64_t length, char* received,
                                           int64_t looks, int64_t turns, int64_t nanoseconds) {
  const Memory memory{lines, world, capacity};
  syncbn::exchange::publish(memory, rank, number, {head, head_length, body, body_length, length});
  const int64_t came =
      syncbn::exchange::wait_for_all(memory, number, 0, {looks, turns, nanoseconds});
  if (came < world || !syncbn::exchange::begin_alike(memory, number, head_length)) return came;
  syncbn::exchange::copy_all(memory, number, head_length, received, body_length, body_length);
  return world + 1;
}

SYNCBN_EXPORT int64_t syncbn_exchange_receive(char* lines, int64_t world, int64_t capacity,
                                              uint32_t number, char* received, int64_t stride,
                                              int64_t length, int64_t from, int64_t looks,
                                              int64_t turns, int64_t nanoseconds) {
  return syncbn::exchange::receive({lines, world, capacity}, number, received, stride, length, from,
                                   {looks, turns, nanoseconds});
}

SYNCBN_EXPORT void syncbn_exchange_end(char* lines, int64_t world, int64_t capacity, int64_t rank) {
  syncbn::exchange::end({lines, world, capacity}, rank);
}

SYNCBN_EXPORT int64_t syncbn_exchange_ended(char* lines, int64_t world, int64_t capacity,
                                            int64_t rank) {
  return Memory{lines, world, capacity}.line(rank).ended.load();
}
