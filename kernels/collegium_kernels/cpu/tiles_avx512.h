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
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < width; i += 16)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_maskz_loadu_epi32(tail(i), x + i), magnitude));
  const float scale = a.scales[row] = row_scale(_mm512_reduce_max_epu32(top));
  const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
  const __mmask16 valid = scale > 0 ? 0xffff : 0;
  for (int64_t s = 0; s < a.spans; ++s) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = s * a.span; i < (s + 1) * a.span; i += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(tail(i) & valid, x + i), inverse);
      const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(scaled, _mm512_set1_ps(127)));
      sum = _mm512_add_epi32(sum, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(&a.codes[row * a.inputs + i]), _mm512_cvtsepi32_epi8(code));
    }
    a.sums[row * a.spans + s] = _mm512_reduce_add_epi32(sum);
  }
}

constexpr int kAhead = 4096;  // bytes: hides memory behind the page that is being read

// The product is inline assembly because GCC 12 copies every accumulator around the intrinsic: 30 % of the time.
template <int ROWS, int BITS, bool FETCH>
void tile_rows(const Matrix& m, const uint8_t* w, const uint16_t* scales, int64_t begin, int64_t end, const Tile& t) {
  constexpr int zero = BITS == 8 ? 128 : 8;
  constexpr int step = BITS == 8 ? 4 : 8;
  const __m512i low = _mm512_set1_epi8(15);
  w += begin * m.span * m.bytes_per_input;
  for (int64_t s = begin; s < end; ++s) {
    __m512i sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_set1_epi32(-zero * t.sums[r][s]);
    for (int64_t k = s * m.span; k < (s + 1) * m.span; k += step, w += kColumns * 4) {
      for (int half = 0; half < step / 4; ++half) {
        __m512i a[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          int32_t four;
          std::memcpy(&four, t.a[r] + k + half * 4, 4);
          a[r] = _mm512_set1_epi32(four);
        }
        for (int c = 0; c < 4; ++c) {
          if (FETCH && half == 0) _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + c * 64), _MM_HINT_T0);
          const __m512i code = _mm512_loadu_si512(w + c * 64);
          const __m512i shifted = half ? _mm512_srli_epi16(code, 4) : code;
          const __m512i u = BITS == 8 ? code : _mm512_and_si512(shifted, low);
          for (int r = 0; r < ROWS; ++r) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][c]) : "v"(u), "v"(a[r]));
        }
      }
    }
    const uint16_t* scale_row = scales + s / m.spans_per_group * kColumns;
    for (int c = 0; c < 4; ++c) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale_row + c * 16));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      for (int r = 0; r < ROWS; ++r) {
        float* out = t.out[r] + c * 16;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][c]), scale, _mm512_loadu_ps(out)));
      }
    }
  }
}

template <int BITS, bool FETCH>
void tile_by_rows(int rows, const Matrix& m, const uint8_t* w, const uint16_t* s, int64_t begin, int64_t end,
                 const Tile& t) {
  switch (rows) {
    case 1: return tile_rows<1, BITS, FETCH>(m, w, s, begin, end, t);
    case 2: return tile_rows<2, BITS, FETCH>(m, w, s, begin, end, t);
    case 3: return tile_rows<3, BITS, FETCH>(m, w, s, begin, end, t);
    case 4: return tile_rows<4, BITS, FETCH>(m, w, s, begin, end, t);
    case 5: return tile_rows<5, BITS, FETCH>(m, w, s, begin, end, t);
    default: return tile_rows<6, BITS, FETCH>(m, w, s, begin, end, t);
  }
}

template <int BITS>
void tile_avx512(int rows, const Matrix& m, const uint8_t* w, const uint16_t* s, int64_t begin, int64_t end,
                 const Tile& t) {
  t.fetch ? tile_by_rows<BITS, true>(rows, m, w, s, begin, end, t)
          : tile_by_rows<BITS, false>(rows, m, w, s, begin, end, t);
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

void swiglu_avx512(const float* sums, float scale, float* hidden) {
  for (int c = 0; c < 32; c += 16) {
    const __m512 gate = _mm512_mul_ps(_mm512_loadu_ps(sums + c), _mm512_set1_ps(scale));
    const __m512 up = _mm512_mul_ps(_mm512_loadu_ps(sums + c + 32), _mm512_set1_ps(scale));
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
