// Which instruction set the kernels run on, decided once when first asked.
#pragma once

namespace paikern {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The widest set that this CPU has, or PAIKERN_CPU_ISA=portable|avx2|avx512 if that names a narrower one.
Isa isa();

const char *isa_name(Isa isa);

}  // namespace paikern
