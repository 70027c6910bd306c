// Which scores are sampled to guess the threshold: one of each stretch of `stride`. Which one is hashed, because a
// fixed place would meet the same column of every row, or the same side of a pattern in the mask.
#pragma once

#include <algorithm>
#include <cstdint>

namespace paikern {

struct TopkSample {
  static constexpr int64_t kMost = 1 << 16;  // a band of about 2.5 % of the scores at k = N / 2
  static constexpr int64_t kLeast = 1 << 9;  // 12 us for a layer of 2304 weights where 2048 samples took 34

  explicit TopkSample(int64_t total)
      : stride(std::max<int64_t>(1, total / std::clamp<int64_t>(total / 64, kLeast, kMost))) {}

  int64_t position(int64_t stretch) const {
    const uint64_t hash = (static_cast<uint64_t>(stretch) * 0x9e3779b97f4a7c15u) >> 33;
    return stretch * stride + static_cast<int64_t>(hash) % stride;
  }

  int64_t stride;
};

}  // namespace paikern
