// paikern._cuda: the CUDA launchers. Device pointers and the stream come in as integers; every check on them is made in
// Python, before the call. Imports on a machine without a GPU: the CUDA runtime is linked statically and looks for the
// driver when it is first used.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "bits.h"

namespace py = pybind11;
namespace cuda = paikern::cuda;

namespace {

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

void check(const char *operation, const char *why) {
  if (why != nullptr) throw std::runtime_error(std::string(operation) + ": " + why);
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
  m.def("pack_mask", [](uintptr_t mask, int64_t numel, uintptr_t packed, int device, uintptr_t stream) {
    check("pack_mask", cuda::pack_mask(pointer<const uint8_t>(mask), numel, pointer<uint8_t>(packed), device,
                                       pointer<void>(stream)));
  });
  m.def("unpack_mask", [](uintptr_t packed, int64_t numel, uintptr_t mask, int device, uintptr_t stream) {
    check("unpack_mask", cuda::unpack_mask(pointer<const uint8_t>(packed), numel, pointer<uint8_t>(mask), device,
                                           pointer<void>(stream)));
  });
  m.def("apply_mask",
        [](uintptr_t values, int itemsize, int64_t numel, uintptr_t packed, int device, uintptr_t stream) {
          check("apply_mask", cuda::apply_mask(pointer<void>(values), itemsize, numel, pointer<const uint8_t>(packed),
                                               device, pointer<void>(stream)));
        });
}
