// Walks in both directions, many at a time: while the weights that one walk needs are on their way from memory, the
// others go on.
#include "phew.h"

#include <algorithm>

#include "phew_kernels.h"
#include "philox.h"

namespace paikern {
namespace {

constexpr int64_t kTogether = 16;  // walks of a thread that take turns; alone a walk takes half as long again
enum NodeKind : int64_t { kInput, kWeightNode, kJoint, kOutput };

struct Node {
  int64_t kind, weight, first_unit, units, links_begin, links_end, slots_begin, slots_end;
};

// One of `count` choices; `word` keeps what is left of the randomness.
inline int64_t choose(uint32_t &word, int64_t count) {
  const uint64_t product = uint64_t{word} * static_cast<uint64_t>(count);
  word = static_cast<uint32_t>(product);
  return static_cast<int64_t>(product >> 32);
}

inline double unit_interval(uint32_t high, uint32_t low) {
  return static_cast<double>((uint64_t{high} << 21) | (low >> 11)) * 0x1p-53;
}

// Where a draw is made: `length` kernels, `stride` kernels apart, the first of them `first`, in blocks of `most`.
struct Aim {
  const float *table;  // cumulated shares of the blocks
  int64_t blocks, most, length, first, stride;
  double u;

  int64_t expected_block() const { return static_cast<int64_t>(u * static_cast<double>(blocks)); }
};

// The block that it ends in: `size` kernels, the first of them `first`.
struct Block {
  int64_t first, stride, size;
  double at;  // in [0, 1) of the block's share
};

// The first entry of an ascending table above u; -1 where there is none, the table being zero. Shares are alike in most
// weights: the search starts where the entry would be if they were equal, in a line of memory that was asked for.
int64_t first_above(const Aim &aim) {
  const auto above = [&](int64_t at) { return static_cast<double>(aim.table[at]) > aim.u; };
  int64_t low = 0, high = aim.expected_block();
  if (above(high)) {
    for (int64_t step = 1; high > 0; step *= 2) {
      const int64_t at = std::max<int64_t>(0, high - step);
      if (!above(at)) {
        low = at + 1;
        break;
      }
      high = at;
    }
  } else {
    for (int64_t step = 1;; step *= 2) {
      low = high + 1;
      if (low == aim.blocks) return -1;
      high = std::min(aim.blocks - 1, high + step);
      if (above(high)) break;
    }
  }
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (above(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

struct Walk {
  int64_t node, unit, hop, length;
  std::array<uint32_t, 4> words;
  Aim aim;
  Block block;
  int64_t slot;  // the slot by which a weight was entered
  int64_t *out;
  bool forwards, over;
};

class Walker {
 public:
  Walker(const std::vector<WalkWeight> &weights, const float *tables, const WalkGraph &graph, uint64_t seed,
         int64_t width, int weighting, bool whole)
      : weights_(weights),
        tables_(tables),
        graph_(graph),
        nodes_(reinterpret_cast<const Node *>(graph.nodes)),
        seed_(seed),
        width_(width),
        weighting_(weighting),
        whole_(whole) {}

  void run(int64_t first, int64_t count, int64_t *out) const {
    Walk walks[kTogether] = {};
    for (int64_t j = 0; j < count; ++j) start(walks[j], first + j, out + j * width_);
    for (bool going = true; going;) {
      going = false;
      for (int64_t j = 0; j < count; ++j) {
        if (!walks[j].over) to_weight(walks[j], first + j);
      }
      for (int64_t j = 0; j < count; ++j) {
        if (!walks[j].over) find_block(walks[j]);
      }
      for (int64_t j = 0; j < count; ++j) {
        if (!walks[j].over) {
          through_weight(walks[j]);
          going = true;
        }
      }
    }
  }

 private:
  void start(Walk &walk, int64_t number, int64_t *out) const {
    walk = {};
    walk.out = out;
    walk.forwards = number % 2 == 0;
    const int64_t turn = number / 2;
    if (walk.forwards) {
      stand_on(walk, graph_.starts[turn % graph_.inputs]);
    } else {
      walk.node = graph_.output_node;
      walk.unit = turn % graph_.outputs;
    }
  }

  void stand_on(Walk &walk, int64_t unit) const {
    walk.node = graph_.owner[unit];
    walk.unit = unit - nodes_[walk.node].first_unit;
  }

  // Past steps without weights, up to the next draw or to the end.
  void to_weight(Walk &walk, int64_t number) const {
    for (;;) {
      const Node &node = nodes_[walk.node];
      if (node.kind == (walk.forwards ? kOutput : kInput)) return finish(walk);
      const auto low = static_cast<uint32_t>(number), high = static_cast<uint32_t>(number >> 32);
      walk.words = philox({low, high, static_cast<uint32_t>(walk.hop++), 0u}, seed_);
      if (!walk.forwards && node.kind == kWeightNode) {
        walk.slot = node.slots_begin;
        return take_aim(walk, weights_[node.weight]);
      }
      if (!(walk.forwards ? go_on(walk, node) : go_back(walk, node))) return discard(walk);
      if (walk.forwards && nodes_[walk.node].kind == kWeightNode) {
        return take_aim(walk, weights_[nodes_[walk.node].weight]);
      }
    }
  }

  // From a unit to one that it meets in one of the slots that take it; false where none does.
  bool go_on(Walk &walk, const Node &node) const {
    const int64_t *links = graph_.links;
    int64_t taking = 0;
    for (int64_t l = node.links_begin; l < node.links_end; ++l) taking += !empty(links[2 * l + 1], walk.unit);
    if (taking == 0) return false;
    int64_t chosen = choose(walk.words[3], taking), l = node.links_begin;
    for (;; ++l) {
      if (!empty(links[2 * l + 1], walk.unit) && chosen-- == 0) break;
    }
    walk.unit = one_of(links[2 * l + 1], walk.unit, walk.words[3]);
    walk.node = graph_.slots[2 * links[2 * l]];
    return true;
  }

  // From a unit of a joint to one that it is met by in one of the joint's slots.
  bool go_back(Walk &walk, const Node &node) const {
    int64_t giving = 0;
    for (int64_t s = node.slots_begin; s < node.slots_end; ++s) giving += !empty(graph_.slots[2 * s + 1], walk.unit);
    if (giving == 0) return false;
    int64_t chosen = choose(walk.words[3], giving), s = node.slots_begin;
    for (;; ++s) {
      if (!empty(graph_.slots[2 * s + 1], walk.unit) && chosen-- == 0) break;
    }
    stand_on(walk, one_of(graph_.slots[2 * s + 1], walk.unit, walk.words[3]));
    return true;
  }

  bool empty(int64_t list, int64_t unit) const { return graph_.index[list + unit] == graph_.index[list + unit + 1]; }

  int64_t one_of(int64_t list, int64_t unit, uint32_t &word) const {
    const int64_t begin = graph_.index[list + unit], count = graph_.index[list + unit + 1] - begin;
    return graph_.index[begin + choose(word, count)];
  }

  // The walk stands before a weight by `unit`: an input unit forwards, an output unit backwards.
  void take_aim(Walk &walk, const WalkWeight &weight) const {
    Aim &aim = walk.aim;
    aim.u = unit_interval(walk.words[0], walk.words[1]);
    if (walk.forwards == weight.transposed) {  // along a row
      aim = {nullptr, weight.row_blocks(), weight.row_block(), weight.cols, walk.unit * weight.cols, 1, aim.u};
      aim.table = tables_ + weight.by_row + walk.unit * aim.blocks;
    } else {
      const int64_t length = weight.group_rows(), group = walk.unit / weight.cols;
      const int64_t first = group * length * weight.cols + walk.unit % weight.cols;
      aim = {nullptr, weight.col_blocks(), weight.col_block(), length, first, weight.cols, aim.u};
      aim.table = tables_ + weight.by_col + walk.unit * aim.blocks;
    }
    __builtin_prefetch(aim.table + aim.expected_block());
  }

  void find_block(Walk &walk) const {
    const Aim &aim = walk.aim;
    Block &block = walk.block;
    const int64_t found = first_above(aim);
    int64_t begin;
    if (found < 0) {
      begin = static_cast<int64_t>(aim.u * static_cast<double>(aim.length));
      block.size = 1;
    } else {
      const double below = found == 0 ? 0.0 : static_cast<double>(aim.table[found - 1]);
      block.at = (aim.u - below) / (static_cast<double>(aim.table[found]) - below);
      begin = found * aim.most;
      block.size = std::min(aim.most, aim.length - begin);
    }
    block.stride = aim.stride;
    block.first = aim.first + begin * aim.stride;
    fetch(weights_[nodes_[walk.node].weight], block);
  }

  static void fetch(const WalkWeight &weight, const Block &block) {
    static constexpr int64_t kSizes[] = {4, 2, 2, 8};
    const int64_t element = kSizes[weight.type] * weight.taps;
    const char *data = static_cast<const char *>(weight.data) + block.first * element;
    const int64_t apart = block.stride * element;
    if (block.stride == 1) {
      for (int64_t at = 0; at < block.size * element; at += 64) __builtin_prefetch(data + at);
      __builtin_prefetch(data + block.size * element - 1);
      return;
    }
    for (int64_t j = 0; j < block.size; ++j) __builtin_prefetch(data + j * apart);
  }

  void through_weight(Walk &walk) const {
    const Node &node = nodes_[walk.node];
    const WalkWeight &weight = weights_[node.weight];
    int64_t chosen = 0, tap = 0;
    with_type(weight, weighting_, [&](auto *data, auto kind) {
      constexpr int kWeighting = decltype(kind)::value;
      chosen = drawn_kernel<kWeighting>(weight, data, walk.block);
      const auto *kernel = data + (walk.block.first + chosen * walk.block.stride) * weight.taps;
      if (weight.taps > 1 && !whole_) tap = drawn_tap<kWeighting == 1>(kernel, weight.taps, walk.words[2]);
    });
    const int64_t kernel = walk.block.first + chosen * walk.block.stride;
    if (weight.base >= 0) {
      if (whole_) {
        for (int64_t t = 0; t < weight.taps; ++t) walk.out[walk.length++] = weight.base + kernel * weight.taps + t;
      } else {
        walk.out[walk.length++] = weight.base + kernel * weight.taps + tap;
      }
    }
    const int64_t row = kernel / weight.cols, col = row / weight.group_rows() * weight.cols + kernel % weight.cols;
    if (walk.forwards) {
      walk.unit = weight.transposed ? col : row;
      return;
    }
    const int64_t unit = weight.transposed ? row : col, list = graph_.slots[2 * walk.slot + 1];
    if (empty(list, unit)) return discard(walk);
    stand_on(walk, one_of(list, unit, walk.words[3]));
  }

  template <int kWeighting, class T>
  static int64_t drawn_kernel(const WalkWeight &weight, const T *data, const Block &block) {
    if (block.size == 1) return 0;
    double upto[kLargestBlock], sum = 0.0;
    const T *kernel = data + block.first * weight.taps;
    for (int64_t j = 0; j < block.size; ++j, kernel += block.stride * weight.taps) {
      upto[j] = sum += kernel_share<kWeighting>(kernel, weight.taps);
    }
    return drawn(upto, block.size, block.at * sum);
  }

  template <bool kSquare, class T>
  static int64_t drawn_tap(const T *kernel, int64_t taps, uint32_t word) {
    const double u = static_cast<double>(word) * 0x1p-32;
    double sum = 0.0;
    for (int64_t t = 0; t < taps; ++t) sum += magnitude<kSquare>(kernel[t]);
    if (!(sum > 0.0)) return static_cast<int64_t>(u * static_cast<double>(taps));
    const double aim = u * sum;
    double upto = 0.0;
    int64_t last = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const double before = upto;
      upto += magnitude<kSquare>(kernel[t]);
      if (upto > aim) return t;
      if (upto > before) last = t;
    }
    return last;
  }

  // The first of ascending sums above `aim`; where rounding leaves none, the first that reaches the last.
  static int64_t drawn(const double *upto, int64_t size, double aim) {
    int64_t at = 0;
    for (int64_t j = 0; j < size; ++j) at += upto[j] <= aim;
    if (at < size) return at;
    at = 0;
    while (upto[at] < upto[size - 1]) ++at;
    return at;
  }

  void finish(Walk &walk) const {
    std::fill(walk.out + walk.length, walk.out + width_, int64_t{-1});
    walk.over = true;
  }

  void discard(Walk &walk) const {
    walk.length = 0;
    finish(walk);
  }

  const std::vector<WalkWeight> &weights_;
  const float *tables_;
  const WalkGraph &graph_;
  const Node *nodes_;
  uint64_t seed_;
  int64_t width_;
  int weighting_;
  bool whole_;
};

}  // namespace

void phew_walks(const std::vector<WalkWeight> &weights, const float *tables, const WalkGraph &graph, uint64_t seed,
                int64_t first, int64_t count, int64_t width, int weighting, bool whole, int64_t *out) {
  const Walker walker(weights, tables, graph, seed, width, weighting, whole);
  const int64_t groups = (count + kTogether - 1) / kTogether;
#pragma omp parallel for schedule(dynamic, 4) if (groups > 1)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = g * kTogether;
    walker.run(first + at, std::min(kTogether, count - at), out + at * width);
  }
}

void phew_keep(uint8_t *bits, WalkState &state, const int64_t *walks, int64_t count, int64_t width, int64_t target,
               int64_t stall, bool exact) {
  constexpr int64_t kWindow = 1000;
  std::vector<int64_t> fresh;
  if (state.kept >= target) state.status = kFull;
  for (int64_t w = 0; w < count && state.status == kWalking; ++w) {
    const int64_t *walk = walks + w * width;
    fresh.clear();
    for (int64_t j = 0; j < width && walk[j] >= 0; ++j) {
      uint8_t &byte = bits[walk[j] >> 3];
      const auto bit = static_cast<uint8_t>(1u << (walk[j] & 7));
      if (!(byte & bit)) fresh.push_back(walk[j]);
      byte |= bit;
    }
    auto gained = static_cast<int64_t>(fresh.size());
    if (exact && gained > target - state.kept) {
      for (const int64_t bit : fresh) bits[bit >> 3] &= static_cast<uint8_t>(~(1u << (bit & 7)));
      gained = 0;
      ++state.skipped;
      ++state.window_skipped;
    }
    state.kept += gained;
    state.window_new += gained;
    ++state.walks;
    if (state.kept >= target) {
      state.status = kFull;
    } else if (state.walks % kWindow == 0) {
      if (state.window_new < stall) state.status = state.window_skipped > 0 ? kTooLong : kStalled;
      state.window_new = state.window_skipped = 0;
    }
  }
}

}  // namespace paikern
