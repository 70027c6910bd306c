// Packed masks on the device: bit i % 8 of byte i / 8, row-major, spare bits zero (csrc/cpu/bits.h is the twin).
//
//   pack    n bytes read, n / 8 written       one thread an element; a warp's ballot is four bytes of the mask
//   unpack  n / 8 read, n written             one thread an element
//   apply   n / 8 read, pruned values written one thread an element, kept values are not touched
//
// Device code without standard headers and with extern "C" names: nvcc and NVRTC compile the same text. Threads are
// numbered in 64 bits, so that more than 2^31 elements work. Not yet measured on a GPU.
#pragma once

static __device__ __forceinline__ long long paikern_element() {
  return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// mask: [n] bytes, nonzero is kept -> packed: [ceil(n / 8)] bytes. blockDim.x must be a multiple of 32.
extern "C" __global__ void paikern_pack_mask(const unsigned char *mask, long long n, unsigned char *packed) {
  const long long i = paikern_element();
  const unsigned word = __ballot_sync(0xffffffffu, i < n && mask[i] != 0);
  // Lanes 0, 8, 16 and 24 write their byte: neither alignment nor the tail needs a rule.
  if (i % 8 == 0 && i < n) packed[i / 8] = static_cast<unsigned char>(word >> (i % 32));
}

extern "C" __global__ void paikern_unpack_mask(const unsigned char *packed, long long n, unsigned char *mask) {
  const long long i = paikern_element();
  if (i < n) mask[i] = (packed[i / 8] >> (i % 8)) & 1;
}

// All bits of a pruned value become 0, NaN and infinity included.
template <class Word>
static __device__ __forceinline__ void paikern_apply(Word *values, long long n, const unsigned char *packed) {
  const long long i = paikern_element();
  if (i < n && ((packed[i / 8] >> (i % 8)) & 1) == 0) values[i] = 0;
}

extern "C" __global__ void paikern_apply_mask_16(unsigned short *values, long long n, const unsigned char *packed) {
  paikern_apply(values, n, packed);
}

extern "C" __global__ void paikern_apply_mask_32(unsigned *values, long long n, const unsigned char *packed) {
  paikern_apply(values, n, packed);
}

extern "C" __global__ void paikern_apply_mask_64(unsigned long long *values, long long n, const unsigned char *packed) {
  paikern_apply(values, n, packed);
}
