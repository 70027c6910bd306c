// Rows of maps to rows of planes and back (path_plan.cpp). Included by path_kernels.inc.h. One call a plane: a memcpy
// for every row of 32 floats took most of the time of a small layer.
#pragma once

namespace {

// `count` < kLanes floats, the missing lanes 0.
inline vf v_load_part(const float *p, int count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  float lane[kLanes] = {};
  for (int i = 0; i < count; ++i) lane[i] = p[i];
  return v_load(lane);
#endif
}

inline void v_store_part(float *p, int count, vf value) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), value);
#else
  float lane[kLanes];
  v_store(lane, value);
  for (int i = 0; i < count; ++i) p[i] = lane[i];
#endif
}

void fill_rows(const float *src, int64_t src_pitch, int64_t step, int64_t rows, int64_t width, float *dst,
               int64_t dst_pitch) {
  for (int64_t h = 0; h < rows; ++h, src += src_pitch, dst += dst_pitch) {
    if (step == 1) {
      int64_t w = 0;
      for (; w + kLanes <= width; w += kLanes) v_store(dst + w, v_load(src + w));
      if (w < width) v_store(dst + w, v_load_part(src + w, static_cast<int>(width - w)));
    } else if (step == 2) {
      for (int64_t w = 0; w < width; ++w) dst[w] = src[2 * w];
    } else {
      for (int64_t w = 0; w < width; ++w) dst[w] = src[w * step];
    }
  }
}

void write_rows(const float *src, int64_t src_pitch, int64_t step, int64_t rows, int64_t width, float *dst,
                int64_t dst_pitch) {
  for (int64_t h = 0; h < rows; ++h, src += src_pitch, dst += dst_pitch) {
    if (step == 1) {
      int64_t w = 0;
      for (; w + kLanes <= width; w += kLanes) v_store(dst + w, v_load(src + w));
      if (w < width) v_store_part(dst + w, static_cast<int>(width - w), v_load(src + w));
    } else {
      for (int64_t w = 0; w < width; ++w) dst[w * step] = src[w];
    }
  }
}

}  // namespace
