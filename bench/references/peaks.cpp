// Fused multiply-adds without memory: what the processor could do if data were free.
//
// Compiled on first use by peaks.py: g++ -O3 -march=native.
#include <cstdint>
#include <thread>
#include <vector>

namespace {

using Lanes = float __attribute__((vector_size(64)));  // one register of AVX-512, or what the compiler makes of it

// A multiply-add takes 4 cycles and two can start in each: 8 sums keep both units busy, 12 leave room. The sums start
// apart and the factor is read at run time, so that none of the work can be left out.
float multiply_add(int64_t rounds, float factor) {
  Lanes sums[12] = {};
  for (int j = 0; j < 12; ++j) sums[j] += static_cast<float>(j);
  for (int64_t i = 0; i < rounds; ++i) {
    for (Lanes &sum : sums) sum = sum * factor + 1.0f;
  }
  float all = 0;
  for (const Lanes &sum : sums) {
    for (int lane = 0; lane < 16; ++lane) all += sum[lane];
  }
  return all;
}

}  // namespace

extern "C" {

// Returns the sum of everything; does threads * rounds * 12 * 16 multiply-adds.
float multiply_adds(int64_t rounds, int32_t threads, float factor) {
  std::vector<float> found(static_cast<size_t>(threads));
  std::vector<std::thread> others;
  const auto run = [&](int32_t t) { found[static_cast<size_t>(t)] = multiply_add(rounds, factor); };
  for (int32_t t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread &other : others) other.join();
  float all = 0;
  for (const float one : found) all += one;
  return all;
}
}
