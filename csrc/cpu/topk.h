// Exact selection of the k largest scores over many tensors, as one bit a weight.
#pragma once

#include <cstdint>
#include <vector>

namespace paikern {

enum class ScoreType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Dimensions of a tensor that is not contiguous, outermost first; strides count elements and may be 0.
struct ScoreLayout {
  std::vector<int64_t> sizes, strides;
};

// Without dimensions of one element, and with neighbours joined where they run on: as few as the tensor needs.
ScoreLayout coalesce(const std::vector<int64_t> &sizes, const std::vector<int64_t> &strides);

// Scores that are computed where they are needed, in pieces of up to 2**16.
class ScoreTiles {
 public:
  virtual ~ScoreTiles() = default;
  // Scores [start, start + count), the same bits whenever the same piece is asked for. Called from several threads.
  virtual void fill(int64_t start, int64_t count, float *out) const = 0;
  // About the same, for a few.
  virtual void sample(int64_t start, int64_t count, float *out) const = 0;
};

// Scores of one tensor, numbered row-major. Set fields beyond the first three for
//   factored scores: `data` is the weight [rows, columns], the score ((|w|**power) * a[column]) * g[row] in float;
//   product scores: |data * other| in float, `other` laid out and typed as it says;
//   tiles: `data` is not used.
// Bits of `candidates` that are 0 rank below everything.
struct ScoreSource {
  const void *data = nullptr;
  ScoreType type = ScoreType::kFloat32;
  int64_t numel = 0;
  uint8_t *bits = nullptr;  // ceil(numel / 8) bytes, written whole
  bool absolute = false;    // |score|
  int64_t exponent = 0;     // values count as value * 2**exponent; then they must be >= 0 or "below everything"
  const ScoreLayout *layout = nullptr;
  const float *a = nullptr, *g = nullptr;
  int64_t columns = 0;
  int power = 1;
  const void *other = nullptr;
  ScoreType other_type = ScoreType::kFloat32;
  const ScoreLayout *other_layout = nullptr;
  const ScoreTiles *tiles = nullptr;
  const uint8_t *candidates = nullptr;
  int64_t origin = 0;  // position of data[0] and other[0]: not 0 in a piece that the selection has copied
};

// One ranking: keep k of sources[first .. last).
struct Ranking {
  int64_t first, last, k;
  // Where the k-th score was last time and how far it had moved (NaN: not known): the place to look for it first. The
  // result is the same without. Not used where exponents differ.
  double *memory = nullptr;
  // Receives log2 of the k-th score where sources have exponents and it is positive and finite; NaN otherwise.
  double *log2_kth = nullptr;
};

// Fills the bits of all sources. Returns the index of the first source that holds NaN, else -1 (bits mean nothing
// then). Order: score descending, then source index, then position ascending; -0 equals +0; infinities by value.
int64_t topk_mask(const std::vector<ScoreSource> &sources, const std::vector<Ranking> &rankings);

// The k-th largest value (1-based, k <= total), exponents must be 0. `nan` receives the index as above.
double kth_largest(const std::vector<ScoreSource> &sources, int64_t k, int64_t *nan);

}  // namespace paikern
