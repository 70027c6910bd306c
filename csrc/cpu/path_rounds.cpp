#include "path_rounds.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

#include "path_score_tiles.h"
#include "topk.h"

namespace paikern {
namespace {

// Up to here the scores of all maps are stored once a round: a selection that looks at them several times (sample, band,
// and histograms where kernels of one score mislead the sample) would compute them again each time. 4 MB.
constexpr int64_t kStored = int64_t{1} << 20;

bool vectors(const FlowStep &step) { return step.geometry.linear() && step.geometry.batch == 1; }

}  // namespace

RoundsStatus PathRounds::run(int64_t done, const std::vector<std::vector<int64_t>> &counts, double seconds,
                             bool stop_empty, std::vector<double> *log_flows) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  for (size_t round = static_cast<size_t>(done); round < counts.size(); ++round) {
    double log_flow;
    RoundsStatus status = begin(&log_flow);
    if (status == RoundsStatus::kDone) status = finish(counts[round], stop_empty);
    if (status == RoundsStatus::kDone || status == RoundsStatus::kEmptied) log_flows->push_back(log_flow);
    if (status != RoundsStatus::kDone) return status;
    const bool late = std::chrono::duration<double>(Clock::now() - start).count() > seconds;
    if (late && round + 1 < counts.size()) return RoundsStatus::kTime;
  }
  return RoundsStatus::kDone;
}

RoundsStatus PathRounds::begin(double *log_flow) {
  *log_flow = flow_.forward();
  if (std::isfinite(*log_flow)) return RoundsStatus::kDone;
  return flow_.broken() >= 0 ? RoundsStatus::kBroken : RoundsStatus::kDead;
}

RoundsStatus PathRounds::finish(const std::vector<int64_t> &counts, bool stop_empty) {
  const size_t layers = layers_.size();
  x_.resize(layers);
  g_.resize(layers);
  exponents_.resize(layers);
  flow_.backward([&](FlowStep &step, const float *x, const float *g, int64_t exponent, const FlowValue &) {
    if (step.parameter < 0 || step.parameter >= static_cast<int64_t>(layers)) return;
    const size_t l = static_cast<size_t>(step.parameter);
    x_[l] = step.transposed ? g : x;  // the stored rows are the inputs
    g_[l] = step.transposed ? x : g;
    exponents_[l] = exponent;
  });
  if (flow_.broken() >= 0) return RoundsStatus::kBroken;
  fault_ = select(counts);
  if (fault_ >= 0) return RoundsStatus::kNotFinite;
  current_ = 1 - current_;
  begun_ = true;
  for (size_t l = 0; l < layers; ++l) flow_.set_mask(static_cast<int64_t>(l), layers_[l].masks[current_]);
  return stop_empty && emptied() ? RoundsStatus::kEmptied : RoundsStatus::kDone;
}

// Fills the other masks. Returns the layer whose scores are NaN, else -1.
int64_t PathRounds::select(const std::vector<int64_t> &counts) {
  std::vector<ScoreSource> sources;
  std::vector<std::unique_ptr<PathScoreTiles>> tiles;
  int64_t mapped = 0;
  for (const RoundsLayer &layer : layers_) {
    const FlowStep &step = flow_.steps()[static_cast<size_t>(layer.step)];
    if (!vectors(step)) mapped += step.weight.numel;
  }
  const bool store = mapped <= kStored;
  scores_.resize(static_cast<size_t>(store ? mapped : 0));
  float *next = scores_.data();
  for (size_t l = 0; l < layers_.size(); ++l) {
    const FlowStep &step = flow_.steps()[static_cast<size_t>(layers_[l].step)];
    ScoreSource &source = sources.emplace_back();
    source.numel = step.weight.numel;
    source.bits = layers_[l].masks[1 - current_];
    source.exponent = exponents_[l];
    WeightView view = step.weight;
    view.power = power_;
    view.mask = begun_ ? layers_[l].masks[current_] : nullptr;
    if (vectors(step)) {
      source.data = view.data;
      source.type = static_cast<ScoreType>(view.type);
      source.a = x_[l];
      source.g = g_[l];
      source.columns = step.geometry.depth();
      source.power = power_;
      source.candidates = view.mask;
    } else if (store) {
      path_score(step.geometry, view, x_[l], g_[l], -1.0f, next);
      source.data = next;
      source.candidates = view.mask;
      next += source.numel;
    } else {
      tiles.push_back(std::make_unique<PathScoreTiles>(step.geometry, view, x_[l], g_[l]));
      source.tiles = tiles.back().get();
    }
  }
  std::vector<Ranking> rankings;
  const int64_t all = static_cast<int64_t>(sources.size());
  if (counts.size() == 1 && all != 1) {
    rankings.push_back({0, all, counts[0]});
  } else {
    for (int64_t l = 0; l < all; ++l) rankings.push_back({l, l + 1, counts[static_cast<size_t>(l)]});
  }
  return topk_mask(sources, rankings);
}

bool PathRounds::emptied() const {
  return std::any_of(layers_.begin(), layers_.end(), [&](const RoundsLayer &layer) {
    const int64_t numel = flow_.steps()[static_cast<size_t>(layer.step)].weight.numel;
    const uint8_t *bits = layer.masks[current_];
    return numel > 0 && std::all_of(bits, bits + (numel + 7) / 8, [](uint8_t byte) { return byte == 0; });
  });
}

}  // namespace paikern
