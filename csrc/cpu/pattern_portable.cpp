#include "pattern_inner.inc.h"

namespace paikern {

const PatternInner kPatternPortable = PAIKERN_PATTERN_INNER;

}  // namespace paikern
