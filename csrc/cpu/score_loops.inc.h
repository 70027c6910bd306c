// Scores out of what is stored: loops that the selection and the patterns share, compiled for each instruction set.
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "halves.h"

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

}  // namespace
