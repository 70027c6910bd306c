// How a map is laid out so that every tap of a convolution is one shift of a flat plane.
//
// A stride s splits a map into its s phases (x[r], x[r + s], ...); rows of a plane are followed by enough zeros that a
// shift past an edge lands in them, the zeros right of one row serving as those left of the next. Then
//   z[q] = sum over (channel, tap) of V * plane(channel, phase of tap)[q + shift of tap]
// for flat positions q: no im2col, no copy of a pixel per tap, and the same sum order at every position. A map of n
// floats needs about n floats of planes. Positions q between the rows compute values that nobody reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

#include "path.h"

namespace paikern {

// Work (floats or vector multiply-adds) below which one thread does it: 2**20, 0.1 to 0.2 ms. Smaller regions gain
// little, and where other processes hold a core each one waits for it: a DPaI run of ResNet-20 took 30 s, not 1.2.
// While probe_team() finds that the threads answer at once, 2**16 (VGG-16, 100 rounds of SynFlow: 1.24 to 1.16 s).
int64_t parallel_work();

// Times a few empty regions: for a run of many sweeps, now and then.
void probe_team();

// Uninitialised memory on a cache line, kept by the thread for its next call: fresh pages cost more than the kernels of
// a small layer (0.25 us each 4 KB, more in a virtual machine).
void *take_scratch(size_t bytes, size_t &capacity);
void give_scratch(void *block, size_t capacity);

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T *>(take_scratch(static_cast<size_t>(count) * sizeof(T) + 64, capacity_))) {}
  Scratch(Scratch &&other) noexcept { swap(other); }
  Scratch &operator=(Scratch &&other) noexcept {
    swap(other);
    return *this;
  }
  ~Scratch() {
    if (data_) give_scratch(data_, capacity_);
  }
  T *get() const { return data_; }
  int64_t size() const { return static_cast<int64_t>(capacity_ / sizeof(T)); }

 private:
  void swap(Scratch &other) noexcept {
    std::swap(capacity_, other.capacity_);
    std::swap(data_, other.data_);
  }

  size_t capacity_ = 0;
  T *data_ = nullptr;
};

using FloatBuffer = Scratch<float>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// One position of the kernel.
struct Tap {
  int64_t index;  // position within the kernel, row-major
  int64_t phase;  // which plane of a channel it reads
  int64_t shift;  // flat shift of that plane
};

// Flat positions (image, d, h, w) with the pitches of one layout.
struct Lattice {
  int64_t pitch[3];   // extents of d, h and w, zeros included
  int64_t positions;  // flat positions to compute, from the first valid one to the last
  int64_t lead;       // zeros before position 0
  int64_t span;       // floats a plane, zeros and slack for whole tiles included

  int64_t image() const { return pitch[0] * pitch[1] * pitch[2]; }
  int64_t flat(int64_t n, int64_t d, int64_t h, int64_t w) const {
    return ((n * pitch[0] + d) * pitch[1] + h) * pitch[2] + w;
  }
};

// Which pixels of a map a plane or a block of positions stands for: pixel = first + step * position, per axis.
struct Grid {
  int64_t count[3], first[3], step[3], size[3];
};

struct ForwardPlan {
  Lattice lattice;
  std::vector<Grid> planes;  // one a phase that some tap reads
  std::vector<Tap> taps;     // every tap, in kernel order
};

// The adjoint writes each phase of the column map from the taps that reach it.
struct BackwardPhase {
  Grid grid;
  std::vector<Tap> taps;  // phase is 0: the row map has one plane a channel
};

struct BackwardPlan {
  Lattice lattice;
  std::vector<BackwardPhase> phases;
};

ForwardPlan plan_forward(const PathGeometry &geometry, int64_t batch);
BackwardPlan plan_backward(const PathGeometry &geometry, int64_t batch);

// The whole map as one grid.
Grid whole_grid(const int64_t (&size)[3]);

// planes [channels, grids, span] <- map [batch, channels, *size], everything else 0.
void fill_planes(const Lattice &lattice, const std::vector<Grid> &grids, int64_t batch, int64_t channels,
                 const float *map, float *planes);

// map[n, :, grid] <- rows of flat positions first .. first + width; map points at the first of `rows` channels.
void write_positions(const Lattice &lattice, const Grid &grid, int64_t batch, int64_t channels, int64_t first,
                     int64_t width, int64_t rows, const float *block, int64_t ld, float *map);

// The density below which scores are made for kept weights alone, by number of positions. Measured on AVX-512.
inline double kept_density(int64_t positions) {
  return 0.08 + 0.3 * std::min(1.0, static_cast<double>(positions) / 256);
}

// [positions of one image][taps]: the pixel that a tap reads there, pixels() where it lies outside of the map.
std::vector<int32_t> pixel_table(const PathGeometry &geometry);

// Asks for weights start .. start + count ahead of their use, where rows are visited in pieces of 768 or 1024 bytes:
// too short for the hardware to see the next one coming.
inline void prefetch_weights(const WeightView &w, int64_t start, int64_t count) {
  if (w.power == 0) return;
  const int64_t size = w.type == WeightType::kFloat32 ? 4 : 2;
  const char *data = static_cast<const char *>(w.data);
  const int64_t end = std::min(start + count, w.numel) * size;
  for (int64_t byte = start * size; byte < end; byte += 64) __builtin_prefetch(data + byte, 0, 2);
}

// Fraction of weights kept, counted over the whole mask.
double mask_density(const WeightView &w);

}  // namespace paikern
