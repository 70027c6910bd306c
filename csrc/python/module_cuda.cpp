// paikern._cuda: the CUDA kernels, started by name. Device pointers and the stream come in as integers; every check on
// them is made in Python, before the call. Imports on a machine without a GPU: the CUDA runtime is linked statically
// and looks for the driver when it is first used.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
namespace cuda = paikern::cuda;

namespace {

const std::unordered_map<std::string_view, const cuda::Kernel *> &kernels() {
  static const auto all = [] {
    std::unordered_map<std::string_view, const cuda::Kernel *> found;
    for (const cuda::KernelList &list :
         {cuda::balanced_kernels(), cuda::bits_kernels(), cuda::decode_kernels(), cuda::dpai_kernels(),
          cuda::flow_kernels(), cuda::map_kernels(), cuda::masked_kernels(), cuda::path_kernels(),
          cuda::pattern_kernels(), cuda::phew_kernels(), cuda::select_kernels()}) {
      for (int64_t i = 0; i < list.count; ++i) found[list.kernels[i].name] = &list.kernels[i];
    }
    return found;
  }();
  return all;
}

void check(std::string_view kernel, const char *why) {
  if (why != nullptr) throw std::runtime_error(std::string(kernel) + ": " + why);
}

// One step is (kernel, blocks, threads, shared bytes, arguments).
void run(const py::sequence &steps, int device, uintptr_t stream) {
  std::vector<cuda::Slot> slots;
  bool first = true;
  for (const py::handle &item : steps) {
    const auto step = py::cast<py::tuple>(item);
    const auto name = py::cast<std::string>(step[0]);
    const auto found = kernels().find(name);
    if (found == kernels().end()) throw py::key_error("no kernel " + name);
    const auto arguments = py::cast<py::tuple>(step[4]);
    if (static_cast<int>(arguments.size()) != found->second->parameters) {
      throw py::type_error(name + " takes " + std::to_string(found->second->parameters) + " arguments, got " +
                           std::to_string(arguments.size()));
    }
    slots.resize(arguments.size());
    for (size_t i = 0; i < slots.size(); ++i) {
      if (py::isinstance<py::float_>(arguments[i])) {
        slots[i].real = py::cast<double>(arguments[i]);
      } else {
        slots[i].integer = py::cast<int64_t>(arguments[i]);
      }
    }
    if (first) check(name, cuda::use_device(device));
    first = false;
    const cuda::Grid grid{py::cast<int64_t>(step[1]), py::cast<int64_t>(step[2]), py::cast<int64_t>(step[3])};
    check(name, found->second->start(grid, slots.data(), reinterpret_cast<void *>(stream)));
  }
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of paikern";
  m.def(
      "device_count",
      [] {
        const char *why = nullptr;
        const int count = cuda::device_count(&why);
        return std::make_pair(count, std::string(why == nullptr ? "" : why));
      },
      "How many devices there are, and CUDA's reason if none can be used");
  m.def(
      "kernels",
      [] {
        py::dict names;
        for (const auto &[name, kernel] : kernels()) names[py::str(std::string(name))] = kernel->parameters;
        return names;
      },
      "The kernels by name, with their numbers of parameters");
  m.def("run", run, py::arg("steps"), py::arg("device"), py::arg("stream"),
        "Starts kernels one after the other: (name, blocks, threads, shared bytes, arguments) each");
}
