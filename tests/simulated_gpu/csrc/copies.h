// Copies between the host and the device: blocking, pageable and pinned ones behave as CUDA's.
#pragma once

#include "operators.h"

namespace simulated_gpu {

inline bool is_pinned(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.has_storage() && PinnedAllocator::holds(tensor.storage().data());
}

inline void compute_copy(const at::Tensor& target, const at::Tensor& source) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Graph* graph = capturing();
  if (graph) protect(*graph, target);
  Aliases aliases;
  auto to = aliases.to_cpu(target), from = aliases.to_cpu(source);
  at::AutoDispatchBelowADInplaceOrView guard;
  to.copy_(from);
  if (graph) log_operator(*graph, op, {to, from, false}, {to});
}

inline void host_to_device(const at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  bool pinned = is_pinned(source);
  if (!pinned || !non_blocking) not_in_capture("a copy from the host");
  if (!non_blocking) wait("blocking copy from the host");
  else if (!pinned) wait("copy from pageable memory");
  launched("copy from the host");
  compute_copy(target, source);
  if (!pinned || !non_blocking || capturing() || !source.numel()) return;
  auto data = static_cast<const char*>(source.storage().data());
  std::string where = place();
  std::lock_guard<std::mutex> lock(state().mutex);
  state().departures.push_back({state().order,
                                c10::weak_intrusive_ptr<c10::StorageImpl>(source.storage().getWeakStorageImpl()),
                                {data, data + source.storage().nbytes()}, data, where});
}

inline void device_to_host(const at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  bool asynchronous = non_blocking && is_pinned(target);
  if (!asynchronous) not_in_capture("a copy to the host");
  launched("copy to the host");
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView guard;
  auto from = aliases.to_cpu(source);
  if (!asynchronous) {
    wait(non_blocking ? "copy to pageable memory" : "blocking copy to the host");
    target.copy_(from);
    return;
  }
  TORCH_CHECK(!capturing(), "the simulated device does not capture copies to the host");
  auto snapshot = from.clone();
  if (target.is_floating_point()) target.fill_(std::numeric_limits<double>::quiet_NaN());
  else if (target.scalar_type() != at::kBool) target.fill_(123);
  // Before the lock: another reference to a tensor of Python's takes the GIL, and who has that may
  // be waiting for the lock.
  Arrival arrival{state().order, target, snapshot};
  std::lock_guard<std::mutex> lock(state().mutex);
  state().arrivals.push_back(std::move(arrival));
}

inline at::Tensor& copy_(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  TORCH_CHECK_NOT_IMPLEMENTED(!source.is_meta(), "Cannot copy out of meta tensor; no data!");
  if (target.is_cuda() && source.is_cuda()) {
    launched("aten::copy_");
    compute_copy(target, source);
  } else if (target.is_cuda()) {
    host_to_device(target, source, non_blocking);
  } else {
    device_to_host(target, source, non_blocking);
  }
  return target;
}

}  // namespace simulated_gpu
