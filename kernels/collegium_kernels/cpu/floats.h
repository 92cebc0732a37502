// Float weights for AVX512: bf16 and fp16 become fp32 while they are read, and every product is an fp32 FMA.
//
// A panel holds 64 columns for each input in turn. fp32 and fp16 are in order; a line of bf16 has columns 0 to 15 in
// the low halves of its 32-bit words and 16 to 31 in the high ones, so that a shift and a mask widen it.
#pragma once
#include <immintrin.h>

#include "layer.h"
#include "tiles_avx512.h"

namespace {
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

enum Kind { kFp32, kBf16, kFp16 };

constexpr int64_t input_bytes(int kind) { return kColumns * (kind == kFp32 ? 4 : 2); }

// Rows of inputs as they are, with zeros up to the packed width.
struct Values {
  int64_t stride;
  Buffer<float> values;
  // Rows start on different cache sets: a power of two apart they would push each other out of L1.
  Values(int64_t rows, const Matrix& m) : stride(m.inputs + 16), values(rows * stride) {}
};

struct FloatTile {
  int rows;
  const float* a[kRows];
  float* out;            // kColumns a row
  const uint8_t* ahead;  // what is fetched meanwhile
};

// The 64 weights of one input.
template <int KIND>
inline void widen_input(const uint8_t* w, __m512* out) {
  for (int half = 0; half < 2; ++half) {
    if (KIND == kFp32) {
      out[half * 2] = _mm512_loadu_ps(w + half * 128);
      out[half * 2 + 1] = _mm512_loadu_ps(w + half * 128 + 64);
    } else if (KIND == kBf16) {
      const __m512i both = _mm512_loadu_si512(w + half * 64);
      out[half * 2] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      out[half * 2 + 1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
    } else {
      const __m256i* line = reinterpret_cast<const __m256i*>(w + half * 64);
      out[half * 2] = _mm512_cvtph_ps(_mm256_loadu_si256(line));
      out[half * 2 + 1] = _mm512_cvtph_ps(_mm256_loadu_si256(line + 1));
    }
  }
}

// Adds spans of a panel to the rows' sums. A span has a partial sum of its own: its error does not grow with the width.
// Two inputs a step; SHARE and what is fetched as for codes.
template <int ROWS, int KIND, bool FIRST, int SHARE>
void float_rows(const Matrix& m, const Slice& slice, const FloatTile& t) {
  constexpr bool store = KIND != kFp32 && FIRST && SHARE > 1, near = FIRST && SHARE < 4;
  constexpr int kind = FIRST ? KIND : kFp32, lines = input_bytes(KIND) / 32 / SHARE;
  constexpr int64_t bytes = input_bytes(kind);
  const uint8_t* w = FIRST || KIND == kFp32 ? slice.w : slice.unpacked;
  uint8_t* unpacked = slice.unpacked;
  const char* ahead = reinterpret_cast<const char*>(t.ahead);
  for (int64_t s = slice.begin; s < slice.end; ++s) {
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
    for (int64_t k = s * m.span; k < (s + 1) * m.span; k += 2, w += 2 * bytes) {
      for (int line = 0; line < lines; ++line) _mm_prefetch(ahead + line * slice.apart, _MM_HINT_T1);
      ahead += slice.advance;
      for (int64_t at = 0; near && at < 2 * bytes; at += 64)
        _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + at, _MM_HINT_T0);
      for (int i = 0; i < 2; ++i) {
        __m512 v[4];
        widen_input<kind>(w + i * bytes, v);
        for (int c = 0; store && c < 4; ++c) _mm512_store_ps(unpacked + i * input_bytes(kFp32) + c * 64, v[c]);
        for (int r = 0; r < ROWS; ++r) {
          const __m512 a = _mm512_set1_ps(t.a[r][k + i]);
          for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_fmadd_ps(v[c], a, sum[r][c]);
        }
      }
      if (store) unpacked += 2 * input_bytes(kFp32);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) {
        float* out = t.out + r * kColumns + c * 16;
        const __m512 before = s > 0 ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
        _mm512_storeu_ps(out, _mm512_add_ps(sum[r][c], before));
      }
  }
}

template <int KIND, bool FIRST, int SHARE>
void float_by_rows(const Matrix& m, const Slice& slice, const FloatTile& t) {
  with_rows(t.rows, [&](auto rows) { float_rows<decltype(rows)::value, KIND, FIRST, SHARE>(m, slice, t); });
}

template <int KIND, bool FIRST>
void float_tile(const Matrix& m, const Slice& slice, const FloatTile& t) {
  if (FIRST && slice.share == 1) return float_by_rows<KIND, true, 1>(m, slice, t);
  if (slice.share == 2) return float_by_rows<KIND, FIRST, 2>(m, slice, t);
  return float_by_rows<KIND, FIRST, 4>(m, slice, t);
}

template <int KIND>
struct Floats {
  using Inputs = Values;
  using Tile = FloatTile;
  static constexpr int planes = 1, step_lines = input_bytes(KIND) / 32;
  Matrix up, down;

  Values inputs(int64_t rows, const Matrix& m) const { return Values(rows, m); }
  void put(Values& a, int64_t row, const float* x, int64_t width) const {
    float* out = &a.values[row * a.stride];
    std::fill(std::copy_n(x, width, out), out + a.stride, 0.0f);
  }
  void point(FloatTile& t, int r, const Values& a, int64_t row) const { t.a[r] = &a.values[row * a.stride]; }
  void tile(bool first, const Matrix& m, const Slice& slice, const FloatTile& t) const {
    first ? float_tile<KIND, true>(m, slice, t) : float_tile<KIND, false>(m, slice, t);
  }
  void swiglu(const float* sums, float* hidden) const { swiglu_avx512(sums, hidden); }
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace
