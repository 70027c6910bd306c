#include "topk_inner.inc.h"

namespace paikern {

const TopkInner kTopkAvx512 = PAIKERN_TOPK_INNER;

}  // namespace paikern
