// CUDA graphs: a capture logs and leaves memory as it was; a replay runs the log in the same memory.
#pragma once

#include "aliases.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace simulated_gpu {

// Remembers what memory holds before captured work writes to it: a capture computes nothing.
inline void protect(Graph& graph, const at::Tensor& tensor) {
  if (tensor.is_sparse()) return;
  auto storage = tensor.storage();
  auto data = static_cast<const char*>(storage.data());
  if (!data || graph.made.count(data) || graph.before.count(data)) return;
  graph.before[data] = {storage, {data, data + storage.nbytes()}};
}

inline void log_operator(Graph& graph, const c10::OperatorHandle& op, Stack arguments,
                         Stack results) {
  graph.nodes.push_back([op, arguments, results] {
    at::AutoDispatchBelowADInplaceOrView guard;
    Stack again = arguments;
    op.callBoxed(again);
    for (size_t i = 0; i < results.size(); i++) {
      if (!results[i].isTensor() || !results[i].toTensor().defined()) continue;
      auto& old = results[i].toTensor();
      auto& now = again[i].toTensor();
      if (old.storage().data() != now.storage().data()) old.copy_(now);
    }
  });
}

inline void begin_capture(Graph& graph, int64_t pool, bool global) {
  TORCH_CHECK(!state().capture, "CUDA error: a capture is under way already");
  flush(state().order);
  graph.owner = std::this_thread::get_id();
  graph.pool = pool;
  graph.global = global;
  state().capture = &graph;
}

// What was made while capturing holds nothing of use before a replay.
inline void end_capture(Graph& graph) {
  state().capture = nullptr;
  for (auto& [data, before] : graph.before)
    std::copy(before.bytes.begin(), before.bytes.end(), static_cast<char*>(before.storage.mutable_data()));
  graph.before.clear();
  for (auto& [data, bytes] : graph.made) memset(const_cast<void*>(data), 0xff, bytes);
  graph.made.clear();
  TORCH_CHECK(!graph.broken,
              "CUDA error: operation failed due to a previous error during capture");
}

inline void replay(Graph& graph) {
  not_in_capture("replay of a graph");
  launched("graph");
  for (auto& node : graph.nodes) node();
}

}  // namespace simulated_gpu
