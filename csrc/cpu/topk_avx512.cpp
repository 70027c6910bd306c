#include "topk_inner.inc.h"

namespace paikern {

const TopkInner kTopkAvx512 = {make_keys, compare_keys};

}  // namespace paikern
