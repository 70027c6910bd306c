// Going along the bits of a row of a packed mask, with the number of the entry that each set bit is.
#pragma once

#include "masked.cuh"

// 32 bits from `bit` on, zero from `end` on.
PK_DEVICE unsigned pk_packed_word(const unsigned char *mask, long long bit, long long end) {
  if (bit >= end) return 0;
  const long long last = (end - 1) >> 3, first = bit >> 3;
  unsigned long long bytes = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    if (first + i <= last) bytes |= static_cast<unsigned long long>(mask[first + i]) << (8 * i);
  }
  const unsigned word = static_cast<unsigned>(bytes >> (bit & 7));
  return end - bit < 32 ? word & ((1u << (end - bit)) - 1u) : word;
}

// A warp calls visit(at, kept, entry) for each of `count` bits from `bit` on: lane l has the bits at l, l + 32, ... and
// `entry` is the number of set bits before it, counted from `entry` on. All lanes call it equally often, beyond the
// end too.
template <class Visit>
PK_DEVICE void pk_packed_bits(const unsigned char *mask, long long bit, long long count, int entry,
                              const Visit &visit) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned before = (1u << lane) - 1u;
  for (long long at = 0; at < count; at += 1024) {
    const unsigned own = pk_packed_word(mask, bit + at + lane * 32, bit + count);
    int upto = __popc(own);
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, by);
      if (lane >= by) upto += other;
    }
    const int from = entry + upto - __popc(own);
    entry += __shfl_sync(0xffffffffu, upto, 31);
    const int words = count - at < 1024 ? static_cast<int>((count - at + 31) / 32) : 32;
#pragma unroll 4
    for (int w = 0; w < words; ++w) {
      const unsigned word = __shfl_sync(0xffffffffu, own, w);
      const int first = __shfl_sync(0xffffffffu, from, w);
      visit(at + w * 32 + lane, ((word >> lane) & 1u) != 0, first + __popc(word & before));
    }
  }
}
