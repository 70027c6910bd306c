#include "topk_inner.inc.h"

namespace paikern {

const TopkInner kTopkPortable = {make_keys, compare_keys};

}  // namespace paikern
