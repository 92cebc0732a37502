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

constexpr int kAhead = 2048;  // bytes: of what is read next, to L1

// The product is inline assembly because GCC 12 copies every accumulator around the intrinsic: 30 % of the time.
template <int ROWS, int BITS, int LINES>
void tile_rows(const Matrix& m, const Tile& t) {
  constexpr int step = BITS == 8 ? 4 : 8;
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* w = t.w;
  const char* ahead = reinterpret_cast<const char*>(t.ahead);
  const uint16_t* w_scales = t.w_scales + t.begin / m.spans_per_group * kColumns;
  int64_t in_group = t.begin % m.spans_per_group;
  float* const sums = t.out;  // not read again after each store
  for (int64_t s = t.begin; s < t.end; ++s) {
    __m512i sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_set1_epi32(t.starts[r][s]);
    for (int64_t k = s * m.span; k < (s + 1) * m.span; k += step, w += kStepBytes) {
      for (int line = 0; line < LINES; ++line) _mm_prefetch(ahead + line * 64, _MM_HINT_T1);
      ahead += t.advance;
      // Where each line is used once, fetching it to L1 as well pays; with more rows it does not.
      for (int line = 0; LINES == 4 && line < LINES; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + line * 64, _MM_HINT_T0);
      for (int half = 0; half < step / 4; ++half) {
        __m512i a[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          int32_t four;
          std::memcpy(&four, t.a[r] + k + half * 4, 4);
          a[r] = _mm512_set1_epi32(four);
        }
        for (int c = 0; c < 4; ++c) {
          const __m512i code = _mm512_loadu_si512(w + c * 64);
          const __m512i shifted = half ? _mm512_srli_epi16(code, 4) : code;
          const __m512i u = BITS == 8 ? code : _mm512_and_si512(shifted, low);
          for (int r = 0; r < ROWS; ++r) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][c]) : "v"(u), "v"(a[r]));
        }
      }
    }
    __m512 scale[4];
    for (int line = 0; line < 2; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(w_scales) + kAhead + line * 64, _MM_HINT_T0);
    for (int c = 0; c < 4; ++c) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w_scales + c * 16));
      scale[c] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    for (int r = 0; r < ROWS; ++r) {
      const __m512 mine = _mm512_set1_ps(t.scales[r][s]);
      for (int c = 0; c < 4; ++c) {
        float* out = sums + r * kColumns + c * 16;
        const __m512 before = s > 0 ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
        _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][c]), _mm512_mul_ps(scale[c], mine), before));
      }
    }
    if (++in_group == m.spans_per_group) {
      in_group = 0;
      w_scales += kColumns;
    }
  }
}

template <int BITS, int LINES>
void tile_by_rows(int rows, const Matrix& m, const Tile& t) {
  switch (rows) {
    case 1: return tile_rows<1, BITS, LINES>(m, t);
    case 2: return tile_rows<2, BITS, LINES>(m, t);
    case 3: return tile_rows<3, BITS, LINES>(m, t);
    case 4: return tile_rows<4, BITS, LINES>(m, t);
    case 5: return tile_rows<5, BITS, LINES>(m, t);
    default: return tile_rows<6, BITS, LINES>(m, t);
  }
}

template <int BITS>
void tile_avx512(int rows, const Matrix& m, const Tile& t) {
  if (t.advance <= 64) return tile_by_rows<BITS, 1>(rows, m, t);
  if (t.advance <= 128) return tile_by_rows<BITS, 2>(rows, m, t);
  return tile_by_rows<BITS, 4>(rows, m, t);
}

// int4 codes of whole steps as bytes: where many rows share a slice, its halves are taken apart once.
void unpack_avx512(const uint8_t* w, int64_t bytes, uint8_t* out) {
  const __m512i low = _mm512_set1_epi8(15);
  for (; bytes > 0; bytes -= kStepBytes, w += kStepBytes, out += 2 * kStepBytes)
    for (int c = 0; c < kStepBytes; c += 64) {
      const __m512i code = _mm512_loadu_si512(w + c);
      _mm512_store_si512(out + c, _mm512_and_si512(code, low));
      _mm512_store_si512(out + kStepBytes + c, _mm512_and_si512(_mm512_srli_epi16(code, 4), low));
    }
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
