// paikern._C: the CPU kernels. Pointers come in as integers; every check on them is made in Python, before the call.
#include <pybind11/pybind11.h>

#include "isa.h"

namespace py = pybind11;

void bind_bits(py::module_ &m);
void bind_topk(py::module_ &m);
void bind_maps(py::module_ &m);
void bind_path(py::module_ &m);
void bind_gated(py::module_ &m);
void bind_patterns(py::module_ &m);
void bind_flow(py::module_ &m);
void bind_balanced_mask(py::module_ &m);
void bind_phew(py::module_ &m);
void bind_masked_linear(py::module_ &m);
void bind_masked_conv(py::module_ &m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of paikern";
  m.def("isa", [] { return paikern::isa_name(paikern::isa()); }, "Instruction set in use: portable, avx2 or avx512");
  bind_bits(m);
  bind_topk(m);
  bind_maps(m);
  bind_path(m);
  bind_gated(m);
  bind_patterns(m);
  bind_flow(m);
  bind_balanced_mask(m);
  bind_phew(m);
  bind_masked_linear(m);
  bind_masked_conv(m);
}
