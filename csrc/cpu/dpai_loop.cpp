#include "dpai_loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "maps.h"
#include "path_plan.h"
#include "topk.h"

namespace paikern {
namespace {

constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;  // Adam's, as in the published program

int64_t mask_bytes(const DpaiLayer &layer) { return divide_up(layer.numel, 8); }

}  // namespace

DpaiLoop::DpaiLoop(PathFlow &flow, std::vector<DpaiLayer> layers, DpaiSettings settings)
    : flow_(flow), layers_(std::move(layers)), settings_(settings) {
  int64_t bytes = 0;
  for (size_t l = 0; l < layers_.size(); ++l) {
    flow_.set_mask(static_cast<int64_t>(l), layers_[l].mask);
    gathered_live_.emplace_back(static_cast<size_t>(layers_[l].gathered ? layers_[l].nodes : 0));
    bytes += mask_bytes(layers_[l]);
  }
  before_.resize(static_cast<size_t>(bytes));
}

int64_t DpaiLoop::select() {
  std::vector<ScoreSource> sources;
  std::vector<Ranking> rankings;
  for (const DpaiLayer &layer : layers_) {
    ScoreSource source;
    source.data = layer.s;
    source.numel = layer.numel;
    source.bits = layer.mask;
    source.absolute = true;
    const int64_t at = static_cast<int64_t>(sources.size());
    sources.push_back(source);
    rankings.push_back({at, at + 1, layer.k, layer.memory});
  }
  return topk_mask(sources, rankings);
}

DpaiStatus DpaiLoop::run(int64_t done, int64_t steps, double seconds, int64_t patience,
                         std::vector<DpaiRecord> *records) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  probe_team();
  if (patience > 0) same_masks();  // remembers them
  for (int64_t t = done + 1; t <= done + steps; ++t) {
    DpaiRecord record{};
    if (!step(t, &record)) return flow_.broken() >= 0 ? DpaiStatus::kBroken : DpaiStatus::kDead;
    if (fault_ >= 0) return DpaiStatus::kNotFinite;
    records->push_back(record);
    fault_ = select();
    if (fault_ >= 0) return DpaiStatus::kNotFinite;
    if (patience > 0) {
      unchanged = same_masks() ? unchanged + 1 : 0;
      if (unchanged >= patience) return DpaiStatus::kUnchanged;
    }
    if (std::chrono::duration<double>(Clock::now() - start).count() > seconds) return DpaiStatus::kTime;
  }
  return DpaiStatus::kDone;
}

// False where no path is left.
bool DpaiLoop::step(int64_t t, DpaiRecord *record) {
  record->objective = flow_.forward();
  if (!std::isfinite(record->objective)) return false;
  for (size_t l = 0; l < layers_.size(); ++l) {
    if (!layers_[l].gathered) continue;
    std::memset(layers_[l].gathered, 0, sizeof(float) * static_cast<size_t>(layers_[l].numel));
    std::fill(gathered_live_[l].begin(), gathered_live_[l].end(), uint8_t{0});
  }
  flow_.backward([&](FlowStep &step, const float *x, const float *g, int64_t exponent, const FlowValue &out, float *) {
    if (step.parameter >= 0 && step.parameter < static_cast<int64_t>(layers_.size())) {
      update(step, x, g, exponent, out, t, record);
    }
    return false;
  });
  if (flow_.broken() >= 0) return false;
  for (size_t l = 0; l < layers_.size(); ++l) {
    const DpaiLayer &layer = layers_[l];
    if (!layer.gathered) continue;
    const DpaiState state{layer.s, layer.m, layer.v, layer.mask, gathered_live_[l].data(), layer.node_is_channel};
    count(static_cast<int64_t>(l), dpai_update(layer.update, state, rule(layer, 1.0, t), layer.gathered), record);
    for (const uint8_t live : gathered_live_[l]) record->nodes += live;
  }
  return true;
}

void DpaiLoop::update(FlowStep &step, const float *x, const float *g, int64_t exponent, const FlowValue &out, int64_t t,
                      DpaiRecord *record) {
  const int64_t l = step.parameter;
  const DpaiLayer &layer = layers_[static_cast<size_t>(l)];
  live_.resize(static_cast<size_t>(step.channels));
  live_nodes(out.a, g, step.outer, step.channels, step.inner, live_.data());
  const double scale = flow_.rules().by_input_max
                           ? 1.0
                           : std::ldexp(1.0 / flow_.mantissa(),
                                        static_cast<int>(std::clamp<int64_t>(exponent - flow_.top(), -2000, 2000)));
  if (step.transposed) std::swap(x, g);  // the stored rows are the inputs
  if (layer.gathered) {
    gather(step, layer, x, g, static_cast<float>(scale));
    return;
  }
  const DpaiState state{layer.s, layer.m, layer.v, layer.mask, live_.data(), step.transposed};
  count(l, dpai_step(step.geometry, state, rule(layer, scale, t), x, g), record);
  for (const uint8_t live : live_) record->nodes += live;
}

// q of a parameter that is used twice or by rows: summed before its one update.
void DpaiLoop::gather(FlowStep &step, const DpaiLayer &layer, const float *x, const float *g, float scale) {
  const int64_t numel = step.weight.numel;
  const WeightView ones{nullptr, nullptr, numel, WeightType::kFloat32, 0};
  const FloatBuffer q(numel);
  path_score(step.geometry, ones, x, g, 0.0f, q.get());
  float *total = layer.gathered + step.first_bit;
  for (int64_t i = 0; i < numel; ++i) total[i] += q.get()[i] * scale;
  auto &live = gathered_live_[static_cast<size_t>(step.parameter)];
  const int64_t first = step.by_rows ? step.first_bit / step.geometry.depth() : 0;
  for (int64_t c = 0; c < step.channels; ++c) live[static_cast<size_t>(first + c)] |= live_[static_cast<size_t>(c)];
}

void DpaiLoop::count(int64_t layer, const DpaiCounts &counts, DpaiRecord *record) {
  record->kernels += counts.kernels;
  record->weights += counts.weights;
  if (!counts.finite && fault_ < 0) fault_ = layer;
}

DpaiRule DpaiLoop::rule(const DpaiLayer &layer, double q_scale, int64_t t) const {
  const double effective = 1.0 - settings_.alpha, step = static_cast<double>(t);
  const double lr = settings_.adam ? layer.lr / (1.0 - std::pow(kBeta1, step)) : layer.lr;
  return {static_cast<float>(q_scale),
          static_cast<float>(effective + settings_.alpha * settings_.beta),
          static_cast<float>(effective),
          static_cast<float>(lr),
          static_cast<float>(kBeta1),
          static_cast<float>(kBeta2),
          static_cast<float>(std::pow(1.0 - std::pow(kBeta2, step), -0.5)),
          static_cast<float>(kEpsilon)};
}

// Whether all masks are those of the last call, which this one replaces.
bool DpaiLoop::same_masks() {
  bool same = true;
  uint8_t *at = before_.data();
  for (const DpaiLayer &layer : layers_) {
    const size_t bytes = static_cast<size_t>(mask_bytes(layer));
    same &= std::memcmp(at, layer.mask, bytes) == 0;
    std::memcpy(at, layer.mask, bytes);
    at += bytes;
  }
  return same;
}

}  // namespace paikern
