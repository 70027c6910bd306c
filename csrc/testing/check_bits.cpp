// Packing, unpacking and applying masks, bit by bit.
#include <cmath>
#include <cstring>
#include <limits>

#include "bits.h"
#include "check.h"

namespace check {
namespace {

template <class T>
void apply(Random &random, int64_t numel) {
  const auto packed = random_bits(random, numel, pick<int64_t>(random, {0, 5, 10}));
  std::vector<T> values(static_cast<size_t>(numel));
  for (T &value : values) {
    const uint64_t word = (static_cast<uint64_t>(random()) << 32) | random();
    std::memcpy(&value, &word, sizeof(T));  // NaN and infinity among them
  }
  const auto before = values;
  paikern::apply_mask(values.data(), sizeof(T), numel, packed.data());
  for (size_t i = 0; i < values.size(); ++i) {
    CHECK(values[i] == (bit(packed, static_cast<int64_t>(i)) ? before[i] : T{0}));
  }
}

}  // namespace

void bits(Random &random) {
  for (const int64_t numel : {0, 1, 7, 8, 9, 63, 64, 65, 1000, 140'001}) {
    const auto packed = random_bits(random, numel, 4);
    std::vector<uint8_t> mask(static_cast<size_t>(numel), 77), again(packed.size(), 77);
    paikern::unpack_mask(packed.data(), numel, mask.data());
    for (int64_t i = 0; i < numel; ++i) CHECK(mask[static_cast<size_t>(i)] == (bit(packed, i) ? 1 : 0));
    paikern::pack_mask(mask.data(), numel, again.data());
    CHECK(again == packed);
    apply<uint16_t>(random, numel);
    apply<uint32_t>(random, numel);
    apply<uint64_t>(random, numel);
  }
}

}  // namespace check
