#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace paikern {

// Subnormal scores count, also in a thread where torch.set_flush_denormal is on: a comparison that reads them as zeros
// would see ties.
class SubnormalsCount {
 public:
#if defined(__SSE2__)
  SubnormalsCount() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~SubnormalsCount() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

}  // namespace paikern
