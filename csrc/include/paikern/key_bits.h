// Scores as integers that sort the same way, from and to the bits of a float. Integer operations only, and no standard
// header: nvcc, NVRTC and every host compiler read this text, so that all devices rank alike.
#pragma once

#if defined(__CUDACC__) || defined(PAIKERN_CUDA_ON_CPU)
#define PK_BOTH __host__ __device__ __forceinline__
#else
#define PK_BOTH inline
#endif

namespace paikern {

// The order of floats: -inf < ... < -0 == +0 < ... < +inf.
PK_BOTH unsigned ordered_bits(unsigned bits) {
  if (bits == 0x80000000u) bits = 0;  // -0 becomes +0
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// The float that has this key.
PK_BOTH unsigned bits_of_key(unsigned key) { return key & 0x80000000u ? key ^ 0x80000000u : ~key; }

PK_BOTH int leading_zeros(unsigned bits) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int>(bits));
#else
  return __builtin_clz(bits);
#endif
}

// The order of value * 2**shift, shift >= 0, as a signed integer: the power of two is added to the exponent bits, which
// is exact once subnormals are normalised, and needs room above the 32 bits of the value. Zero has rank 0, negative
// values mirror positive ones, infinities are +-`infinity` whatever their shift.
PK_BOTH long long scaled_bits(unsigned bits, long long shift, long long infinity) {
  constexpr long long kOne = 1ll << 23;
  const bool negative = (bits >> 31) != 0;
  bits &= 0x7fffffffu;
  long long rank = 0;
  if (bits == 0x7f800000u) {
    rank = infinity;
  } else if (bits != 0) {
    rank = bits;
    if (bits < 0x00800000u) {
      const int up = leading_zeros(bits) - 8;
      rank = (1 - up) * kOne + ((bits << up) & 0x7fffffu);
    }
    rank += (shift + 23) * kOne + 1;  // the smallest subnormal, unshifted, gets a positive rank
  }
  return negative ? -rank : rank;
}

}  // namespace paikern
