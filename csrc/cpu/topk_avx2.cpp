#include "topk_inner.inc.h"

namespace paikern {

const TopkInner kTopkAvx2 = PAIKERN_TOPK_INNER;

}  // namespace paikern
