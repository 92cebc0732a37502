// The same for AVX512-VNNI. Compiled everywhere on x86, run only where the CPU has it.
#pragma once
#include <immintrin.h>

#include "tiles.h"

namespace {
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#endif

void quantise_avx512(Activations& a, int64_t row, const float* x, int64_t width) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const auto tail = [&](int64_t i) {
    return static_cast<__mmask16>(width - i >= 16 ? 0xffff : (1 << std::max<int64_t>(width - i, 0)) - 1);
  };
  float scale = 0;
  for (int64_t s = 0; s < a.spans; ++s) {
    const int64_t begin = s * a.span, end = begin + a.span;
    if (s % a.spans_per_group == 0) {
      __m512i top = _mm512_setzero_si512();
      for (int64_t i = begin; i < std::min(begin + a.span * a.spans_per_group, width); i += 16)
        top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_maskz_loadu_epi32(tail(i), x + i), magnitude));
      scale = code_scale(_mm512_reduce_max_epu32(top));
    }
    const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    const __mmask16 valid = scale > 0 ? 0xffff : 0;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = begin; i < end; i += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(tail(i) & valid, x + i), inverse);
      const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(scaled, _mm512_set1_ps(127)));
      sum = _mm512_add_epi32(sum, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(&a.codes[row * a.stride + i]), _mm512_cvtsepi32_epi8(code));
    }
    a.scales[row * a.spans + s] = scale;
    a.starts[row * a.spans + s] = -a.zero * _mm512_reduce_add_epi32(sum);
  }
}

constexpr int kAhead = 4096;  // bytes: of what is read next, to L1

// Integer sums of span `s`, scaled, onto the tile's; the first of all with nothing before it.
template <int ROWS>
inline __attribute__((always_inline)) void add_span(const __m512i (&sum)[ROWS][4], const uint16_t* w_scales,
                                                    const Tile& t, int64_t s) {
  __m512 scale[4];
  for (int line = 0; line < 2; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(w_scales) + kAhead + line * 64, _MM_HINT_T0);
  for (int c = 0; c < 4; ++c) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w_scales + c * 16));
    scale[c] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  float* const sums = t.out;  // not read again after each store
  for (int r = 0; r < ROWS; ++r) {
    const __m512 mine = _mm512_set1_ps(t.scales[r][s]);
    for (int c = 0; c < 4; ++c) {
      float* out = sums + r * kColumns + c * 16;
      const __m512 before = s > 0 ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
      _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][c]), _mm512_mul_ps(scale[c], mine), before));
    }
  }
}

// Eight inputs a step; SHARE is the slice's. Each tile fetches its part of what comes next to L2, a line from each of
// several places in turn: the hardware's own prefetcher follows pages, and so many of them give it time. With few tiles
// the first also fetches the slice to L1; with many that pushes out what they share.
// The product is inline assembly because GCC 12 copies every accumulator around the intrinsic: 30 % of the time.
template <int ROWS, int BITS, bool FIRST, int SHARE>
void tile_rows(const Matrix& m, const Slice& slice, const Tile& t) {
  constexpr bool packed = BITS == 4 && FIRST, store = packed && SHARE > 1, near = FIRST && SHARE < 4;
  constexpr int bytes = packed ? kStepBytes : 2 * kStepBytes;
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* w = BITS == 4 && !FIRST ? slice.unpacked : slice.w;
  uint8_t* unpacked = slice.unpacked;
  const char* ahead = reinterpret_cast<const char*>(t.ahead);
  const uint16_t* w_scales = slice.w_scales + slice.begin / m.spans_per_group * kColumns;
  int64_t in_group = slice.begin % m.spans_per_group;
  for (int64_t s = slice.begin; s < slice.end; ++s) {
    __m512i sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_set1_epi32(t.starts[r][s]);
    for (int64_t k = s * m.span; k < (s + 1) * m.span; k += 8, w += bytes) {
      for (int line = 0; line < BITS / SHARE; ++line) _mm_prefetch(ahead + line * slice.apart, _MM_HINT_T1);
      ahead += slice.advance;
      for (int at = 0; near && at < bytes; at += 64)
        _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + at, _MM_HINT_T0);
      for (int half = 0; half < 2; ++half) {
        __m512i a[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          int32_t four;
          std::memcpy(&four, t.a[r] + k + half * 4, 4);
          a[r] = _mm512_set1_epi32(four);
        }
        for (int c = 0; c < 4; ++c) {
          const __m512i code = _mm512_loadu_si512(w + c * 64 + (packed ? 0 : half * kStepBytes));
          const __m512i shifted = packed && half ? _mm512_srli_epi16(code, 4) : code;
          const __m512i u = packed ? _mm512_and_si512(shifted, low) : code;
          if (store) _mm512_store_si512(unpacked + half * kStepBytes + c * 64, u);
          for (int r = 0; r < ROWS; ++r) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][c]) : "v"(u), "v"(a[r]));
        }
      }
      if (store) unpacked += 2 * kStepBytes;
    }
    add_span<ROWS>(sum, w_scales, t, s);
    if (++in_group == m.spans_per_group) {
      in_group = 0;
      w_scales += kColumns;
    }
  }
}

template <int BITS, bool FIRST, int SHARE>
void tile_by_rows(const Matrix& m, const Slice& slice, const Tile& t) {
  with_rows(t.rows, [&](auto rows) { tile_rows<decltype(rows)::value, BITS, FIRST, SHARE>(m, slice, t); });
}

template <int BITS, bool FIRST>
void tile_avx512(const Matrix& m, const Slice& slice, const Tile& t) {
  if (FIRST && slice.share == 1) return tile_by_rows<BITS, true, 1>(m, slice, t);
  if (slice.share == 2) return tile_by_rows<BITS, FIRST, 2>(m, slice, t);
  return tile_by_rows<BITS, FIRST && BITS == 4, 4>(m, slice, t);  // of int8 all such tiles are alike
}

// exp by 2^n * polynomial, relative error below 1e-6; the ends saturate.
__m512 exp_avx512(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691e-4f);
  for (float c : {1.3981999e-3f, 8.3334519e-3f, 4.1665796e-2f, 1.6666666e-1f, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

void swiglu_avx512(const float* sums, float* hidden) {
  for (int c = 0; c < 32; c += 16) {
    const __m512 gate = _mm512_loadu_ps(sums + c), up = _mm512_loadu_ps(sums + c + 32);
    const __m512 e = exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    const __m512 s = _mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1), e));
    _mm512_storeu_ps(hidden + c, _mm512_mul_ps(s, up));
  }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace
