// The part of the OpenMP runtime that csrc/cpu uses, on std::thread. ThreadSanitizer knows nothing of libgomp's own
// locks and would call every parallel loop a race; linked against this file instead, it sees the locks and reports
// what is really unordered. Tests only.
#include "gomp_threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace {

std::atomic<int> team_size{2};

struct Loop {
  long next, end, step, chunk;
};

struct Team {
  explicit Team(int threads) : size(threads) {}

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const long mine = generation;
    if (++waiting == size) {
      waiting = 0;
      ++generation;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return generation != mine; });
    }
  }

  bool take(size_t which, long *start, long *end) {
    const std::lock_guard<std::mutex> lock(mutex);
    Loop &loop = loops[which];
    if (loop.next >= loop.end) return false;
    *start = loop.next;
    *end = std::min(loop.end, loop.next + loop.chunk * loop.step);
    loop.next = *end;
    return true;
  }

  const int size;
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0;
  long generation = 0;
  std::deque<Loop> loops;  // work-sharing loops in the order in which every thread meets them
};

struct Member {
  Team *team = nullptr;
  int number = 0;
  size_t met = 0;  // loops met so far
};

thread_local Member member;
std::mutex critical, atomic_updates;

}  // namespace

void set_team_size(int threads) { team_size = threads; }

extern "C" {

int omp_get_thread_num() { return member.number; }
int omp_get_num_threads() { return member.team != nullptr ? member.team->size : 1; }
int omp_get_max_threads() { return team_size; }

// `threads` is 0 for "as many as there are" and 1 where an if() clause is false. Regions inside regions get one thread.
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned) {
  const Member outer = member;
  Team team(outer.team != nullptr ? 1 : static_cast<int>(threads != 0 ? threads : static_cast<unsigned>(team_size)));
  std::vector<std::thread> others;
  for (int number = 1; number < team.size; ++number) {
    others.emplace_back([&team, number, body, data] {
      member = {&team, number, 0};
      body(data);
    });
  }
  member = {&team, 0, 0};
  body(data);
  for (auto &thread : others) thread.join();
  member = outer;
}

void GOMP_barrier() { member.team->barrier(); }

bool GOMP_loop_nonmonotonic_dynamic_next(long *start, long *end) {
  return member.team->take(member.met - 1, start, end);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk, long *start, long *end) {
  {
    const std::lock_guard<std::mutex> lock(member.team->mutex);
    if (member.team->loops.size() == member.met) member.team->loops.push_back({first, last, step, chunk});
    ++member.met;
  }
  return GOMP_loop_nonmonotonic_dynamic_next(start, end);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

void GOMP_critical_name_start(void **) { critical.lock(); }
void GOMP_critical_name_end(void **) { critical.unlock(); }
void GOMP_atomic_start() { atomic_updates.lock(); }
void GOMP_atomic_end() { atomic_updates.unlock(); }

}  // extern "C"
