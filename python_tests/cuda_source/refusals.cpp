// The shim itself: what it must refuse instead of hanging or going on. Prints one line for each, and "ok".
#include "cuda_on_cpu.h"

namespace {

__global__ void warp_divided() {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __ballot_sync(0xffffffffu, 1);
  }
}

__global__ void partial_mask(unsigned *out) { out[threadIdx.x] = __ballot_sync(0xffffu, 1); }

__global__ void sum(const unsigned *in, unsigned *out) {
  __shared__ unsigned part[2];
  unsigned value = in[threadIdx.x];
  for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) *out = part[0] + part[1];
}

template <class Launch>
bool refused(const char *expected, Launch launch) {
  try {
    launch();
  } catch (const std::runtime_error &error) {
    std::puts(error.what());
    return std::strstr(error.what(), expected) != nullptr;
  }
  return false;
}

}  // namespace

int main() {
  unsigned in[64], out[64] = {};
  for (unsigned i = 0; i < 64; ++i) in[i] = i;
  PK_LAUNCH(sum, 1, 64, 0, nullptr, in, out);
  bool good = out[0] == 2016;
  good &= refused("threads wait for a barrier", [] { PK_LAUNCH(warp_divided, 1, 64, 0, nullptr); });
  good &= refused("only full-mask", [&] { PK_LAUNCH(partial_mask, 1, 32, 0, nullptr, out); });
  good &= refused("an empty grid", [&] { PK_LAUNCH(sum, 0, 64, 0, nullptr, in, out); });
  good &= refused("1 to 1024 threads", [&] { PK_LAUNCH(sum, 1, 2048, 0, nullptr, in, out); });
  out[0] = 0;
  PK_LAUNCH(sum, 1, 64, 0, nullptr, in, out);  // and it goes on after a refusal
  good &= out[0] == 2016;
  std::puts(good ? "ok" : "not as expected");
  return good ? 0 : 1;
}
