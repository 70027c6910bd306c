#include "path_rounds.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "path_few.h"
#include "path_score_tiles.h"
#include "topk.h"

namespace paikern {
namespace {

// Up to here a selection that samples has the scores of all maps stored first: it looks at them several times (sample,
// band, and histograms where kernels of one score mislead the sample). 4 MB.
constexpr int64_t kStored = int64_t{1} << 20;

// Scores a thread makes at a time for the stream: 2 MB, columns of a layer are laid out once for each.
constexpr int64_t kLeastPiece = int64_t{1} << 15, kPiece = int64_t{1} << 19;

// Lists may take so much of what the weights take.
constexpr double kCompactShare = 0.09;

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

int64_t weight_bytes(WeightType type) { return type == WeightType::kFloat32 ? 4 : 2; }

bool vectors(const FlowStep &step) { return step.geometry.linear() && step.geometry.batch == 1; }

}  // namespace

void KthForecast::predict(int64_t k, int64_t total, int64_t room, double *low, double *high) {
  const double kept = static_cast<double>(k), pruned = static_cast<double>(total - k);
  odds_ = std::log2(std::max(pruned, 0.5) / std::max(kept, 0.5));
  if (points_ == 0) {
    *low = *high = NAN;
    return;
  }
  int best = 0;
  // One point and the odds, near the ends of a distribution; then Lagrange's polynomial through the last two and three.
  guesses_[0] = log2_[0] + odds_ - at_[0];
  for (int n = 1; n < points_; ++n) {
    double value = 0.0;
    for (int i = 0; i <= n; ++i) {
      double term = log2_[i];
      for (int j = 0; j <= n; ++j) {
        if (j != i) term *= (odds_ - at_[j]) / (at_[i] - at_[j]);
      }
      value += term;
    }
    guesses_[n] = value;
    if (errors_[n] < errors_[best]) best = n;  // never where it is NaN
  }
  const double guess = guesses_[best], last = reach_;
  reach_ = std::isnan(errors_[best]) ? kFirst : 5.0 * errors_[best];
  if (!std::isnan(per_log2_)) {
    // Some thousand candidates more cost microseconds, a band that misses a third read; so do more than there is room
    // for, and there were fewer a round ago.
    const double few = 2048.0 + static_cast<double>(total) / 2048.0, most = static_cast<double>(room) / 2.0;
    reach_ = std::min(std::max(reach_, std::min(few / (2.0 * per_log2_), 4.0 * last)), most / (2.0 * per_log2_));
  }
  reach_ = std::max(reach_, kLeast);
  *low = guess - reach_;
  *high = guess + reach_;
}

void KthForecast::observe(double log2_kth, int64_t candidates) {
  if (!std::isfinite(log2_kth)) {  // nothing to go by
    *this = KthForecast();
    return;
  }
  if (candidates >= 0) per_log2_ = static_cast<double>(std::max<int64_t>(candidates, 1)) / (2.0 * reach_);
  for (int n = 0; n < points_; ++n) {  // the worst of late, which fades
    const double error = std::abs(log2_kth - guesses_[n]);
    errors_[n] = std::isnan(errors_[n]) ? error : std::max(error, 0.85 * errors_[n]);
  }
  if (points_ > 0 && odds_ == at_[0]) points_ = 0;  // the same k again
  for (int i = std::min(points_, kPoints - 1); i > 0; --i) {
    at_[i] = at_[i - 1];
    log2_[i] = log2_[i - 1];
  }
  at_[0] = odds_;
  log2_[0] = log2_kth;
  points_ = std::min(points_ + 1, kPoints);
}

PathRounds::PathRounds(PathFlow &flow, std::vector<RoundsLayer> layers, int power)
    : flow_(flow),
      layers_(std::move(layers)),
      power_(power),
      maps_(layers_.size()),
      compact_(layers_.size()),
      memory_(2 * layers_.size(), NAN) {
  for (size_t l = 0; l < layers_.size(); ++l) {
    total_ += step(l).weight.numel;
    if (!vectors(step(l))) mapped_ += step(l).weight.numel;
  }
}

PathRounds::~PathRounds() {
  for (size_t l = 0; l < layers_.size(); ++l) step(l).compact = nullptr;
}

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
  probe_team();
  *log_flow = flow_.forward();
  if (std::isfinite(*log_flow)) return RoundsStatus::kDone;
  return flow_.broken() >= 0 ? RoundsStatus::kBroken : RoundsStatus::kDead;
}

RoundsStatus PathRounds::finish(const std::vector<int64_t> &counts, bool stop_empty) {
  TopkStream *stream = nullptr;
  const bool global = counts.size() == 1 && layers_.size() > 1;
  double low = NAN, high = NAN;
  if (global && !stream_) {
    std::vector<TopkStream::Source> sources;
    for (size_t l = 0; l < layers_.size(); ++l) sources.push_back({step(l).weight.numel, nullptr});
    stream_ = std::make_unique<TopkStream>(std::move(sources));
  }
  if (global) forecast_.predict(counts[0], total_, stream_->room(), &low, &high);
  if (!std::isnan(low)) {
    stream = stream_.get();
    for (size_t l = 0; l < layers_.size(); ++l)
      stream->set_bits(static_cast<int64_t>(l), layers_[l].masks[1 - current_]);
    stream->begin(counts[0], low, high);
  }
  const int64_t layers = static_cast<int64_t>(layers_.size());
  flow_.backward([&](FlowStep &step, const float *x, const float *g, int64_t exponent, const FlowValue &, float *gx) {
    if (step.parameter < 0 || step.parameter >= layers) return false;
    const size_t l = static_cast<size_t>(step.parameter);
    // Transposed: the stored rows are the inputs.
    maps_[l] = {step.transposed ? g : x, step.transposed ? x : g, exponent};
    return stream && stream_layer(l, gx);
  });
  if (flow_.broken() >= 0) return RoundsStatus::kBroken;
  if (stream && stream->finish()) {
    forecast_.observe(stream->log2_kth(), stream->candidates());
    ++streamed_;
  } else {
    if (stream) stream->release();
    fault_ = select(counts, stream ? stream->candidates() : -1);
    if (fault_ >= 0) return RoundsStatus::kNotFinite;
  }
  current_ = 1 - current_;
  begun_ = true;
  for (size_t l = 0; l < layers_.size(); ++l) flow_.set_mask(static_cast<int64_t>(l), layers_[l].masks[current_]);
  compact();
  return stop_empty && emptied() ? RoundsStatus::kEmptied : RoundsStatus::kDone;
}

// The weight as the score sees it.
WeightView PathRounds::view(size_t layer) {
  WeightView w = step(layer).weight;
  w.power = power_;
  w.mask = begun_ ? layers_[layer].masks[current_] : nullptr;
  w.density = w.mask == step(layer).weight.mask ? step(layer).weight.density : -1.0;
  return w;
}

// Feeds the scores of a layer; true if the adjoint came with them.
bool PathRounds::stream_layer(size_t layer, float *gx) {
  TopkStream &stream = *stream_;
  const FlowStep &step = this->step(layer);
  const Maps &maps = maps_[layer];
  const int64_t source = static_cast<int64_t>(layer), numel = step.weight.numel;
  if (vectors(step)) {
    const bool adjoint = gx && !step.transposed && step.weight.power == power_;
    stream.sweep(source, maps.exponent,
                 {view(layer), step.geometry.rows, step.geometry.depth(), maps.columns, maps.rows},
                 adjoint ? gx : nullptr);
    return adjoint;
  }
  if (step.compact) {
    const int64_t depth = step.geometry.depth();
    stream.sparse(source, maps.exponent, step.weight.mask);
    step.compact->scores(maps.columns, maps.rows,
                         [&](int64_t row, const uint16_t *columns, const float *scores, int64_t count) {
                           stream.sparse_row(source, maps.exponent, row * depth, columns, scores, count);
                         });
    return false;
  }
  // Pruned weights come with the score 0 there.
  const bool few = !step.transposed && step.weight.power == power_ && stream.above_zero(maps.exponent) &&
                   few_positions(step.geometry, step.weight, mask_density(step.weight));
  if (few) {
    const int64_t depth = step.geometry.depth();
    few_backward(step.geometry, step.weight, maps.columns, maps.rows, gx,
                 [&](int64_t row, int64_t rows, const float *scores) {
                   stream.tile(source, maps.exponent, row * depth, rows * depth, scores);
                 });
    return true;
  }
  if (numel <= kLeastPiece) {
    const FloatBuffer scores(numel);
    path_score(step.geometry, view(layer), maps.columns, maps.rows, kExcluded, scores.get());
    stream.tile(source, maps.exponent, 0, numel, scores.get());
    return false;
  }
  const PathScoreTiles tiles(step.geometry, view(layer), maps.columns, maps.rows);
  const int64_t threads = omp_get_max_threads();
  const int64_t most = std::clamp(numel / (2 * threads), kLeastPiece, kPiece);
  const int64_t pieces = round_up(divide_up(numel, most), threads), piece = round_up(divide_up(numel, pieces), 8);
#pragma omp parallel for schedule(dynamic)
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t start = p * piece, count = std::min(piece, numel - start);
    if (count <= 0) continue;
    const FloatBuffer scores(count);
    tiles.fill(start, count, scores.get());
    stream.tile(source, maps.exponent, start, count, scores.get());
  }
  return false;
}

// Fills the other masks from the maps of all layers. Returns the layer whose scores are NaN, else -1.
int64_t PathRounds::select(const std::vector<int64_t> &counts, int64_t candidates) {
  const bool global = counts.size() == 1 && layers_.size() > 1, store = mapped_ <= kStored;
  std::vector<ScoreSource> sources;
  std::vector<std::unique_ptr<PathScoreTiles>> tiles;
  scores_.resize(static_cast<size_t>(store ? mapped_ : 0));
  float *next = scores_.data();
  for (size_t l = 0; l < layers_.size(); ++l) {
    const FlowStep &step = this->step(l);
    const WeightView w = view(l);
    const Maps &maps = maps_[l];
    ScoreSource &source = sources.emplace_back();
    source.numel = w.numel;
    source.bits = layers_[l].masks[1 - current_];
    source.exponent = global ? maps.exponent : 0;  // a layer by itself needs none
    if (vectors(step)) {
      source.data = w.data;
      source.type = static_cast<ScoreType>(w.type);
      source.a = maps.columns;
      source.g = maps.rows;
      source.columns = step.geometry.depth();
      source.power = power_;
      source.candidates = w.mask;
    } else if (store) {
      path_score(step.geometry, w, maps.columns, maps.rows, -1.0f, next);
      source.data = next;
      source.candidates = w.mask;
      next += source.numel;
    } else {
      tiles.push_back(std::make_unique<PathScoreTiles>(step.geometry, w, maps.columns, maps.rows));
      source.tiles = tiles.back().get();
    }
  }
  double log2_kth = NAN;
  std::vector<Ranking> rankings;
  const int64_t all = static_cast<int64_t>(sources.size());
  if (global) {
    rankings.push_back({0, all, counts[0], nullptr, &log2_kth});
  } else {
    for (int64_t l = 0; l < all; ++l) {
      rankings.push_back({l, l + 1, counts[static_cast<size_t>(l)], memory_.data() + 2 * l});
    }
  }
  const int64_t nan = topk_mask(sources, rankings);
  if (global) forecast_.observe(log2_kth, candidates);
  return nan;
}

// Keeps the lists of thin layers up to date, and makes those of more as long as there is room for them.
void PathRounds::compact() {
  int64_t room = 0;
  for (size_t l = 0; l < layers_.size(); ++l) room += step(l).weight.numel * weight_bytes(step(l).weight.type);
  room = static_cast<int64_t>(kCompactShare * static_cast<double>(room));
  for (size_t l = 0; l < layers_.size(); ++l) {
    if (!compact_[l]) continue;
    compact_[l]->filter(layers_[l].masks[current_]);
    room -= compact_[l]->bytes();
  }
  for (size_t l = 0; l < layers_.size(); ++l) {
    FlowStep &step = this->step(l);
    if (compact_[l] || step.weight.power != power_) continue;
    WeightView w = view(l);
    w.mask = layers_[l].masks[current_];
    w.density = -1.0;
    const double density = mask_density(w);
    const int64_t bytes = CompactLayer::bytes(static_cast<int64_t>(density * static_cast<double>(w.numel) + 1.0));
    if (bytes > room || !CompactLayer::pays(step.geometry, w, density)) continue;
    compact_[l] = std::make_unique<CompactLayer>(step.geometry, w);
    step.compact = compact_[l].get();
    room -= bytes;
  }
}

bool PathRounds::emptied() {
  for (size_t l = 0; l < layers_.size(); ++l) {
    const uint8_t *bits = layers_[l].masks[current_];
    const int64_t bytes = divide_up(step(l).weight.numel, 8);
    if (bytes > 0 && std::all_of(bits, bits + bytes, [](uint8_t byte) { return byte == 0; })) return true;
  }
  return false;
}

}  // namespace paikern
