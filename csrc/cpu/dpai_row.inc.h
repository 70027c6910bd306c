// One run of weights of the fused DPaI update (specification section 4). Included by path_kernels.inc.h.
//
//   q = q_scale * q;  f = any kept weight of the kernel with q != 0
//   u = 1 where the node is not live, 1 - alpha where f, else (1 - alpha) + alpha * beta
//   a = u * sign(s) * q;  ascent: s += step * a;  Adam: a step on the gradient -a
//
// 8 bytes a weight for ascent, 24 with Adam: each of s, m, v read and written once.
#pragma once

namespace {

// Sets bits first .. first + count of `words`.
inline void set_bits(uint64_t *words, int64_t first, int64_t count) {
  while (count > 0) {
    const int64_t word = first >> 6, bit = first & 63;
    const int64_t here = count < 64 - bit ? count : 64 - bit;
    words[word] |= (here == 64 ? ~uint64_t{0} : (uint64_t{1} << here) - 1) << bit;
    first += here;
    count -= here;
  }
}

// Clears bits below `end` in word `index`.
inline uint64_t without_below(uint64_t word, int64_t index, int64_t end) {
  const int64_t bit = end - 64 * index;
  if (bit <= 0) return word;
  return bit >= 64 ? 0 : word & (~uint64_t{0} << bit);
}

// Fills `flag` with the weights of effective kernels and returns how many kernels those are.
inline int64_t flag_large_kernels(const uint64_t *effective, uint64_t *flag, int64_t words, int64_t kernel) {
  int64_t kernels = 0, covered = 0;
  for (int64_t i = 0; i < words; ++i) flag[i] = 0;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word = without_below(effective[i], i, covered);
    while (word) {
      const int64_t first = (64 * i + __builtin_ctzll(word)) / kernel * kernel;
      set_bits(flag, first, kernel);
      covered = first + kernel;
      word = without_below(word, i, covered);
      ++kernels;
    }
  }
  return kernels;
}

// The same for kernels of at most 63 weights, one after the other without a branch on the bits. Stepping from set bit
// to set bit made the Adam step of VGG19 at density 0.1 cost 63 ms instead of 24.
inline int64_t flag_small_kernels(const uint64_t *effective, uint64_t *flag, int64_t words, int64_t kernel,
                                  int64_t count) {
  const uint64_t all = (uint64_t{1} << kernel) - 1;
  int64_t kernels = 0, word = 0, bit = 0;
  uint64_t here = effective[0], pending = 0;
  for (int64_t first = 0; first < count; first += kernel) {
    const uint64_t next = word + 1 < words ? effective[word + 1] : 0;
    const uint64_t bits = (here >> bit | (next << 1) << (63 - bit)) & all;
    const uint64_t found = bits != 0;
    const uint64_t mark = (0 - found) & all;
    kernels += static_cast<int64_t>(found);
    pending |= mark << bit;
    bit += kernel;
    if (bit >= 64) {
      flag[word++] = pending;
      bit -= 64;
      pending = mark >> (kernel - bit);  // bit < kernel here, and bit = 0 leaves nothing
      here = next;
    }
  }
  if (word < words) flag[word] = pending;
  return kernels;
}

template <bool Adam>
inline uint32_t dpai_vector(const DpaiRule &rule, vf u, vf q, float *s, float *m, float *v) {
  const vf score = v_load(s);
  const vf ascent = v_mul(u, v_sign_of(score, v_mul(v_set(rule.q_scale), q)));
  vf next;
  if constexpr (Adam) {
    // torch.optim.Adam on the gradient -a, term for term
    const vf gradient = v_sub(v_zero(), ascent);
    const vf mean = v_fma(v_set(1.0f - rule.beta1), gradient, v_mul(v_set(rule.beta1), v_load(m)));
    const vf square = v_fma(v_mul(v_set(1.0f - rule.beta2), gradient), gradient, v_mul(v_set(rule.beta2), v_load(v)));
    v_store(m, mean);
    v_store(v, square);
    const vf root = v_fma(v_sqrt(square), v_set(rule.inverse_root_c2), v_set(rule.epsilon));
    next = v_sub(score, v_div(v_mul(v_set(rule.step), mean), root));
  } else {
    next = v_fma(v_set(rule.step), ascent, score);
  }
  v_store(s, next);
  return v_bits(v_isnan(v_sub(next, next)));  // inf - inf is NaN too
}

template <bool Adam>
inline bool dpai_update(const DpaiRow &row, const DpaiRule &rule, const uint64_t *flag) {
  uint32_t bad = 0;
  const vf one = v_set(1.0f), dead = v_set(rule.kernel_dead), effective = v_set(rule.effective);
  for (int64_t i = 0; i < row.count; i += kLanes) {
    const auto bits = [&](const uint64_t *words) {
      return v_mask(static_cast<uint32_t>(words[i >> 6] >> (i & 63)) & static_cast<uint32_t>((1ull << kLanes) - 1));
    };
    vf u = v_select(bits(flag), effective, dead);
    if (row.live) {
      u = v_select(bits(row.live), u, one);
    } else if (!row.live_row) {
      u = one;
    }
    const int64_t left = row.count - i;
    if (left >= kLanes) {
      bad |= dpai_vector<Adam>(rule, u, v_load(row.q + i), row.s + i, row.m + i, row.v + i);
    } else {
      float q[kLanes] = {}, s[kLanes] = {}, m[kLanes] = {}, v[kLanes] = {};
      const size_t size = sizeof(float) * static_cast<size_t>(left);
      std::memcpy(q, row.q + i, size);
      std::memcpy(s, row.s + i, size);
      if constexpr (Adam) {
        std::memcpy(m, row.m + i, size);
        std::memcpy(v, row.v + i, size);
      }
      bad |= dpai_vector<Adam>(rule, u, v_load(q), s, m, v);
      std::memcpy(row.s + i, s, size);
      if constexpr (Adam) {
        std::memcpy(row.m + i, m, size);
        std::memcpy(row.v + i, v, size);
      }
    }
  }
  return bad == 0;
}

void dpai_row(const DpaiRow &row, const DpaiRule &rule, DpaiCounts &counts) {
  const int64_t words = (row.count + 63) / 64, bytes = (row.numel + 7) / 8;
  uint64_t *effective = row.words, *flag = row.words + words;
  const vf scale = v_set(rule.q_scale);
  for (int64_t i = 0; i < words; ++i) {
    const int64_t first = 64 * i, left = row.count - first;
    uint64_t kept = mask_bits(row.mask, bytes, row.start + first, 32);
    if (left > 32) kept |= mask_bits(row.mask, bytes, row.start + first + 32, 32) << 32;
    if (left < 64) kept &= (uint64_t{1} << left) - 1;
    uint64_t nonzero = 0;
    for (int64_t j = 0; kept && j < 64 && j < left; j += kLanes) {
      float tail[kLanes] = {};
      const float *q = row.q + first + j;
      if (left - j < kLanes) {
        std::memcpy(tail, q, sizeof(float) * static_cast<size_t>(left - j));
        q = tail;
      }
      nonzero |= static_cast<uint64_t>(v_bits(v_nonzero(v_mul(scale, v_load(q))))) << j;
    }
    effective[i] = kept & nonzero;
    counts.weights += __builtin_popcountll(effective[i]);
  }
  if (row.kernel == 1) {
    flag = effective;
    for (int64_t i = 0; i < words; ++i) counts.kernels += __builtin_popcountll(effective[i]);
  } else {
    counts.kernels += row.kernel < 64 ? flag_small_kernels(effective, flag, words, row.kernel, row.count)
                                      : flag_large_kernels(effective, flag, words, row.kernel);
  }
  counts.finite &= row.m ? dpai_update<true>(row, rule, flag) : dpai_update<false>(row, rule, flag);
}

}  // namespace
