// Every native operation against brute force, for teams of one and three threads and from two threads at once. Built
// and run by run_sanitizers.sh. Usage: checks [rounds]
#include <thread>

#include "check.h"
#include "gomp_threads.h"
#include "isa.h"

namespace {

void run_all(uint32_t seed, int rounds) {
  check::Random random(seed);
  check::bits(random);
  check::topk(random, rounds);
  check::topk_sources(random, rounds);
  check::paths(random, rounds);
  check::sweeps(random, rounds);
  check::flow(random, rounds);
  check::gated(random, rounds);
  check::forecast(random, rounds);
  check::maps(random);
  check::patterns(random, rounds);
  check::phew(random, rounds);
  check::balanced(random, rounds);
  check::masked_linear(random, rounds);
  check::masked_conv(random, rounds);
}

}  // namespace

int main(int count, char **arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 20;
  // Two callers first: what is decided once, such as the instruction set, is then decided under competition.
  std::thread other(run_all, 1u, 3);
  run_all(2u, 3);
  other.join();
  for (const int threads : {1, 3}) {
    set_team_size(threads);
    run_all(static_cast<uint32_t>(2 + threads), rounds);
  }
  std::printf("%s: all checks passed\n", paikern::isa_name(paikern::isa()));
}
