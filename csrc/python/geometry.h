// The geometry of a layer as Python holds it: what stays the same over all steps is read once.
#pragma once

#include "path.h"

namespace paikern::python {

struct Geometry {
  PathGeometry value;
};

}  // namespace paikern::python
