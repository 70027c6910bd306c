// Two contenders of the selection benchmark: std::nth_element, and reading memory without doing anything else.
//
// Compiled on first use by nth_element.py: g++ -O3 -march=native.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Words = uint64_t __attribute__((vector_size(64), aligned(4)));  // 64 bytes a load, alignment of the data

template <class Value>
Value kth_largest(Value *values, int64_t count, int64_t k) {
  std::nth_element(values, values + (k - 1), values + count, std::greater<Value>());
  return values[k - 1];
}

// Eight independent loads in flight; the xor keeps the compiler from leaving them out.
uint64_t read_part(const char *bytes, int64_t count) {
  Words sums[8] = {};
  int64_t i = 0;
  for (; i + 512 <= count; i += 512) {
    for (int j = 0; j < 8; ++j) sums[j] ^= *reinterpret_cast<const Words *>(bytes + i + 64 * j);
  }
  uint64_t all = 0;
  for (const Words &sum : sums) {
    for (int lane = 0; lane < 8; ++lane) all ^= sum[lane];
  }
  for (; i < count; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, static_cast<size_t>(std::min<int64_t>(8, count - i)));
    all ^= word;
  }
  return all;
}

}  // namespace

extern "C" {

// Both reorder `values` in place.
float nth_element_float32(float *values, int64_t count, int64_t k) { return kth_largest(values, count, k); }
double nth_element_float64(double *values, int64_t count, int64_t k) { return kth_largest(values, count, k); }

uint64_t read_bytes(const char *bytes, int64_t count, int32_t threads) {
  const int64_t part = (count / threads + 63) / 64 * 64;
  std::vector<uint64_t> found(static_cast<size_t>(threads));
  std::vector<std::thread> others;
  const auto read = [&](int32_t t) {
    const int64_t start = std::min(t * part, count), end = t + 1 == threads ? count : std::min(start + part, count);
    found[static_cast<size_t>(t)] = read_part(bytes + start, end - start);
  };
  for (int32_t t = 1; t < threads; ++t) others.emplace_back(read, t);
  read(0);
  for (std::thread &other : others) other.join();
  uint64_t all = 0;
  for (const uint64_t one : found) all ^= one;
  return all;
}
}
