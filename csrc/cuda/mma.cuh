// What has instructions of its own on a GPU: products of tensor cores, and copies that nobody waits for.
//
// pk_mma is one product, c += a b: a is [16, 16], b is [16, 8] and c is [16, 8] in float32.
//
// Lane l of a warp, with g = l / 4 and t = l % 4, holds two halves in each word, the first one low:
//   a[0], a[2]: row g, columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9;    a[1], a[3]: the same of row g + 8
//   b[0], b[1]: rows 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of column g
//   c[0], c[1]: row g, columns 2 t, 2 t + 1;    c[2], c[3]: the same of row g + 8
//
// The CPU shim has no tensor cores: there it is the same sums by shuffles, in the order of the 16 products.
#pragma once

#include "scores.cuh"

// kType: 1 bf16, 2 fp16. All lanes of a warp call it.
template <int kType>
PK_DEVICE void pk_mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef PAIKERN_CUDA_ON_CPU
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  float rows[2][16], columns[2][16];
  const auto halves = [](unsigned word, float *low, float *high) {
    *low = pk_widened(word & 0xffffu, kType);
    *high = pk_widened(word >> 16, kType);
  };
  for (int from = 0; from < 4; ++from) {
    for (int i = 0; i < 4; ++i) {
      const int k = 2 * from + i / 2 * 8;
      halves(__shfl_sync(0xffffffffu, a[i], g * 4 + from), &rows[i % 2][k], &rows[i % 2][k + 1]);
    }
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 2; ++i) {
        const int k = 2 * from + i * 8;
        halves(__shfl_sync(0xffffffffu, b[i], (2 * t + n) * 4 + from), &columns[n][k], &columns[n][k + 1]);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) c[i] = __fmaf_rn(rows[i / 2][k], columns[i % 2][k], c[i]);
  }
#else
  if constexpr (kType == 1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Copies 16 bytes to shared memory, of which `bytes` are read and the others zero; both begin at a multiple of 16.
PK_DEVICE void pk_copy_16(void *to, const void *from, int bytes) {
#ifdef PAIKERN_CUDA_ON_CPU
  auto *target = static_cast<unsigned char *>(to);
  for (int i = 0; i < 16; ++i) target[i] = i < bytes ? static_cast<const unsigned char *>(from)[i] : 0;
#else
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
#endif
}

// Ends a group of copies of this thread.
PK_DEVICE void pk_copies_end() {
#ifndef PAIKERN_CUDA_ON_CPU
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All groups of this thread but the last have come; other threads see them after a barrier.
PK_DEVICE void pk_copies_done_but_last() {
#ifndef PAIKERN_CUDA_ON_CPU
  asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

PK_DEVICE void pk_copies_done() {
#ifndef PAIKERN_CUDA_ON_CPU
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}
