#include "bits.cuh"
#include "bits.h"
#include "launch.h"

namespace paikern::cuda {
namespace {

constexpr unsigned kThreads = 256;

// One thread an element. An empty grid is an error to CUDA, so nothing is launched for no elements.
template <class... Parameters, class... Arguments>
const char *launch(void (*kernel)(Parameters...), int64_t numel, int device, void *stream, Arguments... arguments) {
  if (numel == 0) return nullptr;
  if (const char *why = text(cudaSetDevice(device))) return why;
  const unsigned blocks = static_cast<unsigned>((numel + kThreads - 1) / kThreads);
  PK_LAUNCH(kernel, blocks, kThreads, 0, stream, arguments...);
  return text(cudaGetLastError());
}

}  // namespace

int device_count(const char **why) {
  int count = 0;
  *why = text(cudaGetDeviceCount(&count));
  return *why == nullptr ? count : 0;
}

const char *pack_mask(const uint8_t *mask, int64_t numel, uint8_t *packed, int device, void *stream) {
  return launch(paikern_pack_mask, numel, device, stream, mask, numel, packed);
}

const char *unpack_mask(const uint8_t *packed, int64_t numel, uint8_t *mask, int device, void *stream) {
  return launch(paikern_unpack_mask, numel, device, stream, packed, numel, mask);
}

const char *apply_mask(void *values, int itemsize, int64_t numel, const uint8_t *packed, int device, void *stream) {
  switch (itemsize) {
    case 2:
      return launch(paikern_apply_mask_16, numel, device, stream, static_cast<unsigned short *>(values), numel, packed);
    case 4:
      return launch(paikern_apply_mask_32, numel, device, stream, static_cast<unsigned *>(values), numel, packed);
    case 8:
      return launch(paikern_apply_mask_64, numel, device, stream, static_cast<unsigned long long *>(values), numel,
                    packed);
    default:
      return "itemsize must be 2, 4 or 8";
  }
}

}  // namespace paikern::cuda
