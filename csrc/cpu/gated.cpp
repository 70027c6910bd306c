#include "gated.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "gated_lists.h"
#include "isa.h"
#include "path_plan.h"

namespace paikern {
namespace {

// Floats of the largest map of a chunk, f only: 4 samples of ResNet-20, whose 16 x 32 x 32 maps then take 270 KB.
constexpr int64_t kChunkFloats = 72 << 10, kMostSamples = 128;
constexpr int kTopExponent = 40;  // maps are rescaled when read beyond 2**40 or below 2**-40

const GatedKernels &kernels() {
  static const GatedKernels &table = isa() == Isa::kAvx512 ? gated_kernels_avx512()
                                     : isa() == Isa::kAvx2 ? gated_kernels_avx2()
                                                           : gated_kernels_portable();
  return table;
}

// The two networks' values of one map in one chunk.
struct Planes {
  FloatBuffer f, g;
  int64_t exponent = 0;  // of g
  float top = 0.0f;      // at least the maximum of g

  explicit Planes(int64_t floats) : f(floats), g(floats) {
    std::memset(f.get(), 0, sizeof(float) * static_cast<size_t>(floats));
    std::memset(g.get(), 0, sizeof(float) * static_cast<size_t>(floats));
  }

  // What the exponent should be for the next reader.
  int64_t wanted() const {
    if (top == 0.0f) return exponent;
    int e = 0;
    std::frexp(top, &e);
    return e - 1 > kTopExponent || e - 1 < -kTopExponent ? exponent + e - 1 : exponent;
  }
};

float power_of_two(int64_t e) { return std::ldexp(1.0f, static_cast<int>(std::clamp<int64_t>(e, -300, 127))); }

}  // namespace

struct GatedProgram::Impl {
  std::vector<GatedMap> maps;
  std::vector<GatedStep> steps;
  std::vector<GatedLists> lists;    // of each step
  std::vector<int64_t> lattice_of;  // of each map
  std::vector<GatedLattice> lattices;
  std::vector<std::vector<uint8_t>> valid;  // of each lattice
  int64_t output = 0, samples = 1;

  // What one thread works in; kept from call to call.
  struct Worker {
    std::vector<Planes> maps;
    std::vector<std::unique_ptr<Planes>> phases;  // of each step that reads phase planes
  };
  std::vector<std::unique_ptr<Worker>> workers;

  const GatedLattice &lattice(int64_t map) const {
    return lattices[static_cast<size_t>(lattice_of[static_cast<size_t>(map)])];
  }
  int64_t floats(int64_t map) const { return maps[static_cast<size_t>(map)].channels * lattice(map).span; }

  Worker &worker(int thread);
  void fill(Worker &w, const float *x, int64_t count) const;
  void run_weight(Worker &w, size_t index) const;
  void run_mean(Worker &w, const GatedStep &s) const;
  void run_pool(Worker &w, const GatedStep &s) const;
  void run_reshape(Worker &w, const GatedStep &s) const;
  void run_chunk(Worker &w) const;
};

GatedProgram::GatedProgram(std::vector<GatedMap> maps, std::vector<GatedStep> steps, int64_t output)
    : impl_(std::make_unique<Impl>()) {
  Impl &p = *impl_;
  p.maps = std::move(maps);
  p.steps = std::move(steps);
  p.output = output;
  for (const GatedMap &map : p.maps) {
    size_t at = 0;
    while (at < p.lattices.size() && (p.lattices[at].h != map.h || p.lattices[at].w != map.w)) ++at;
    if (at == p.lattices.size()) p.lattices.emplace_back(map.h, map.w);
    p.lattice_of.push_back(static_cast<int64_t>(at));
  }
  const auto map_at = [&](int64_t i) { return p.maps[static_cast<size_t>(i)]; };
  for (const GatedStep &s : p.steps) {
    if (s.kind != GatedKind::kWeight) continue;
    p.lattices[static_cast<size_t>(p.lattice_of[static_cast<size_t>(s.out)])].admit(s, map_at(s.in));
  }
  int64_t largest = 1;
  for (size_t i = 0; i < p.maps.size(); ++i) {
    largest = std::max(largest, p.maps[i].channels * p.lattice(static_cast<int64_t>(i)).image());
  }
  p.samples = std::clamp<int64_t>(kChunkFloats / largest, 1, kMostSamples);
  for (GatedLattice &lattice : p.lattices) {
    lattice.finish(p.samples);
    p.valid.push_back(lattice.valid(p.samples));
  }
  for (const GatedStep &s : p.steps) {
    p.lists.emplace_back(s, map_at(s.in), map_at(s.out), p.lattice(s.out));
  }
}

GatedProgram::~GatedProgram() = default;

void GatedProgram::load(int64_t step, const float *theta, const uint8_t *mask, const float *scale, const float *shift) {
  impl_->lists[static_cast<size_t>(step)].load(theta, mask, scale, shift);
}

GatedProgram::Impl::Worker &GatedProgram::Impl::worker(int thread) {
  std::unique_ptr<Worker> &held = workers[static_cast<size_t>(thread)];
  if (!held) {
    held = std::make_unique<Worker>();
    for (size_t i = 0; i < maps.size(); ++i) held->maps.emplace_back(floats(static_cast<int64_t>(i)));
    for (const GatedLists &list : lists) {
      held->phases.push_back(list.phase_floats() ? std::make_unique<Planes>(list.phase_floats()) : nullptr);
    }
  }
  return *held;
}

int64_t GatedProgram::run(const float *x, int64_t samples, double *total, float *f) {
  Impl &p = *impl_;
  const GatedMap out = p.maps[static_cast<size_t>(p.output)];
  const GatedLattice &lattice = p.lattice(p.output);
  const int64_t size = p.maps[0].channels * p.maps[0].h * p.maps[0].w, outputs = out.channels * out.h * out.w;
  const int64_t chunks = divide_up(samples, p.samples);
  std::vector<double> totals(static_cast<size_t>(chunks * outputs), 0.0);
  std::vector<int64_t> exponents(static_cast<size_t>(chunks), 0);
  p.workers.resize(std::max(p.workers.size(), static_cast<size_t>(omp_get_max_threads())));
#pragma omp parallel if (chunks > 1)
  {
    Impl::Worker &w = p.worker(omp_get_thread_num());
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * p.samples, count = std::min(p.samples, samples - first);
      p.fill(w, x + first * size, count);
      p.run_chunk(w);
      const Planes &found = w.maps[static_cast<size_t>(p.output)];
      exponents[static_cast<size_t>(chunk)] = found.exponent;
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t c = 0, i = 0; c < out.channels; ++c) {
          for (int64_t h = 0; h < out.h; ++h) {
            for (int64_t v = 0; v < out.w; ++v, ++i) {
              const int64_t at = c * lattice.span + lattice.lead + lattice.flat(n, h, v);
              totals[static_cast<size_t>(chunk * outputs + i)] += static_cast<double>(found.g.get()[at]);
              if (f) f[(first + n) * outputs + i] = found.f.get()[at];
            }
          }
        }
      }
    }
  }
  int64_t top = chunks ? exponents[0] : 0;
  for (int64_t e : exponents) top = std::max(top, e);
  std::fill(total, total + outputs, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t by = std::max<int64_t>(exponents[static_cast<size_t>(chunk)] - top, -2000);
    const double factor = std::ldexp(1.0, static_cast<int>(by));
    for (int64_t i = 0; i < outputs; ++i) total[i] += factor * totals[static_cast<size_t>(chunk * outputs + i)];
  }
  return top;
}

// Map 0 <- `count` samples, zeros for the rest of the chunk.
void GatedProgram::Impl::fill(Worker &w, const float *x, int64_t count) const {
  const GatedMap &map = maps[0];
  const GatedLattice &l = lattice(0);
  Planes &planes = w.maps[0];
  float top = 0.0f;
  for (int64_t i = 0; i < count * map.channels * map.h * map.w; ++i) top = std::max(top, std::fabs(x[i]));
  int e = 0;
  std::frexp(top, &e);
  const float factor = power_of_two(-e);
  planes.exponent = 2 * e;
  planes.top = 1.0f;
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t h = 0; h < map.h; ++h) {
        const float *row = x + ((n * map.channels + c) * map.h + h) * map.w;
        float *f = planes.f.get() + c * l.span + l.lead + l.flat(n, h, 0);
        float *g = planes.g.get() + c * l.span + l.lead + l.flat(n, h, 0);
        for (int64_t v = 0; v < map.w; ++v) {
          const float value = n < count ? row[v] : 0.0f;
          f[v] = value;
          g[v] = value * factor * (value * factor);
        }
      }
    }
  }
}

void GatedProgram::Impl::run_chunk(Worker &w) const {
  for (size_t i = 0; i < steps.size(); ++i) {
    const GatedStep &s = steps[i];
    switch (s.kind) {
      case GatedKind::kWeight:
      case GatedKind::kElementwise:
        run_weight(w, i);
        break;
      case GatedKind::kMean:
        run_mean(w, s);
        break;
      case GatedKind::kMaxPool:
        run_pool(w, s);
        break;
      case GatedKind::kReshape:
        run_reshape(w, s);
        break;
    }
  }
}

void GatedProgram::Impl::run_weight(Worker &w, size_t index) const {
  const GatedStep &s = steps[index];
  const GatedLists &list = lists[index];
  const GatedLattice &l = lattice(s.out);
  const Planes &in = w.maps[static_cast<size_t>(s.in)];
  const Planes *add = s.add < 0 ? nullptr : &w.maps[static_cast<size_t>(s.add)];
  Planes &out = w.maps[static_cast<size_t>(s.out)];
  const float *f_in = in.f.get() + l.lead, *g_in = in.g.get() + l.lead;
  if (list.phase_floats()) {
    Planes &phases = *w.phases[index];
    list.fill_phases(lattice(s.in), samples, in.f.get(), phases.f.get());
    list.fill_phases(lattice(s.in), samples, in.g.get(), phases.g.get());
    f_in = phases.f.get() + l.lead;
    g_in = phases.g.get() + l.lead;
  }
  out.exponent = in.top == 0.0f && add ? add->wanted() : in.wanted();
  if (add && add->top > 0.0f) out.exponent = std::max(out.exponent, add->wanted());
  const float g_scale = power_of_two(in.exponent - out.exponent);
  const float add_scale = add ? power_of_two(add->exponent - out.exponent) : 0.0f;
  const GatedKernels &k = kernels();
  const std::vector<uint8_t> &bits = valid[static_cast<size_t>(lattice_of[static_cast<size_t>(s.out)])];
  // Blocks of whole 16 positions, the unit of the valid bits. All channels of one block at a time: the window of the
  // input stays in the first cache.
  const int64_t units = l.positions(samples) / 16;
  const int64_t most = std::max(1, (list.dense() ? 2 * k.tile_vectors : k.gather_vectors) * k.lanes / 16);
  const int64_t blocks = divide_up(units, most);
  const FloatBuffer all(16 * most);
  out.top = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t q = 16 * (units * block / blocks), end = 16 * (units * (block + 1) / blocks);
    const int64_t vectors = (end - q) / k.lanes, at = l.lead + q;
    const GatedBlock f{f_in + q, out.f.get() + at, add ? add->f.get() + at : nullptr,
                       nullptr,  nullptr,          bits.data() + q / 8,
                       l.span,   vectors,          1.0f,
                       s.gate};
    const GatedBlock g{g_in + q,
                       out.g.get() + at,
                       add ? add->g.get() + at : nullptr,
                       s.gate ? f.out : nullptr,
                       nullptr,
                       f.valid,
                       l.span,
                       vectors,
                       add_scale,
                       false};
    list.run_values(k, f);
    out.top = std::max(out.top, list.run_paths(k, g, g_scale, all.get()));
  }
}

void GatedProgram::Impl::run_mean(Worker &w, const GatedStep &s) const {
  const Planes &in = w.maps[static_cast<size_t>(s.in)];
  Planes &out = w.maps[static_cast<size_t>(s.out)];
  const GatedMap &map = maps[static_cast<size_t>(s.in)];
  const GatedLattice &from = lattice(s.in), &to = lattice(s.out);
  const float share = 1.0f / static_cast<float>(map.h * map.w);
  out.exponent = in.exponent;
  out.top = 0.0f;
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t n = 0; n < samples; ++n) {
      float f = 0.0f, g = 0.0f;
      for (int64_t h = 0; h < map.h; ++h) {
        const int64_t at = c * from.span + from.lead + from.flat(n, h, 0);
        for (int64_t v = 0; v < map.w; ++v) {
          f += in.f.get()[at + v];
          g += in.g.get()[at + v];
        }
      }
      const int64_t at = c * to.span + to.lead + to.flat(n, 0, 0);
      out.f.get()[at] = f * share;
      out.g.get()[at] = g * share;
      out.top = std::max(out.top, g * share);
    }
  }
}

void GatedProgram::Impl::run_pool(Worker &w, const GatedStep &s) const {
  const Planes &in = w.maps[static_cast<size_t>(s.in)];
  Planes &out = w.maps[static_cast<size_t>(s.out)];
  const GatedMap &map = maps[static_cast<size_t>(s.in)], &pooled = maps[static_cast<size_t>(s.out)];
  const GatedLattice &from = lattice(s.in), &to = lattice(s.out);
  out.exponent = in.exponent;
  out.top = in.top;
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t n = 0; n < samples; ++n) {
      const float *f = in.f.get() + c * from.span + from.lead, *g = in.g.get() + c * from.span + from.lead;
      for (int64_t h = 0; h < pooled.h; ++h) {
        for (int64_t v = 0; v < pooled.w; ++v) {
          float best = -INFINITY, paths = 0.0f, at_best = 0.0f;
          for (int64_t i = 0; i < s.kernel[0]; ++i) {
            const int64_t y = h * s.stride[0] - s.padding[0] + i * s.dilation[0];
            if (y < 0 || y >= map.h) continue;
            for (int64_t j = 0; j < s.kernel[1]; ++j) {
              const int64_t x = v * s.stride[1] - s.padding[1] + j * s.dilation[1];
              if (x < 0 || x >= map.w) continue;
              const int64_t at = from.flat(n, y, x);
              if (f[at] > best) {
                best = f[at];
                at_best = g[at];
              }
              paths = std::max(paths, g[at]);
            }
          }
          const int64_t at = c * to.span + to.lead + to.flat(n, h, v);
          out.f.get()[at] = best;
          out.g.get()[at] = s.pool_gate ? at_best : paths;
        }
      }
    }
  }
}

void GatedProgram::Impl::run_reshape(Worker &w, const GatedStep &s) const {
  const Planes &in = w.maps[static_cast<size_t>(s.in)];
  Planes &out = w.maps[static_cast<size_t>(s.out)];
  const GatedMap &map = maps[static_cast<size_t>(s.in)], &shaped = maps[static_cast<size_t>(s.out)];
  const GatedLattice &from = lattice(s.in), &to = lattice(s.out);
  out.exponent = in.exponent;
  out.top = in.top;
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t c = 0, i = 0; c < map.channels; ++c) {
      for (int64_t h = 0; h < map.h; ++h) {
        for (int64_t v = 0; v < map.w; ++v, ++i) {
          const int64_t source = c * from.span + from.lead + from.flat(n, h, v), x = i % shaped.w;
          const int64_t y = i / shaped.w % shaped.h, channel = i / (shaped.w * shaped.h);
          const int64_t target = channel * to.span + to.lead + to.flat(n, y, x);
          out.f.get()[target] = in.f.get()[source];
          out.g.get()[target] = in.g.get()[source];
        }
      }
    }
  }
}

}  // namespace paikern
