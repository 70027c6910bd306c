// CUB's way to the k largest keys, for the benchmark: cub::DeviceTopK where the installed CCCL has it (3.2 and later),
// else a radix sort of the keys alone. Called through ctypes (bench/gpu_cub.py); the stream and all memory are the
// caller's.
#include <cub/version.cuh>

#if __has_include(<cub/device/device_topk.cuh>)
#include <cub/device/device_topk.cuh>
#include <cuda/stream_ref>
#define PAIKERN_HAS_TOPK 1
#else
#include <cub/device/device_radix_sort.cuh>
#endif

extern "C" const char *paikern_cub_name() {
#ifdef PAIKERN_HAS_TOPK
  return "cub::DeviceTopK";
#else
  return "cub::DeviceRadixSort";
#endif
}

extern "C" int paikern_cub_version() { return CUB_VERSION; }

// With no temporary memory: how many bytes of it are needed. `found` has room for k keys, or for all n where they are
// sorted. Returns CUDA's error code.
extern "C" int paikern_cub_topk(void *temporary, size_t *bytes, const float *keys, float *found, long long n,
                                long long k, void *stream) {
#ifdef PAIKERN_HAS_TOPK
  auto asked = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                        cuda::execution::output_ordering::unsorted);
  auto where = cuda::stream_ref{static_cast<cudaStream_t>(stream)};
  auto environment = cuda::std::execution::env{where, asked};
  return cub::DeviceTopK::MaxKeys(temporary, *bytes, keys, found, n, k, environment);
#else
  return cub::DeviceRadixSort::SortKeysDescending(temporary, *bytes, keys, found, n, 0, 32,
                                                  static_cast<cudaStream_t>(stream));
#endif
}
