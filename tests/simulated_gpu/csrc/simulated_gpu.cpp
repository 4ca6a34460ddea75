// A CUDA device for a CPU build of PyTorch, through the hooks that PyTorch has for devices: a
// device guard, allocators, CUDA's hooks, and one boxed kernel for all operators.

#include "collectives.h"
#include "copies.h"
#include "guard.h"

#include <torch/library.h>

namespace simulated_gpu {

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, SparseCUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("set_.source_Storage_storage_offset", &set_to);
  m.impl("set_.source_Storage", &set_to_storage);
  m.impl("set_.source_Tensor", &set_to_tensor);
  m.impl("set_", &set_to_nothing);
  m.impl("copy_", &copy_);
  m.impl("record_stream", &record_stream);
}

// A kernel that Python computes on CPU tensors in the memory of these CUDA tensors.
void launch(const std::string& name, const std::vector<at::Tensor>& tensors, py::object run) {
  launched(name);
  Graph* graph = capturing();
  if (graph)
    for (auto& tensor : tensors) protect(*graph, tensor);
  run();
  if (!graph) return;
  auto kept = std::shared_ptr<py::object>(new py::object(run), [](py::object* held) {
    py::gil_scoped_acquire gil;
    delete held;
  });
  graph->nodes.push_back([kept] {
    py::gil_scoped_acquire gil;
    (*kept)();
  });
}

// Gives the storage of a tensor another size, as FSDP does to free what it has gathered.
void resize_storage(const at::Tensor& tensor, size_t bytes) {
  auto storage = tensor.storage();
  auto data = device_allocator.allocate(bytes);
  memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.set_data_ptr_noswap(std::move(data));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

}  // namespace simulated_gpu

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace simulated_gpu;
  py::module_::import("torch._C._distributed_c10d");
  py::class_<Collectives, c10::intrusive_ptr<Collectives>, c10d::Backend>(m, "Collectives")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>>());
  c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator, 1);
  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("begin", &begin_capture, py::arg("pool"), py::arg("global_mode"))
      .def("end", &end_capture)
      .def("cancel", [](Graph&) { state().capture = nullptr; })
      .def("replay", &replay)
      .def_property_readonly("length", [](Graph& graph) { return graph.nodes.size(); });
  m.def("configure", [](std::unordered_set<std::string> no_device_check,
                        std::unordered_map<std::string, std::string> waiting, py::object on_wait,
                        py::object place) {
    state().no_device_check = std::move(no_device_check);
    state().waiting = std::move(waiting);
    state().on_wait = on_wait;
    state().place = place;
  });
  m.def("set_visible", [](bool visible) { state().visible = visible; });
  m.def("set_device_count", [](int count) { state().device_count = count; });
  m.def("set_device", [](int index) { current_device = index; });
  m.def("device", [] { return current_device; });
  m.def("wait", &wait);
  m.def("not_in_capture", &not_in_capture);
  m.def("is_capturing", [] { return capturing() != nullptr; });
  m.def("order", [] { return state().order.load(); });
  m.def("flush", &flush);
  m.def("launch", &launch);
  m.def("resize_storage", &resize_storage);
  m.def("as_cpu", [](const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return Aliases().to_cpu(x);
  });
  m.def("as_cuda", [](const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return Aliases().to_cuda(x);
  });
  m.def("launches", [] {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().launches;
  });
  m.def("pools_in_use", [] {
    std::lock_guard<std::mutex> lock(state().mutex);
    std::unordered_set<int64_t> pools;
    for (auto& [data, pool] : state().pool_of) pools.insert(pool);
    return pools;
  });
  m.def("memory", [] { return std::pair(state().allocated.load(), state().peak.load()); });
  m.def("reset_peak", [] { state().peak = state().allocated.load(); });
  m.def("reset", [] {
    state().capture = nullptr;
    std::lock_guard<std::mutex> lock(state().mutex);
    state().arrivals.clear();
    state().departures.clear();
    state().launches.clear();
  });
}
