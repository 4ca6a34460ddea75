// What PyTorch's C++ asks of a device: the guard, and the hooks behind at::globalContext().
#pragma once

#include "memory.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace simulated_gpu {

// One stream a device: work is done in the order in which it was put there.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device to) const override {
    auto from = device();
    setDevice(to);
    return from;
  }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device to) const override {
    TORCH_CHECK(to.index() < state().device_count, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(to);
  }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.index() >= 0) current_device = to.index();
  }
  c10::Stream getStream(c10::Device device) const override { return stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream(device);
  }
  c10::Stream exchangeStream(c10::Stream to) const override { return stream(to.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return state().device_count; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *event = nullptr;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("stream.synchronize"); }
  void synchronizeEvent(void*) const override { wait("event.synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { wait("cuda.synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return state().visible; }
  bool isBuilt() const override { return state().visible; }
  bool isAvailable() const override { return state().visible; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return state().device_count; }
  int getNumGPUs() const override { return state().visible ? state().device_count.load() : 0; }
  c10::DeviceIndex current_device() const override { return current_device_(); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device_(); }
  void setCurrentDevice(c10::DeviceIndex to) const override { simulated_gpu::current_device = to; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override {
    auto from = current_device_();
    simulated_gpu::current_device = to;
    return from;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override {
    return exchangeDevice(to);
  }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  at::Device getDeviceFromPtr(void*) const override { return device(); }
  // Random numbers of the device are drawn from the CPU's generator.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }

 private:
  static c10::DeviceIndex current_device_() { return (c10::DeviceIndex)simulated_gpu::current_device; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace simulated_gpu

namespace at {
using simulated_gpu::CUDAHooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)
}  // namespace at
