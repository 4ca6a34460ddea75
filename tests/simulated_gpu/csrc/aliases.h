// The same memory seen from both sides: a CPU tensor for the arithmetic, a CUDA tensor for the
// program.
#pragma once

#include "memory.h"

#include <ATen/SparseTensorImpl.h>

namespace simulated_gpu {

inline at::Tensor dense_of(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                      like.storage_offset());
  return tensor;
}

// A view has its base's keys: one of an ordinary tensor is ordinary in inference mode too.
inline at::Tensor view_of(const at::Tensor& base, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                      like.storage_offset());
  return tensor;
}

inline at::SparseTensorImpl* sparse_impl(const at::Tensor& tensor) {
  return static_cast<at::SparseTensorImpl*>(tensor.unsafeGetTensorImpl());
}

inline at::Tensor sparse_of(const at::Tensor& indices, const at::Tensor& values,
                            c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<at::SparseTensorImpl>(c10::DispatchKeySet(key), like.dtype());
  auto impl = sparse_impl(tensor), from = sparse_impl(like);
  impl->raw_resize_(from->sparse_dim(), from->dense_dim(), like.sizes());
  impl->set_indices_and_values_unsafe(indices, values);
  impl->set_coalesced(from->coalesced());
  return tensor;
}

// The tensors of one operator: what is turned to the CPU here comes back as what it was.
class Aliases {
 public:
  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (auto& known : known_)
      if (known.original.is_same(tensor)) return known.alias;
    at::Tensor alias;
    if (tensor.is_sparse()) {
      alias = sparse_of(to_cpu(sparse_impl(tensor)->indices()), to_cpu(sparse_impl(tensor)->values()),
                        c10::DispatchKey::SparseCPU, tensor);
    } else {
      auto storage = tensor.storage();
      void* data = storage.mutable_data();
      c10::DataPtr same(data, new c10::Storage(storage),
                        [](void* held) { delete static_cast<c10::Storage*>(held); },
                        c10::Device(c10::DeviceType::CPU));
      c10::Storage alias_storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(same),
                                 c10::GetCPUAllocator(), /*resizable=*/true);
      alias = dense_of(std::move(alias_storage), c10::DispatchKey::CPU, tensor);
    }
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
      alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    known_.push_back({tensor, alias});
    return alias;
  }

  at::Tensor to_cuda(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& known : known_)
      if (known.alias.is_same(tensor)) {
        take_over(known.original, tensor);
        return known.original;
      }
    if (tensor.is_sparse())
      return sparse_of(to_cuda(sparse_impl(tensor)->indices()), to_cuda(sparse_impl(tensor)->values()),
                       c10::DispatchKey::SparseCUDA, tensor);
    auto base = tensor.storage().unsafeGetStorageImpl();
    for (auto& known : known_)
      if (!known.alias.is_sparse() && known.alias.storage().unsafeGetStorageImpl() == base)
        return view_of(known.original, tensor);
    auto storage = tensor.storage();
    size_t bytes = storage.nbytes();
    return dense_of(c10::Storage(c10::Storage::use_byte_size_t(), bytes, adopt(std::move(storage)),
                                 &device_allocator, /*resizable=*/true),
                    c10::DispatchKey::CUDA, tensor);
  }

  c10::IValue to_cpu(const c10::IValue& value) {
    return map(value, [this](const at::Tensor& x) { return to_cpu(x); });
  }
  c10::IValue to_cuda(const c10::IValue& value) {
    return map(value, [this](const at::Tensor& x) { return to_cuda(x); });
  }

 private:
  struct Known {
    at::Tensor original, alias;
  };
  std::vector<Known> known_;

  // An operator may have given its result another size, and with it other memory.
  static void take_over(const at::Tensor& original, const at::Tensor& alias) {
    if (original.is_sparse()) return;
    auto here = original.storage();
    auto there = alias.storage();
    if (there.data() != here.data()) {
      size_t bytes = there.nbytes();
      here.set_data_ptr_noswap(adopt(std::move(there)));
      here.unsafeGetStorageImpl()->set_nbytes(bytes);
    }
    if (original.sizes() != alias.sizes() || original.strides() != alias.strides() ||
        original.storage_offset() != alias.storage_offset())
      original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(),
                                                            alias.storage_offset());
  }

  template <class F>
  static c10::IValue map(const c10::IValue& value, F turn) {
    if (value.isTensor()) return turn(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> turned;
      for (const at::Tensor& x : value.toTensorVector()) turned.push_back(turn(x));
      return turned;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> turned;
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorVector())
        turned.push_back(x ? std::optional<at::Tensor>(turn(*x)) : std::nullopt);
      return turned;
    }
    return value;
  }
};

// The tensors of a value, each once.
template <class F>
void each_tensor(const c10::IValue& value, F visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& x : value.toTensorVector())
      if (x.defined()) visit(x);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& x : value.toOptionalTensorVector())
      if (x && x->defined()) visit(*x);
  }
}

}  // namespace simulated_gpu
