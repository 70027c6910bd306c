// How the outputs of a convolution are cut into pieces that suit the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "masked_conv_kernels.h"

namespace paikern {

// What all rows of V do in turn while its window of the planes stays in L2.
struct ConvChunk {
  std::size_t tile, tiles;
};

// Rows of outputs that are written out at once: one chunk of a single row would fill a cache line of an image here and
// there, which took longer than the products of 64 channels of 56 x 56 at density 0.01.
struct ConvBand {
  int64_t first, rows;
  std::size_t chunk, chunks;
};

struct ConvCut {
  std::vector<ConvBand> bands;
  std::vector<ConvChunk> chunks;
  std::vector<ConvTile> tiles;
  bool compact;  // rows of outputs come without gaps, each of whole vectors or cut off by the next
  int64_t room;  // floats of a row of V in one band
};

// Outputs `high` x `wide` on a lattice whose rows are `pitch` pixels of `images` floats apart. All channels together
// read `reads` floats for a row of outputs, and `halo` times that beside it.
ConvCut cut_outputs(int64_t high, int64_t wide, int64_t pitch, int64_t images, int64_t reads, int64_t halo,
                    const ConvKernels &kernels);

constexpr int64_t kConvWindow = 1 << 18;  // floats: 1 MB, half of the L2 that newer server cores have
constexpr int64_t kConvBand = 1 << 17;    // floats of a band, all rows of V of a task

// Rows of outputs whose window fits, one at least.
int64_t rows_in_window(int64_t reads, int64_t halo);

}  // namespace paikern
