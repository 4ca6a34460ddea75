// Memory of the device and pinned memory; both lie in ordinary memory.
#pragma once

#include "state.h"

#include <c10/core/CPUAllocator.h>

#include <map>

namespace simulated_gpu {

inline void account(const void* data, int64_t bytes, bool made) {
  int64_t now = state().allocated += bytes;
  int64_t peak = state().peak;
  while (now > peak && !state().peak.compare_exchange_weak(peak, now)) {}
  if (!data) return;
  Graph* graph = capturing();
  if (graph && made) graph->made[data] = bytes;
  if (graph && !made) graph->made.erase(data);
  std::lock_guard<std::mutex> lock(state().mutex);
  if (!made) state().pool_of.erase(data);
  else if (graph) state().pool_of[data] = graph->pool;
}

// A piece of device memory; `storage` is the CPU storage that it lies in.
struct Piece {
  c10::Storage storage;
  size_t bytes;
};

inline void free_piece(void* context) {
  auto piece = static_cast<Piece*>(context);
  account(piece->storage.data(), -(int64_t)piece->bytes, false);
  delete piece;
}

// CPU memory becomes device memory.
inline c10::DataPtr adopt(c10::Storage storage) {
  size_t bytes = storage.nbytes();
  void* data = storage.mutable_data();
  account(data, bytes, true);
  return {data, new Piece{std::move(storage), bytes}, free_piece, device()};
}

struct DeviceAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, device()};
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    return adopt(c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(data)));
  }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

inline DeviceAllocator device_allocator;

struct PinnedAllocator : c10::Allocator {
  inline static std::mutex mutex;
  inline static std::map<const char*, size_t> ranges;

  struct Block {
    c10::DataPtr data;
  };
  static void release(void* context) {
    auto block = static_cast<Block*>(context);
    {
      std::lock_guard<std::mutex> lock(mutex);
      ranges.erase(static_cast<const char*>(block->data.get()));
    }
    delete block;
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto block = new Block{c10::GetCPUAllocator()->allocate(std::max<size_t>(bytes, 1))};
    void* data = block->data.get();
    {
      std::lock_guard<std::mutex> lock(mutex);
      ranges[static_cast<const char*>(data)] = std::max<size_t>(bytes, 1);
    }
    return {data, block, release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after = ranges.upper_bound(static_cast<const char*>(data));
    if (after == ranges.begin()) return false;
    auto [start, bytes] = *std::prev(after);
    return static_cast<const char*>(data) < start + bytes;
  }
};

inline PinnedAllocator pinned_allocator;

}  // namespace simulated_gpu
