// The simulated device: what it is asked, what it still owes the host, what is being captured.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace simulated_gpu {

using Stack = torch::jit::Stack;

// A CUDA graph: what was captured, run again by a replay in the same memory.
struct Graph {
  struct Before {
    c10::Storage storage;
    std::vector<char> bytes;
  };
  std::vector<std::function<void()>> nodes;
  std::unordered_map<const void*, Before> before;   // memory that captured work wrote to
  std::unordered_map<const void*, size_t> made;     // memory allocated while capturing
  std::thread::id owner;
  int64_t pool = 0;
  bool global = false;
  bool broken = false;
};

// A copy to pinned memory that has not arrived: it arrives when the host has waited.
struct Arrival {
  int64_t order;
  at::Tensor target, source;
};

// A copy from pinned memory under way: the host must leave that memory alone until it has waited.
struct Departure {
  int64_t order;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::vector<char> bytes;
  const char* data;
  std::string place;
};

struct State {
  std::atomic<bool> visible{false};
  std::atomic<int> device_count{1};
  std::atomic<int64_t> order{0};  // of what was put into the stream
  std::atomic<int64_t> allocated{0}, peak{0};
  std::atomic<Graph*> capture{nullptr};
  std::mutex mutex;  // of what follows; never held while Python runs
  std::vector<Arrival> arrivals;
  std::vector<Departure> departures;
  std::unordered_map<const void*, int64_t> pool_of;   // memory of graphs that is held
  std::unordered_map<std::string, int64_t> launches;  // by name of operator or kernel
  std::unordered_set<std::string> no_device_check;    // native_functions.yaml: device_check: NoCheck
  std::unordered_map<std::string, std::string> waiting;  // operator -> why the host waits for it
  py::object on_wait, place;  // Python: note a wait (returns a refusal or ""); where the program is
};

inline State& state() {
  static State* it = new State;  // outlives Python's exit
  return *it;
}

inline thread_local int current_device = 0;

inline c10::Device device() { return {c10::DeviceType::CUDA, (c10::DeviceIndex)current_device}; }

// The capture of this thread.
inline Graph* capturing() {
  Graph* graph = state().capture;
  return graph && graph->owner == std::this_thread::get_id() ? graph : nullptr;
}

inline std::string place() {
  py::gil_scoped_acquire gil;
  return py::cast<std::string>(state().place());
}

// Raises where a call is not permitted during capture: by this thread always, by another one where
// the capture is in the global mode.
inline void not_in_capture(const std::string& what) {
  Graph* graph = state().capture;
  if (!graph || (graph->owner != std::this_thread::get_id() && !graph->global)) return;
  graph->broken = true;
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", what, " at ",
              place(), ")");
}

inline void launched(const std::string& name) {
  state().order++;
  std::lock_guard<std::mutex> lock(state().mutex);
  state().launches[name]++;
}

// The device has done everything up to a place of the stream.
inline void flush(int64_t upto) {
  std::vector<Arrival> arrived;
  std::vector<Departure> left;
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    auto take = [&](auto& all, auto& taken) {
      for (size_t i = 0; i < all.size();) {
        if (all[i].order > upto) { i++; continue; }
        taken.push_back(std::move(all[i]));
        all.erase(all.begin() + i);
      }
    };
    take(state().arrivals, arrived);
    take(state().departures, left);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  for (auto& copy : arrived) copy.target.copy_(copy.source);
  for (auto& copy : left) {
    if (!copy.storage.lock()) continue;
    TORCH_CHECK(std::equal(copy.bytes.begin(), copy.bytes.end(), copy.data),
                "pinned memory was written while a copy from it was under way, begun at ", copy.place);
  }
}

// The host waits for the device.
inline void wait(const std::string& why) {
  not_in_capture(why);
  std::string refusal;
  {
    py::gil_scoped_acquire gil;
    refusal = py::cast<std::string>(state().on_wait(why));
  }
  TORCH_CHECK(refusal.empty(), refusal);
  flush(state().order);
}

}  // namespace simulated_gpu
