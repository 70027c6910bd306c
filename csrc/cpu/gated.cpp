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

// The values of one map in one chunk, of f and afterwards of g.
struct Plane {
  FloatBuffer values;
  int64_t exponent = 0;  // of g
  float top = 0.0f;      // at least the maximum of g

  explicit Plane(int64_t floats) : values(floats) {
    std::memset(values.get(), 0, sizeof(float) * static_cast<size_t>(floats));
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
    bool paths = false;  // what the maps hold: g, else f
    std::vector<Plane> maps;
    std::vector<std::unique_ptr<Plane>> phases;         // of each step that reads phase planes
    std::vector<std::unique_ptr<uint8_t[]>> gates;      // of each step that ends in one: the bits of its ReLUs
    std::vector<std::unique_ptr<FloatBuffer>> maximal;  // f where each pool reads it, for those of which g asks
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
  void share(int64_t map, Plane &plane) const;
  void run_steps(Worker &w) const;
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

void GatedProgram::load(const std::vector<GatedWeight> &weights) {
  const int64_t count = static_cast<int64_t>(weights.size());
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    const GatedWeight &w = weights[static_cast<size_t>(count - 1 - i)];  // the last layers are mostly the largest
    impl_->lists[static_cast<size_t>(w.step)].load(w.theta, w.mask, w.scale, w.shift);
  }
}

GatedProgram::Impl::Worker &GatedProgram::Impl::worker(int thread) {
  std::unique_ptr<Worker> &held = workers[static_cast<size_t>(thread)];
  if (!held) {
    held = std::make_unique<Worker>();
    for (size_t i = 0; i < maps.size(); ++i) held->maps.emplace_back(floats(static_cast<int64_t>(i)));
    for (size_t i = 0; i < steps.size(); ++i) {
      const GatedStep &s = steps[i];
      const int64_t phases = lists[i].phase_floats(), bits = floats(s.out) / kGatedUnit * kernels(1).gate_bytes;
      const bool asked = s.kind == GatedKind::kMaxPool && s.pool_gate;
      held->phases.push_back(phases ? std::make_unique<Plane>(phases) : nullptr);
      held->gates.push_back(s.gate ? std::make_unique<uint8_t[]>(static_cast<size_t>(bits)) : nullptr);
      held->maximal.push_back(asked ? std::make_unique<FloatBuffer>(floats(s.in)) : nullptr);
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
      const Plane &found = w.maps[static_cast<size_t>(p.output)];
      // f and then g, not step by step: the maps of one of them take half of the second cache.
      for (const bool paths : {false, true}) {
        w.paths = paths;
        p.fill(w, x + first * size, count);
        p.run_steps(w);
        if (!paths && !f) continue;
        for (int64_t n = 0; n < count; ++n) {
          for (int64_t c = 0, i = 0; c < out.channels; ++c) {
            for (int64_t h = 0; h < out.h; ++h) {
              for (int64_t v = 0; v < out.w; ++v, ++i) {
                const float value = found.values.get()[c * lattice.span + lattice.at(n, h, v)];
                if (paths) {
                  totals[static_cast<size_t>(chunk * outputs + i)] += static_cast<double>(value);
                } else {
                  f[(first + n) * outputs + i] = value;
                }
              }
            }
          }
        }
      }
      exponents[static_cast<size_t>(chunk)] = found.exponent;
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
  Plane &plane = w.maps[0];
  float factor = 1.0f;
  if (w.paths) {
    float top = 0.0f;
    for (int64_t i = 0; i < count * map.channels * map.h * map.w; ++i) top = std::max(top, std::fabs(x[i]));
    int e = 0;
    std::frexp(top, &e);
    factor = power_of_two(-e);
    plane.exponent = 2 * e;
    plane.top = 1.0f;
  }
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t h = 0; h < map.h; ++h) {
        const float *row = x + ((n * map.channels + c) * map.h + h) * map.w;
        float *to = plane.values.get() + c * l.span + l.at(n, h, 0);
        for (int64_t v = 0; v < map.w; ++v) {
          const float value = n < count ? row[v] * factor : 0.0f;
          to[v * kGatedUnit] = w.paths ? value * value : value;
        }
      }
    }
  }
  share(0, plane);
}

// Copy the rows that strips of a map share.
void GatedProgram::Impl::share(int64_t map, Plane &plane) const {
  lattice(map).fill_shared(kernels(1), maps[static_cast<size_t>(map)].channels, plane.values.get());
}

void GatedProgram::Impl::run_steps(Worker &w) const {
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
  const Plane &in = w.maps[static_cast<size_t>(s.in)];
  const Plane *add = s.add < 0 ? nullptr : &w.maps[static_cast<size_t>(s.add)];
  Plane &out = w.maps[static_cast<size_t>(s.out)];
  const GatedKernels &k = kernels(list.step());
  const float *source = in.values.get();
  if (list.phase_floats()) {
    float *phases = w.phases[index]->values.get();
    list.fill_phases(k, lattice(s.in), source, phases);
    source = phases;
  }
  float scale = 1.0f, add_scale = 1.0f;
  if (w.paths) {
    out.exponent = in.top == 0.0f && add ? add->wanted() : in.wanted();
    if (add && add->top > 0.0f) out.exponent = std::max(out.exponent, add->wanted());
    scale = power_of_two(in.exponent - out.exponent);
    if (add) add_scale = power_of_two(add->exponent - out.exponent);
  }
  uint8_t *gates = w.gates[index].get();
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
        GatedBlock b{};
        b.base = source + from.origin(group, y * down) + x * list.step() * kGatedUnit;
        b.out = out.values.get() + at;
        b.add = add ? add->values.get() + at : nullptr;
        b.channel = l.span;
        b.row = l.row_floats();
        b.base_row = down * from.row_floats();
        b.columns = static_cast<int>(wide);
        b.rows = static_cast<int>(high);
        for (int64_t i = 0; i < high; ++i) b.valid[i] = l.valid(y + i);
        b.add_scale = add_scale;
        b.beside = wide > width - x;
        uint8_t *bits = gates ? gates + at / kGatedUnit * k.gate_bytes : nullptr;
        if (w.paths) {
          b.gate = bits;
          out.top = std::max(out.top, list.run_paths(k, b, scale, scratch.get()));
        } else {
          b.open = bits;
          list.run_values(k, b, scratch.get());
        }
      }
    }
  }
  if (shared[index]) share(s.out, out);
}

void GatedProgram::Impl::run_mean(Worker &w, const GatedStep &s) const {
  const Plane &in = w.maps[static_cast<size_t>(s.in)];
  Plane &out = w.maps[static_cast<size_t>(s.out)];
  const GatedMap &map = maps[static_cast<size_t>(s.in)];
  const GatedLattice &from = lattice(s.in), &to = lattice(s.out);
  const float each = 1.0f / static_cast<float>(map.h * map.w);
  out.exponent = in.exponent;
  out.top = 0.0f;
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t group = 0; group < from.groups; ++group) {
      float strips[kGatedUnit] = {};
      for (int64_t row = 0; row < from.rows; ++row) {
        const float *values = in.values.get() + c * from.span + from.origin(group, row);
        for (int64_t v = 0; v < map.w; ++v, values += kGatedUnit) {
          for (int64_t i = 0; i < kGatedUnit; ++i) strips[i] += values[i];
        }
      }
      const int64_t images = kGatedUnit / from.strips;
      for (int64_t n = 0; n < images; ++n) {
        float sum = 0.0f;
        for (int64_t strip = n * from.strips; strip < (n + 1) * from.strips; ++strip) sum += strips[strip];
        out.values.get()[c * to.span + to.at(group * images + n, 0, 0)] = sum * each;
        out.top = std::max(out.top, sum * each);
      }
    }
  }
  share(s.out, out);
}

void GatedProgram::Impl::run_pool(Worker &w, size_t index) const {
  const GatedStep &s = steps[index];
  const Plane &in = w.maps[static_cast<size_t>(s.in)];
  Plane &out = w.maps[static_cast<size_t>(s.out)];
  const GatedMap &map = maps[static_cast<size_t>(s.in)], &pooled = maps[static_cast<size_t>(s.out)];
  const GatedLattice &from = lattice(s.in), &to = lattice(s.out);
  out.exponent = in.exponent;
  out.top = in.top;
  const float *values = in.values.get(), *by = values;
  if (FloatBuffer *held = w.maximal[index].get()) {
    if (w.paths) {
      by = held->get();
    } else {
      std::memcpy(held->get(), values, sizeof(float) * static_cast<size_t>(floats(s.in)));
    }
  }
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
      const float *plane = values + c * from.span, *plane_by = by + c * from.span;
      if (!direct) {
        float *lines = gathered.get(), *lines_by = gathered.get() + tall * line;
        for (int64_t i = 0; i < tall * line; ++i) {
          const int64_t at = source[static_cast<size_t>(i / line * kGatedUnit + i % kGatedUnit)];
          const int64_t pixel = at + i % line / kGatedUnit * kGatedUnit;
          lines[i] = at < 0 ? 0.0f : plane[pixel];
          lines_by[i] = at < 0 ? 0.0f : plane_by[pixel];
        }
        plane = lines;
        plane_by = lines_by;
      }
      for (int64_t v = 0; v < pooled.w; ++v) {
        const int64_t left = v * s.stride[1] - s.padding[1], d = s.dilation[1];
        const int64_t first = std::max<int64_t>(0, divide_up(-left, d));
        const int64_t end = std::clamp<int64_t>(divide_up(map.w - left, d), first, s.kernel[1]);
        GatedPool pool{rows.data(), inside.data(), tall, end - first, d * kGatedUnit, to.valid(row)};
        const int64_t at = (left + first * d) * kGatedUnit, target = c * to.span + to.origin(group, row);
        kernels(1).pool(pool, plane + at, plane_by + at, out.values.get() + target + v * kGatedUnit);
      }
    }
  }
  if (shared[index]) share(s.out, out);
}

void GatedProgram::Impl::run_reshape(Worker &w, const GatedStep &s) const {
  const Plane &in = w.maps[static_cast<size_t>(s.in)];
  Plane &out = w.maps[static_cast<size_t>(s.out)];
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
          out.values.get()[target] = in.values.get()[source];
        }
      }
    }
  }
  share(s.out, out);
}

}  // namespace paikern
