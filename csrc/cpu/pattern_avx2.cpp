#include "pattern_inner.inc.h"

namespace paikern {

const PatternInner kPatternAvx2 = PAIKERN_PATTERN_INNER;

}  // namespace paikern
