// When a region of two threads pays: how soon they answer is not known before they are asked.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "path_plan.h"

namespace paikern {
namespace {

constexpr int64_t kWork = int64_t{1} << 20, kQuickWork = int64_t{1} << 16;
constexpr double kQuick = 15e-6;  // seconds; 1 to 3 us where threads spin on cores of their own, 50 us and more if not
constexpr int kRegions = 5;

std::atomic<int64_t> work{kWork};

double empty_region() {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> arrived{0};
  const auto start = Clock::now();
#pragma omp parallel
  arrived.fetch_add(1, std::memory_order_relaxed);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

int64_t parallel_work() { return work.load(std::memory_order_relaxed); }

void probe_team() {
  if (omp_get_max_threads() < 2) return;
  empty_region();  // wakes them
  double slowest = 0.0;
  for (int i = 0; i < kRegions && slowest < kQuick; ++i) slowest = std::max(slowest, empty_region());
  work.store(slowest < kQuick ? kQuickWork : kWork, std::memory_order_relaxed);
}

}  // namespace paikern
