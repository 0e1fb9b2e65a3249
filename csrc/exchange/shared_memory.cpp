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
  syncbn::exchange::publish({lines, world, capacity}, rank, number, sent, length);
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
