// z = V x and x = V^T g for any geometry (path_plan.h has the layout).
//
// Two plans give the same bits, since both add one fused product at a time in ascending reduction
// index:
//   tiles   V decoded panel by panel (128 x 192 at most) against packed columns: dense and mildly
//   pruned weights gather  the kept weights of a row as (plane, value) pairs, sums in registers:
//   cost follows what is kept
// Bytes: W once per 480 positions, its bits likewise; scratch is one tile a thread and the planes
// of the map.
#include "path_product.h"

#include <algorithm>

#include "path_compact.h"
#include "path_few.h"
#include "path_matvec.h"

namespace paikern {
namespace {

constexpr int64_t kPlaneFloats = int64_t{1} << 23;  // 32 MB of planes at a time when the batch is large

// The density below which the gather plan is faster: cutting the lists is paid once a weight, so it grows with the
// positions that a list serves; the adjoint also sorts them. Fitted to break-evens of 3 x 3 and linear weights on
// AVX-512: 0.1 at 5 positions, 0.3 at 1056 forward; 0.06 and 0.2 for the adjoint.
double gather_density(int64_t positions, bool adjoint) {
  const double span = std::min(1.0, static_cast<double>(positions) / 256);
  return adjoint ? 0.05 + 0.15 * span : 0.08 + 0.22 * span;
}

// Up to here four vectors a read of W beat transposing it into panels: 8192 x 8192, batch 16, 87 against 205 ms.
// Sparser weights are gathered (72 ms at density 0.02).
constexpr int64_t kMatvecBatch = 16;
constexpr double kMatvecDensity = 0.02;

void run(const std::vector<Product> &products, double density, int64_t planes) {
  // Gather lists hold 32-bit offsets; with few rows a group the tiles would be mostly padding.
  const Product &first = products.front();
  const bool short_planes = planes < (int64_t{1} << 31);
  if (short_planes &&
      (density < gather_density(first.lattice.positions, first.adjoint) || first.rows < path_kernels().tile_rows / 2)) {
    run_gather(products, density);
  } else {
    for (const Product &product : products) run_tiles(product);
  }
}

// Images a pass, so that the planes of large batches stay within kPlaneFloats.
int64_t images_a_pass(int64_t batch, int64_t channels, int64_t image) {
  return std::clamp<int64_t>(kPlaneFloats / std::max<int64_t>(1, channels * image), 1, batch);
}

}  // namespace

void path_forward(const PathGeometry &g, const WeightView &w, const float *x, float *z) {
  if (g.linear() && g.batch <= 4) return matvec_rows(g.rows, g.channels, w, x, g.batch, z);
  const double density = mask_density(w);
  if (few_positions(g, w, density)) return few_forward(g, w, x, z);
  if (CompactLayer::pays(g, w, density)) return CompactLayer(g, w).forward(x, z);
  const int64_t images = images_a_pass(g.batch, g.channels, g.pixels());
  for (int64_t n = 0; n < g.batch; n += images) {
    const int64_t batch = std::min(images, g.batch - n);
    const ForwardPlan plan = plan_forward(g, batch);
    const int64_t plane_stride = static_cast<int64_t>(plan.planes.size()) * plan.lattice.span;
    const int64_t planes = g.channels * plane_stride;
    const FloatBuffer buffer(planes + 64);
    fill_planes(plan.lattice, plan.planes, batch, g.channels, x + n * g.channels * g.pixels(), buffer.get());
    const Grid grid = whole_grid(g.out);
    run({{g, w, plan.lattice, grid, plan.taps, buffer.get() + plan.lattice.lead, g.group_channels() * plane_stride,
          plane_stride, batch, g.group_rows(), g.rows, false, z + n * g.rows * g.out_pixels()}},
        density, planes);
  }
}

void path_backward(const PathGeometry &g, const WeightView &w, const float *grad, float *x) {
  const double density = g.linear() && g.batch <= 4 ? 1.0 : mask_density(w);
  if (few_positions(g, w, density)) return few_backward(g, w, nullptr, grad, x, {});
  if (CompactLayer::pays(g, w, density)) return CompactLayer(g, w).backward(grad, x);
  if (g.linear() && g.batch <= kMatvecBatch && density >= kMatvecDensity) {
    for (int64_t n = 0; n < g.batch; n += 4) {
      matvec_columns(g.rows, g.channels, w, grad + n * g.rows, std::min<int64_t>(4, g.batch - n), x + n * g.channels);
    }
    return;
  }
  const int64_t images = images_a_pass(g.batch, g.rows, g.out_pixels());
  for (int64_t n = 0; n < g.batch; n += images) {
    const int64_t batch = std::min(images, g.batch - n);
    const BackwardPlan plan = plan_backward(g, batch);
    const int64_t planes = g.rows * plan.lattice.span;
    const FloatBuffer buffer(planes + 64);
    fill_planes(plan.lattice, {whole_grid(g.out)}, batch, g.rows, grad + n * g.rows * g.out_pixels(), buffer.get());
    std::vector<Product> products;
    for (const BackwardPhase &phase : plan.phases) {
      products.push_back({g, w, plan.lattice, phase.grid, phase.taps, buffer.get() + plan.lattice.lead,
                          g.group_rows() * plan.lattice.span, plan.lattice.span, batch, g.group_channels(), g.channels,
                          true, x + n * g.channels * g.pixels()});
    }
    if (!products.empty()) run(products, density, planes);
  }
}

}  // namespace paikern
