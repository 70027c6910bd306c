#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace paikern {
namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : (avx2 ? Isa::kAvx2 : Isa::kPortable);
#else
  return Isa::kPortable;
#endif
}

Isa choose() {
  const Isa best = widest();
  const char *asked = std::getenv("PAIKERN_CPU_ISA");
  if (asked == nullptr) return best;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(asked, isa_name(isa)) == 0 && isa <= best) return isa;
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char *isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : (isa == Isa::kAvx2 ? "avx2" : "portable"); }

}  // namespace paikern
