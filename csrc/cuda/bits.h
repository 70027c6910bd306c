// Launchers of bits.cuh: device pointers, a device number and a stream. They return the CUDA error as text, or null.
#pragma once

#include <cstdint>

namespace paikern::cuda {

// Usable devices; 0 with `*why` set where there is no driver, or one that is too old.
int device_count(const char **why);

const char *pack_mask(const uint8_t *mask, int64_t numel, uint8_t *packed, int device, void *stream);

const char *unpack_mask(const uint8_t *packed, int64_t numel, uint8_t *mask, int device, void *stream);

// itemsize 2, 4 or 8.
const char *apply_mask(void *values, int itemsize, int64_t numel, const uint8_t *packed, int device, void *stream);

}  // namespace paikern::cuda
