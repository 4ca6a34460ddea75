// Every operator of the device: PyTorch's CPU kernel in the memory of the arguments, behind the
// checks that PyTorch's CUDA build makes.
#pragma once

#include "capture.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/op_registration/adaption.h>

namespace simulated_gpu {

inline bool is_index(const std::string& name) {
  return name == "aten::index" || name == "aten::_index_put_impl_";
}

// Mixed devices, in PyTorch's words and with PyTorch's exceptions: native_functions.yaml says which
// operators check in their generated wrapper; the others (TensorIterator) take CPU numbers of no
// dimension, and indexing takes indices from the CPU.
inline void check_devices(const c10::FunctionSchema& schema, const std::string& full_name,
                          c10::ArrayRef<c10::IValue> arguments) {
  if (!state().no_device_check.count(full_name)) {
    std::string method = "wrapper_CUDA_" + schema.name().substr(schema.name().find("::") + 2);
    std::optional<c10::Device> common;
    for (size_t i = 0; i < arguments.size(); i++)
      each_tensor(arguments[i], [&](const at::Tensor& x) {
        c10::impl::check_and_update_common_device(common, x, method.c_str(),
                                                  schema.arguments()[i].name().c_str());
      });
    return;
  }
  std::optional<c10::Device> common;
  for (auto& argument : arguments)
    each_tensor(argument, [&](const at::Tensor& x) { if (x.is_cuda() && !common) common = x.device(); });
  if (!common) return;
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& declared = schema.arguments()[i];
    bool written = declared.alias_info() && declared.alias_info()->isWrite();
    bool index = is_index(schema.name()) && declared.name() == "indices";
    each_tensor(arguments[i], [&](const at::Tensor& x) {
      bool from_cpu = x.is_cpu() && !written && (x.dim() == 0 || index);
      TORCH_CHECK(x.device() == *common || from_cpu,
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  *common, " and ", x.device(), "!");
    });
  }
}

// x[mask] = number: PyTorch fills (canDispatchToMaskedFill), and needs no indices.
inline bool is_masked_fill(c10::ArrayRef<c10::IValue> arguments) {
  auto& value = arguments[2].toTensor();
  int masks = 0, others = 0;
  for (const std::optional<at::Tensor>& x : arguments[1].toOptionalTensorVector())
    if (x && x->defined())
      (x->is_cuda() && (x->scalar_type() == at::kBool || x->scalar_type() == at::kByte) ? masks : others)++;
  return value.is_cpu() && value.numel() == 1 && masks == 1 && !others && !arguments[3].toBool();
}

inline void note_wait(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  if (name == "aten::_index_put_impl_") {
    if (is_masked_fill(arguments)) return;
    for (const std::optional<at::Tensor>& x : arguments[1].toOptionalTensorVector()) {
      if (!x || !x->defined()) continue;
      if (x->scalar_type() == at::kBool || x->scalar_type() == at::kByte) wait("boolean index");
      else if (!x->is_cuda()) wait("indices from the CPU");
    }
    if (arguments[2].toTensor().is_cpu()) wait("a value from the CPU");
    return;
  }
  auto known = state().waiting.find(name);
  if (known == state().waiting.end()) return;
  if (name == "aten::repeat_interleave" && !arguments.back().isNone()) return;  // output_size
  wait(known->second);
}

// CUDA divides by a number, or a CPU tensor of no dimension, as it multiplies by its reciprocal,
// which may differ in the last bit.
inline c10::OperatorHandle as_cuda_divides(const c10::OperatorHandle& op, c10::IValue* arguments) {
  // What all its forms without a rounding mode end in.
  if (op.schema().name() != "aten::div" || op.schema().overload_name() != "out") return op;
  auto x = arguments[0].toTensor(), divisor = arguments[1].toTensor();
  if (!x.is_cuda() || !divisor.is_cpu() || divisor.is_complex()) return op;
  double value = divisor.item().toDouble();
  double inverse = x.scalar_type() == at::kDouble ? 1.0 / value : 1.0f / (float)value;
  arguments[1] = at::native::wrapped_scalar_tensor(inverse);
  return c10::Dispatcher::singleton().findSchemaOrThrow("aten::mul", "out");
}

inline void fallback(const c10::OperatorHandle& called, c10::DispatchKeySet, Stack* stack) {
  size_t count = called.schema().arguments().size(), begin = stack->size() - count;
  const auto op = as_cuda_divides(called, stack->data() + begin);
  const auto& schema = op.schema();
  c10::ArrayRef<c10::IValue> arguments(stack->data() + begin, count);
  const auto& overload = schema.overload_name();
  std::string full_name = overload.empty() ? schema.name() : schema.name() + "." + overload;
  check_devices(schema, full_name, arguments);
  note_wait(schema.name(), arguments);

  Graph* graph = capturing();
  Aliases aliases;
  bool writes = false, views = false;
  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[begin + i];
    if (auto info = schema.arguments()[i].alias_info()) {
      (info->isWrite() ? writes : views) = true;
      if (info->isWrite() && graph)
        each_tensor(value, [&](const at::Tensor& x) { if (x.is_cuda()) protect(*graph, x); });
    }
    if (value.isDevice() && value.toDevice().is_cuda()) value = c10::Device(c10::DeviceType::CPU);
    else value = aliases.to_cpu(value);
  }
  Stack inputs;
  if (graph) inputs.assign(stack->begin() + begin, stack->end());
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(*stack);
  }
  bool makes = writes;
  for (size_t i = begin; i < stack->size() && !views; i++) makes |= (*stack)[i].isTensor() || (*stack)[i].isTensorList();
  if (makes) {
    launched(full_name);
    if (graph) log_operator(*graph, op, inputs, Stack(stack->begin() + begin, stack->end()));
  }
  for (size_t i = begin; i < stack->size(); i++) (*stack)[i] = aliases.to_cuda((*stack)[i]);
}

inline at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                        std::optional<at::Layout> layout, std::optional<at::Device> device,
                        std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(device.value_or(simulated_gpu::device()));
  return at::detail::empty_generic(size, &device_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                                std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout> layout, std::optional<at::Device> device,
                                std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(device.value_or(simulated_gpu::device()));
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

inline at::Tensor& set_to(at::Tensor& self, c10::Storage storage, int64_t offset,
                          c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.data()) impl->set_sizes_and_strides(size, stride, offset);
  else {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  }
  return self;
}

inline at::Tensor& set_to_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_to(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

inline at::Tensor& set_to_storage(at::Tensor& self, c10::Storage storage) {
  int64_t size = storage.nbytes() / self.dtype().itemsize();
  return set_to(self, std::move(storage), 0, {size}, {});
}

inline at::Tensor& set_to_nothing(at::Tensor& self) {
  return set_to_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &device_allocator, true));
}

inline void record_stream(at::Tensor&, c10::Stream) {}

}  // namespace simulated_gpu
