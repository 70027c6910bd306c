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

// Floats of the largest map of a chunk, f only: 4 samples of ResNet-20, whose 16 x 32 x 32 maps then take 350 KB.
constexpr int64_t kChunkFloats = 96 << 10, kMostGroups = 8;
constexpr double kMostWaste = 1.1;
constexpr int kTopExponent = 40;  // maps are rescaled when read beyond 2**40 or below 2**-40

const GatedKernels &kernels(int step) {
  static const auto table = isa() == Isa::kAvx512 ? gated_kernels_avx512
                            : isa() == Isa::kAvx2 ? gated_kernels_avx2
                                                  : gated_kernels_portable;
  return table(step);
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
  std::vector<bool> shared;  // of each step: whether some reader needs the rows that strips of its output share
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

  void cut();
  Worker &worker(int thread);
  void fill(Worker &w, const float *x, int64_t count) const;
  void run_weight(Worker &w, size_t index) const;
  void run_mean(Worker &w, const GatedStep &s) const;
  bool pools_units(const GatedStep &s) const { return lattice(s.in).rows == s.stride[0] * lattice(s.out).rows; }
  void run_pool(Worker &w, size_t index) const;
  void run_reshape(Worker &w, const GatedStep &s) const;
  void share(int64_t map, Planes &planes) const;
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
    if (s.kind != GatedKind::kWeight && s.kind != GatedKind::kMaxPool) continue;
    p.lattices[static_cast<size_t>(p.lattice_of[static_cast<size_t>(s.in)])].admit_reader(s, map_at(s.out));
    if (s.kind == GatedKind::kMaxPool) continue;
    p.lattices[static_cast<size_t>(p.lattice_of[static_cast<size_t>(s.out)])].admit(s, map_at(s.in));
  }
  p.cut();
  for (const GatedStep &s : p.steps) {
    p.lists.emplace_back(s, map_at(s.in), map_at(s.out), p.lattice(s.in), p.lattice(s.out));
  }
  // A map may hold several values one after the other.
  for (size_t i = 0; i < p.steps.size(); ++i) {
    bool read = false;
    for (size_t j = i + 1; j < p.steps.size() && !read; ++j) {
      const GatedStep &s = p.steps[j];
      const bool direct = s.kind == GatedKind::kMaxPool ? p.pools_units(s) : p.lists[j].direct();
      const bool window = s.kind == GatedKind::kWeight || s.kind == GatedKind::kMaxPool;
      read = window && s.in == p.steps[i].out && direct && reads_shared(s);
      if (s.out == p.steps[i].out) break;
    }
    p.shared.push_back(read);
  }
}

// The samples of a chunk: images whole where that keeps the largest map small, else in as few strips as do, unless
// much of the arithmetic would then fall on no pixel.
void GatedProgram::Impl::cut() {
  const auto largest = [&](int64_t strips, int64_t groups) {
    int64_t floats = 0;
    for (size_t i = 0; i < maps.size(); ++i) {
      floats = std::max(floats, maps[i].channels * lattice(static_cast<int64_t>(i)).floats(strips, groups));
    }
    return floats;
  };
  const auto work = [&](int64_t strips) {
    double sum = 0.0;
    for (const GatedStep &s : steps) {
      if (s.kind != GatedKind::kWeight) continue;
      const GatedMap &in = maps[static_cast<size_t>(s.in)], &out = maps[static_cast<size_t>(s.out)];
      const int64_t depth = in.channels / s.groups * s.kernel[0] * s.kernel[1];
      sum += static_cast<double>(out.channels * out.h * out.w * depth) / lattice(s.out).use(strips);
    }
    return sum;
  };
  int64_t strips = 1, groups = 1;
  while (strips < kGatedUnit && largest(strips, 1) > kChunkFloats && work(2 * strips) <= kMostWaste * work(strips)) {
    strips *= 2;
  }
  while (strips == 1 && groups < kMostGroups && largest(strips, 2 * groups) <= kChunkFloats) groups *= 2;
  for (GatedLattice &lattice : lattices) lattice.finish(strips, groups);
  samples = groups * (kGatedUnit / strips);
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
              const int64_t at = c * lattice.span + lattice.at(n, h, v);
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
        const int64_t at = c * l.span + l.at(n, h, 0);
        float *f = planes.f.get() + at, *g = planes.g.get() + at;
        for (int64_t v = 0; v < map.w; ++v) {
          const float value = n < count ? row[v] : 0.0f;
          f[v * kGatedUnit] = value;
          g[v * kGatedUnit] = value * factor * (value * factor);
        }
      }
    }
  }
  share(0, planes);
}

// Copy the rows that strips of a map share.
void GatedProgram::Impl::share(int64_t map, Planes &planes) const {
  const int64_t channels = maps[static_cast<size_t>(map)].channels;
  lattice(map).fill_shared(kernels(1), channels, planes.f.get());
  lattice(map).fill_shared(kernels(1), channels, planes.g.get());
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
        run_pool(w, i);
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
  const GatedKernels &k = kernels(list.step());
  const float *f_in = in.f.get(), *g_in = in.g.get();
  if (list.phase_floats()) {
    Planes &phases = *w.phases[index];
    list.fill_phases(k, lattice(s.in), f_in, phases.f.get());
    list.fill_phases(k, lattice(s.in), g_in, phases.g.get());
    f_in = phases.f.get();
    g_in = phases.g.get();
  }
  out.exponent = in.top == 0.0f && add ? add->wanted() : in.wanted();
  if (add && add->top > 0.0f) out.exponent = std::max(out.exponent, add->wanted());
  const float g_scale = power_of_two(in.exponent - out.exponent);
  const float add_scale = add ? power_of_two(add->exponent - out.exponent) : 0.0f;
  // All channels of one block at a time: the window of the input stays in the first cache.
  const GatedLattice &from = list.direct() ? lattice(s.in) : l;
  const int64_t down = list.direct() ? s.stride[0] : 1;
  const bool flat = list.flat();
  const int64_t width = flat ? l.groups * l.rows * l.w : l.w, rows = flat ? 1 : l.rows, groups = flat ? 1 : l.groups;
  const FloatBuffer scratch(list.scratch() * k.columns * k.rows * kGatedUnit);
  out.top = 0.0f;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t y = 0, high; y < rows; y += high) {
      high = std::min<int64_t>(k.rows, rows - y);
      for (int64_t x = 0, wide = k.columns; x < width; x += wide) {
        // One column too many takes less than a remainder of 4 + 2 + 1 columns.
        const auto beside = [&] { return wide > 2 && wide == width - x + 1 && !flat && x + wide <= l.pitch; };
        while (wide > width - x && !beside()) wide /= 2;
        const int64_t at = l.origin(group, y) + x * kGatedUnit;
        const int64_t source = from.origin(group, y * down) + x * list.step() * kGatedUnit;
        GatedBlock b{};
        b.base = f_in + source;
        b.out = out.f.get() + at;
        b.add = add ? add->f.get() + at : nullptr;
        b.channel = l.span;
        b.row = l.row_floats();
        b.base_row = down * from.row_floats();
        b.columns = static_cast<int>(wide);
        b.rows = static_cast<int>(high);
        for (int64_t i = 0; i < high; ++i) b.valid[i] = l.valid(y + i);
        b.add_scale = 1.0f;
        b.rectify = s.gate;
        b.beside = wide > width - x;
        list.run_values(k, b, scratch.get());
        b.base = g_in + source;
        b.out = out.g.get() + at;
        b.add = add ? add->g.get() + at : nullptr;
        b.gate = s.gate ? out.f.get() + at : nullptr;
        b.add_scale = add_scale;
        b.rectify = false;
        out.top = std::max(out.top, list.run_paths(k, b, g_scale, scratch.get()));
      }
    }
  }
  if (shared[index]) share(s.out, out);
}

void GatedProgram::Impl::run_mean(Worker &w, const GatedStep &s) const {
  const Planes &in = w.maps[static_cast<size_t>(s.in)];
  Planes &out = w.maps[static_cast<size_t>(s.out)];
  const GatedMap &map = maps[static_cast<size_t>(s.in)];
  const GatedLattice &from = lattice(s.in), &to = lattice(s.out);
  const float each = 1.0f / static_cast<float>(map.h * map.w);
  out.exponent = in.exponent;
  out.top = 0.0f;
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t group = 0; group < from.groups; ++group) {
      float f[kGatedUnit] = {}, g[kGatedUnit] = {};  // of each strip
      for (int64_t row = 0; row < from.rows; ++row) {
        const int64_t at = c * from.span + from.origin(group, row);
        for (int64_t i = 0; i < map.w * kGatedUnit; ++i) {
          f[i % kGatedUnit] += in.f.get()[at + i];
          g[i % kGatedUnit] += in.g.get()[at + i];
        }
      }
      const int64_t images = kGatedUnit / from.strips;
      for (int64_t n = 0; n < images; ++n) {
        float f_sum = 0.0f, g_sum = 0.0f;
        for (int64_t strip = n * from.strips; strip < (n + 1) * from.strips; ++strip) {
          f_sum += f[strip];
          g_sum += g[strip];
        }
        const int64_t at = c * to.span + to.at(group * images + n, 0, 0);
        out.f.get()[at] = f_sum * each;
        out.g.get()[at] = g_sum * each;
        out.top = std::max(out.top, g_sum * each);
      }
    }
  }
  share(s.out, out);
}

void GatedProgram::Impl::run_pool(Worker &w, size_t index) const {
  const GatedStep &s = steps[index];
  const Planes &in = w.maps[static_cast<size_t>(s.in)];
  Planes &out = w.maps[static_cast<size_t>(s.out)];
  const GatedMap &map = maps[static_cast<size_t>(s.in)], &pooled = maps[static_cast<size_t>(s.out)];
  const GatedLattice &from = lattice(s.in), &to = lattice(s.out);
  out.exponent = in.exponent;
  out.top = in.top;
  const bool direct = pools_units(s);
  const int64_t tall = s.kernel[0], line = map.w * kGatedUnit, images = kGatedUnit / to.strips;
  std::vector<int64_t> source(static_cast<size_t>(tall * kGatedUnit));  // of each row of taps, or -1
  std::vector<int64_t> rows(static_cast<size_t>(tall));
  std::vector<uint32_t> inside(static_cast<size_t>(tall));
  const FloatBuffer gathered(direct ? 0 : 2 * tall * line);  // the rows, where the strips of both maps do not match
  for (int64_t place = 0; place < to.groups * to.rows; ++place) {
    const int64_t group = place / to.rows, row = place % to.rows;
    for (int64_t i = 0; i < tall; ++i) {
      const int64_t from_top = i * s.dilation[0] - s.padding[0];
      rows[static_cast<size_t>(i)] = direct ? from.origin(group, row * s.stride[0] + from_top) : i * line;
      inside[static_cast<size_t>(i)] = 0;
      for (int64_t lane = 0; lane < kGatedUnit; ++lane) {
        const int64_t h = lane % to.strips * to.rows + row, y = h * s.stride[0] + from_top;
        const bool read = h < pooled.h && y >= 0 && y < map.h;
        if (read) inside[static_cast<size_t>(i)] |= uint32_t{1} << lane;
        source[static_cast<size_t>(i * kGatedUnit + lane)] =
            read ? from.at(group * images + lane / to.strips, y, 0) : -1;
      }
    }
    for (int64_t c = 0; c < map.channels; ++c) {
      const float *f = in.f.get() + c * from.span, *g = in.g.get() + c * from.span;
      if (!direct) {
        float *f_rows = gathered.get(), *g_rows = gathered.get() + tall * line;
        for (int64_t i = 0; i < tall * line; ++i) {
          const int64_t at = source[static_cast<size_t>(i / line * kGatedUnit + i % kGatedUnit)];
          f_rows[i] = at < 0 ? 0.0f : f[at + i % line / kGatedUnit * kGatedUnit];
          g_rows[i] = at < 0 ? 0.0f : g[at + i % line / kGatedUnit * kGatedUnit];
        }
        f = f_rows;
        g = g_rows;
      }
      for (int64_t v = 0; v < pooled.w; ++v) {
        const int64_t left = v * s.stride[1] - s.padding[1], d = s.dilation[1];
        const int64_t first = std::max<int64_t>(0, divide_up(-left, d));
        const int64_t end = std::clamp<int64_t>(divide_up(map.w - left, d), first, s.kernel[1]);
        GatedPool pool{rows.data(), inside.data(), tall, end - first, d * kGatedUnit, to.valid(row), s.pool_gate};
        const int64_t at = (left + first * d) * kGatedUnit, target = c * to.span + to.origin(group, row);
        kernels(1).pool(pool, f + at, g + at, out.f.get() + target + v * kGatedUnit,
                        out.g.get() + target + v * kGatedUnit);
      }
    }
  }
  if (shared[index]) share(s.out, out);
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
          const int64_t source = c * from.span + from.at(n, h, v), x = i % shaped.w;
          const int64_t y = i / shaped.w % shaped.h, channel = i / (shaped.w * shaped.h);
          const int64_t target = channel * to.span + to.at(n, y, x);
          out.f.get()[target] = in.f.get()[source];
          out.g.get()[target] = in.g.get()[source];
        }
      }
    }
  }
  share(s.out, out);
}

}  // namespace paikern
