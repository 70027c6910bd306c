// What the kernels of packed weights share. V = W * M, [rows, columns], is the kept values in row-major order and where
// they belong: 16-bit columns (index) or a bit a weight (bitmap), and starts that cut every row into panels of columns.
//
// Entry i of the row r, panel p lies from starts[r * panels + p] on; its column is stored modulo 65,536. A panel is a
// power of two, so that it does not cross a multiple of that: panels of one multiple are gone through at once, and
// ordinary layers have one such group.
//
// Sums are float32, in an order that follows from the shape, the number of kept weights and the batch alone, without
// float atomics: the same bits from run to run.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "scores.cuh"

constexpr int kPkPackedBlock = 256;  // threads
constexpr int kPkPackedWarps = kPkPackedBlock / 32;
constexpr long long kPkPackedColumns = 1 << 16;  // that 16 bits can tell apart

struct PaikernPacked {
  const void *values;
  const int *source;  // entry i has the value values[source[i]], or values[i] where null
  const unsigned short *positions;
  const int *starts;
  long long rows, columns, panel, kept;
};

#define PK_PACKED_PARAMETERS                                                                                 \
  const void *values, const int *source, const unsigned short *positions, const int *starts, long long rows, \
      long long columns, long long panel, long long kept
#define PK_PACKED {values, source, positions, starts, rows, columns, panel, kept}

PK_DEVICE long long pk_packed_panels(const PaikernPacked &v) { return (v.columns + v.panel - 1) / v.panel; }

struct PaikernEntries {
  int first, last;
};

// Part `part` of `parts` equal ones of a row, from a multiple of `step` after its first entry on.
PK_DEVICE PaikernEntries pk_packed_part(const PaikernPacked &v, long long row, long long part, long long parts,
                                        int step) {
  const long long panels = pk_packed_panels(v);
  const int first = v.starts[row * panels], last = v.starts[(row + 1) * panels];
  const int steps = (last - first + step - 1) / step,
            each = (steps + static_cast<int>(parts) - 1) / static_cast<int>(parts);
  const long long from = first + part * each * step, to = from + static_cast<long long>(each) * step;
  return {static_cast<int>(from < last ? from : last), static_cast<int>(to < last ? to : last)};
}

// Calls visit(base, first, last) for the entries of a part whose columns have the same multiple of 65,536.
template <class Visit>
PK_DEVICE void pk_packed_groups(const PaikernPacked &v, long long row, const PaikernEntries &entries,
                                const Visit &visit) {
  const long long panels = pk_packed_panels(v), span = kPkPackedColumns / v.panel;
  for (long long p = 0; p < panels; p += span) {
    int first = entries.first, last = entries.last;
    if (panels > span) {
      const int from = v.starts[row * panels + p];
      const int to = v.starts[row * panels + (p + span < panels ? p + span : panels)];
      first = from > first ? from : first;
      last = to < last ? to : last;
    }
    if (first < last) visit(p * v.panel, first, last);
  }
}

// The value of an entry.
template <int kType>
PK_DEVICE float pk_packed_value(const PaikernPacked &v, int i) {
  return pk_value(v.values, kType, v.source == nullptr ? i : v.source[i]);
}

// The bits of the nearest value of a type, to even where two are as near; NaN stays NaN.
PK_DEVICE unsigned pk_rounded(float value, long long type) {
  const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  if (type == 0) return bits;
  if (magnitude > 0x7f800000u) return sign | (type == 1 ? 0x7fc0u : 0x7e00u);
  if (type == 1) return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65,520 and more
  if (magnitude < 0x38800000u) {  // subnormal: beside 0.5 the last bit of a float is the last one of a half
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0.5f)) - 0x3f000000u);
  }
  return sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13);
}

PK_DEVICE void pk_store(void *data, long long type, long long i, float value) {
  if (type == 0) {
    static_cast<float *>(data)[i] = value;
  } else {
    static_cast<unsigned short *>(data)[i] = static_cast<unsigned short>(pk_rounded(value, type));
  }
}

// One result: with the bias and in its type, or a part of it as it is.
PK_DEVICE void pk_packed_store(void *y, long long type, const void *bias, bool whole, long long at, long long row,
                               float sum) {
  if (!whole) {
    static_cast<float *>(y)[at] = sum;
    return;
  }
  pk_store(y, type, at, bias == nullptr ? sum : __fadd_rn(sum, pk_value(bias, type, row)));
}

// kWide neighbours of a panel, which begins at a multiple of 16 bytes.
template <int kType, int kWide>
PK_DEVICE void pk_packed_read(const void *panel, long long at, float (&found)[kWide]) {
  if constexpr (kType == 0) {
    const float *from = static_cast<const float *>(panel) + at;
    if constexpr (kWide == 4) {
      const float4 four = *reinterpret_cast<const float4 *>(from);
      found[0] = four.x, found[1] = four.y, found[2] = four.z, found[3] = four.w;
    } else if constexpr (kWide == 2) {
      const float2 two = *reinterpret_cast<const float2 *>(from);
      found[0] = two.x, found[1] = two.y;
    } else {
      found[0] = *from;
    }
  } else {
    const unsigned short *from = static_cast<const unsigned short *>(panel) + at;
    unsigned words[2] = {};
    if constexpr (kWide == 4) {
      const uint2 two = *reinterpret_cast<const uint2 *>(from);
      words[0] = two.x, words[1] = two.y;
    } else if constexpr (kWide == 2) {
      words[0] = *reinterpret_cast<const unsigned *>(from);
    } else {
      words[0] = *from;
    }
#pragma unroll
    for (int k = 0; k < kWide; ++k) found[k] = pk_widened((words[k / 2] >> (k % 2 * 16)) & 0xffffu, kType);
  }
}
