// What the checks share: random numbers, exact comparison, and a failure that names its place.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

namespace check {

using Random = std::mt19937;

inline int64_t below(Random &random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

template <class T>
T pick(Random &random, std::initializer_list<T> values) {
  return values.begin()[below(random, static_cast<int64_t>(values.size()))];
}

inline bool bit(const std::vector<uint8_t> &packed, int64_t i) {
  return ((packed[static_cast<size_t>(i >> 3)] >> (i & 7)) & 1) != 0;
}

// Random bits with spare ones zero. Buffers have exactly the size that is promised, so that one byte too far is seen.
inline std::vector<uint8_t> random_bits(Random &random, int64_t numel, int64_t out_of_ten) {
  std::vector<uint8_t> packed(static_cast<size_t>((numel + 7) / 8), 0);
  for (int64_t i = 0; i < numel; ++i) {
    if (below(random, 10) < out_of_ten) packed[static_cast<size_t>(i >> 3)] |= static_cast<uint8_t>(1u << (i & 7));
  }
  return packed;
}

void bits(Random &random);
void topk(Random &random, int rounds);
void topk_sources(Random &random, int rounds);
void paths(Random &random, int rounds);
void sweeps(Random &random, int rounds);
void flow(Random &random, int rounds);
void gated(Random &random, int rounds);
void forecast(Random &random, int rounds);
void maps(Random &random);
void patterns(Random &random, int rounds);
void phew(Random &random, int rounds);
void balanced(Random &random, int rounds);
void masked_linear(Random &random, int rounds);
void masked_conv(Random &random, int rounds);

}  // namespace check
