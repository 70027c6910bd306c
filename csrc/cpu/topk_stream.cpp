#include "topk_stream.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "path_plan.h"
#include "subnormals.h"
#include "topk_band.h"

namespace paikern {
namespace {

constexpr int kPositionBits = 44;
constexpr int64_t kPosition = (int64_t{1} << kPositionBits) - 1;
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
constexpr int64_t kPiece = 8192;  // scores of a tile at a time: candidates and their positions stay in L1 and L2
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// mantissa * 2**exponent, or what lies as far outside of the range of float.
double scaled(double mantissa, int64_t exponent) {
  return std::ldexp(mantissa, static_cast<int>(std::clamp<int64_t>(exponent, -400, 400)));
}

}  // namespace

// Adds the name of the source to candidates that know their position.
class TopkStream::Sink final : public SweepSink {
 public:
  Sink(TopkStream &stream, int64_t source) : stream_(stream), source_(source) {}
  void take(const float *scores, const int64_t *positions, int64_t count) override {
    stream_.keep(source_, scores, positions, count);
  }

 private:
  TopkStream &stream_;
  int64_t source_;
};

TopkStream::TopkStream(std::vector<Source> sources)
    : sources_(std::move(sources)), exponents_(new std::atomic<int64_t>[sources_.size()]) {
  if (sources_.size() > (size_t{1} << (63 - kPositionBits))) throw std::invalid_argument("too many sources");
  for (const Source &source : sources_) {
    if (source.numel > kPosition) throw std::invalid_argument("too many scores in a source");
    total_ += source.numel;
  }
  // As a selection has it: with more candidates it is cheaper to look for a narrower band first.
  room_ = std::min(total_, std::max<int64_t>(1 << 16, total_ >> 5));
}

TopkStream::~TopkStream() = default;

void TopkStream::release() {
  scores_.reset();
  places_.reset();
}

void TopkStream::begin(int64_t k, double low, double high) {
  k_ = k;
  const auto bound = [](double log2) -> Bound {
    if (std::isinf(log2)) return {log2 > 0 ? std::numeric_limits<double>::infinity() : 0.0, 0};
    const double whole = std::floor(log2);
    return {std::exp2(log2 - whole), static_cast<int64_t>(std::clamp(whole, -0x1p40, 0x1p40))};
  };
  if (!scores_) scores_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(room_));
  if (!places_) places_ = std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(room_));
  valid_ = low <= high;
  if (valid_) {
    low_ = bound(low);
    high_ = bound(high);
  }
  for (size_t s = 0; s < sources_.size(); ++s) exponents_[s] = 0;
  above_ = candidates_ = fed_ = 0;
  nan_ = kNone;
}

SweepBand TopkStream::band_of(int64_t exponent) const {
  if (!valid_) return {kInfinity, kInfinity};
  // The bounds are the same two real numbers for every source: a score lies between them exactly where it lies between
  // the outermost floats that do.
  const SubnormalsCount guard;
  return {rounded_up(scaled(low_.mantissa, low_.exponent - exponent)),
          rounded_down(scaled(high_.mantissa, high_.exponent - exponent))};
}

void TopkStream::feed(int64_t source, int64_t exponent, int64_t count) {
  exponents_[static_cast<size_t>(source)].store(exponent, std::memory_order_relaxed);
  fed_.fetch_add(count, std::memory_order_relaxed);
}

void TopkStream::sweep(int64_t source, int64_t exponent, const SweepLayer &layer, float *x) {
  Sink sink(*this, source);
  above_ += path_sweep(layer, band_of(exponent), sources_[static_cast<size_t>(source)].bits, x, sink);
  feed(source, exponent, layer.rows * layer.columns);
}

void TopkStream::tile(int64_t source, int64_t exponent, int64_t start, int64_t count, const float *scores) {
  const SubnormalsCount guard;
  const SweepBand limits = band_of(exponent);
  TopkBand<float> band{};
  band.low = limits.low;
  band.keep = limits.high == kInfinity ? std::numeric_limits<float>::quiet_NaN()
                                       : std::nextafter(limits.high + 0.0f, kInfinity);
  band.end = band.keep;
  const Scratch<float> values(kPiece + 64);
  const Scratch<uint16_t> at(kPiece + 64);
  const Scratch<int64_t> positions(kPiece);
  const TopkLoops<float> &loops = topk_loops<float>(topk_inner());
  uint8_t *bits = sources_[static_cast<size_t>(source)].bits;
  TopkCounts counts{0, 0, 0, false};
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t here = std::min(kPiece, count - done), first = start + done;
    TopkFound<float> found{values.get(), at.get(), 0, kPiece};
    loops.filter(scores + done, here, false, band, 0, bits + (first >> 3), &found, &counts);
    for (int64_t i = 0; i < found.count; ++i) positions.get()[i] = first + at.get()[i];
    keep(source, values.get(), positions.get(), found.count);
  }
  above_ += counts.above;
  feed(source, exponent, count);
}

void TopkStream::sparse(int64_t source, int64_t exponent, const uint8_t *mask) {
  const Source &all = sources_[static_cast<size_t>(source)];
  std::memcpy(all.bits, mask, static_cast<size_t>(divide_up(all.numel, 8)));
  feed(source, exponent, all.numel);
}

// Nearly all stay from one round to the next: bits are cleared, not set.
void TopkStream::sparse_row(int64_t source, int64_t exponent, int64_t base, const uint16_t *columns,
                            const float *scores, int64_t count) {
  constexpr int64_t kGroup = 16;
  const SubnormalsCount guard;
  const SweepBand limits = band_of(exponent);
  const FloatBuffer values(count);
  const Scratch<int64_t> positions(count);
  uint8_t *bits = sources_[static_cast<size_t>(source)].bits;
  int64_t found = 0, above = count;
  for (int64_t start = 0; start < count; start += kGroup) {
    const int64_t end = std::min(count, start + kGroup);
    int64_t group = 0;
    for (int64_t i = start; i < end; ++i) group += scores[i] > limits.high;
    if (group == end - start) continue;
    above -= end - start - group;
    for (int64_t i = start; i < end; ++i) {
      if (scores[i] > limits.high) continue;
      const int64_t at = base + columns[i];
      bits[at >> 3] = static_cast<uint8_t>(bits[at >> 3] & ~(1u << (at & 7)));
      if (scores[i] < limits.low) continue;
      values.get()[found] = scores[i];  // NaN too, which keep() reports
      positions.get()[found++] = at;
    }
  }
  above_.fetch_add(above, std::memory_order_relaxed);
  keep(source, values.get(), positions.get(), found);
}

void TopkStream::keep(int64_t source, const float *scores, const int64_t *positions, int64_t count) {
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) nan |= scores[i] != scores[i];
  if (nan) {
    int64_t first = nan_;
    while (source < first && !nan_.compare_exchange_weak(first, source)) {
    }
  }
  const int64_t at = candidates_.fetch_add(count, std::memory_order_relaxed);
  if (at + count > room_) return;  // finish() sees the count
  std::copy_n(scores, count, scores_.get() + at);
  for (int64_t i = 0; i < count; ++i) places_[static_cast<size_t>(at + i)] = source << kPositionBits | positions[i];
}

int64_t TopkStream::nan() const { return nan_ == kNone ? -1 : nan_.load(); }

bool TopkStream::finish() {
  const int64_t count = candidates_, need = k_ - above_;
  if (!valid_ || count > room_ || nan_ != kNone || fed_ != total_ || need <= 0 || need > count) return false;
  const SubnormalsCount guard;
  int64_t lowest = kNone, highest = -kNone;
  for (size_t s = 0; s < sources_.size(); ++s) {
    if (sources_[s].numel == 0) continue;
    lowest = std::min<int64_t>(lowest, exponents_[s]);
    highest = std::max<int64_t>(highest, exponents_[s]);
  }
  if (lowest == highest) {
    settle(scores_.get(), count, need);
    return true;
  }
  TopkBuffer<double> keys;
  double *const all = keys.reserve(count);
  const bool parallel = count > parallel_work() / 4;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i), source = static_cast<size_t>(places_[at] >> kPositionBits);
    all[i] = TopkKeys<float, true>::key(scores_[at], exponents_[source] - lowest);
  }
  settle(all, count, need);
  return true;
}

template <class Key>
void TopkStream::settle(const Key *keys, int64_t count, int64_t need) {
  TopkBuffer<Key> work;
  int64_t greater = 0, first = -1;
  const Key kth = nth_key(keys, count, need, &work, &greater);
  const auto set = [this](int64_t place, bool value) {
    const int64_t position = place & kPosition;
    uint8_t &byte = sources_[static_cast<size_t>(place >> kPositionBits)].bits[position >> 3];
    byte = static_cast<uint8_t>(byte | static_cast<unsigned>(value) << (position & 7));
  };
  std::vector<int64_t> tied;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = places_[static_cast<size_t>(i)];
    set(place, keys[i] > kth);  // no branch, which would be guessed wrong half the time
    if (keys[i] == kth) {
      first = i;
      tied.push_back(place);
    }
  }
  // Candidates lie as threads left them; the first in order stay.
  const int64_t stay = need - greater;
  std::nth_element(tied.begin(), tied.begin() + (stay - 1), tied.end());
  for (int64_t i = 0; i < stay; ++i) set(tied[static_cast<size_t>(i)], true);
  int power = 0;
  const double mantissa = std::frexp(static_cast<double>(scores_[static_cast<size_t>(first)]), &power);
  const int64_t exponent = exponents_[static_cast<size_t>(places_[static_cast<size_t>(first)] >> kPositionBits)];
  log2_kth_ = std::log2(mantissa) + static_cast<double>(power + exponent);
}

}  // namespace paikern
