// NCCL between simulated devices: gloo in the memory of the tensors, which must lie on the device.
#pragma once

#include "aliases.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace simulated_gpu {

class Collectives : public c10d::Backend {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;

  explicit Collectives(c10::intrusive_ptr<c10d::Backend> gloo)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  Work broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    auto same = cpu(tensors);
    return done(gloo_->broadcast(same, options));
  }
  Work allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    auto same = cpu(tensors);
    return done(gloo_->allreduce(same, options));
  }
  Work allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                 const c10d::AllgatherOptions& options) override {
    std::vector<std::vector<at::Tensor>> same;
    for (auto& tensors : outputs) same.push_back(cpu(tensors));
    auto from = cpu(inputs);
    return done(gloo_->allgather(same, from, options));
  }
  Work _allgather_base(at::Tensor& output, at::Tensor& input,
                       const c10d::AllgatherOptions& options) override {
    auto to = cpu(output), from = cpu(input);
    return done(gloo_->_allgather_base(to, from, options));
  }
  Work allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                       std::vector<at::Tensor>& inputs,
                                       const c10d::AllgatherOptions& options) override {
    Work last;
    for (size_t i = 0; i < outputs.size(); i++)
      last = _allgather_base(outputs[i], inputs[i], options);
    return last;
  }
  Work _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                            const c10d::ReduceScatterOptions& options) override {
    auto to = cpu(output), from = cpu(input);
    return done(gloo_->_reduce_scatter_base(to, from, options));
  }
  Work reduce_scatter_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                       std::vector<at::Tensor>& inputs,
                                       const c10d::ReduceScatterOptions& options) override {
    Work last;
    for (size_t i = 0; i < outputs.size(); i++)
      last = _reduce_scatter_base(outputs[i], inputs[i], options);
    return last;
  }
  Work barrier(const c10d::BarrierOptions& options) override { return done(gloo_->barrier(options)); }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;

  static at::Tensor cpu(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_cuda() && tensor.device().index() == current_device,
                "No backend type associated with device type ", tensor.device(), " in this process");
    at::AutoDispatchBelowADInplaceOrView guard;
    launched("nccl");
    return Aliases().to_cpu(tensor);
  }
  static std::vector<at::Tensor> cpu(const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> same;
    for (auto& tensor : tensors) same.push_back(cpu(tensor));
    return same;
  }
  static Work done(Work work) {
    work->wait();
    return work;
  }
};

}  // namespace simulated_gpu
