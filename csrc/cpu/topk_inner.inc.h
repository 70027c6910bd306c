// Bodies of TopkInner; included by topk_portable.cpp, topk_avx2.cpp and topk_avx512.cpp. Plain loops that the
// compiler turns into vectors of the file's instruction set, and intrinsics where it does not.
#include <cstring>

#if defined(__F16C__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "halves.h"
#include "topk_inner.h"

namespace {

void widen_halves(const uint16_t *data, int64_t count, bool ieee, float *out) {
  int64_t i = 0;
  if (!ieee) {
    for (; i < count; ++i) out[i] = paikern::bfloat16_to_float(data[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i *>(data + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
  }
#endif
  for (; i < count; ++i) out[i] = paikern::float16_to_float(data[i]);
}

void factored_scores(const float *w, const float *a, float g, bool square, int64_t count, float *out) {
  if (square) {
    for (int64_t i = 0; i < count; ++i) out[i] = ((w[i] * w[i]) * a[i]) * g;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = (__builtin_fabsf(w[i]) * a[i]) * g;
  }
}

void exclude_others(const uint8_t *candidates, int64_t count, float *values) {
  for (int64_t b = 0; b < (count + 7) >> 3; ++b) {
    const uint32_t byte = candidates[b];
    if (byte == 0xff) continue;
    for (uint32_t j = 0; j < 8; ++j) {
      float &value = values[8 * b + j];
      value = (byte >> j) & 1u ? value : -__builtin_inff();
    }
  }
}

bool make_keys(const float *values, int64_t count, bool absolute, uint32_t *keys) {
  const uint32_t clear = absolute ? 0x7fffffffu : 0xffffffffu;
  uint32_t nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    bits &= clear;
    bits = bits == 0x80000000u ? 0u : bits;  // -0 becomes +0
    nan |= (bits & 0x7fffffffu) > 0x7f800000u ? 1u : 0u;
    keys[i] = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  }
  return nan != 0;
}

int64_t compare_keys(const uint32_t *keys, int64_t count, uint32_t low, uint32_t high, uint8_t *above, uint8_t *band) {
  int64_t total = 0, done = 0;
#if defined(__AVX512BW__)
  const __m512i lowest = _mm512_set1_epi32(static_cast<int>(low)), highest = _mm512_set1_epi32(static_cast<int>(high));
  for (; done + 16 <= count; done += 16) {
    const __m512i sixteen = _mm512_loadu_si512(keys + done);
    const __mmask16 over = _mm512_cmpgt_epu32_mask(sixteen, highest);
    const __mmask16 reached = _mm512_cmpge_epu32_mask(sixteen, lowest);
    const uint16_t bits = over, inside = static_cast<uint16_t>(reached & ~over);
    std::memcpy(above + (done >> 3), &bits, 2);
    std::memcpy(band + (done >> 3), &inside, 2);
    total += __builtin_popcount(bits);
  }
#endif
  uint8_t over[512], inside[512];
  const int64_t left = count - done, padded = (left + 7) & ~int64_t{7};
  for (int64_t i = 0; i < left; ++i) {
    over[i] = keys[done + i] > high;
    inside[i] = (keys[done + i] >= low) & (keys[done + i] <= high);
  }
  for (int64_t i = left; i < padded; ++i) over[i] = inside[i] = 0;
  for (int64_t i = 0; i < padded; i += 8) {
    // The product gathers the lowest bit of each of eight bytes into the top byte, or adds them up there.
    uint64_t eight;
    std::memcpy(&eight, over + i, 8);
    above[(done + i) >> 3] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
    total += static_cast<int64_t>((eight * 0x0101010101010101u) >> 56);
    std::memcpy(&eight, inside + i, 8);
    band[(done + i) >> 3] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
  return total;
}

#define PAIKERN_TOPK_INNER {widen_halves, factored_scores, exclude_others, make_keys, compare_keys}

}  // namespace
