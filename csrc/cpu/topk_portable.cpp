#include "topk_inner.inc.h"

namespace paikern {

const TopkInner kTopkPortable = PAIKERN_TOPK_INNER;

}  // namespace paikern
