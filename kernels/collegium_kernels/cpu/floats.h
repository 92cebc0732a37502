// Float weights for AVX512: bf16 and fp16 become fp32 while they are read, and every product is an fp32 FMA.
//
// A panel holds 64 columns for each input in turn. fp32 and fp16 are in order; a line of bf16 has columns 0 to 15 in the
// low halves of its 32-bit words and 16 to 31 in the high ones, so that a shift and a mask widen it.
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
  const float* a[kRows];
  const uint8_t* w;  // the slice
  float* out;        // kColumns a row
  int64_t begin, end;
  const uint8_t* ahead;  // what is read next, fetched meanwhile
  int64_t advance;       // bytes of it for each input
};

// The 64 weights of one input.
template <int KIND>
inline void widen(const uint8_t* w, __m512* out) {
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
template <int ROWS, int KIND, int LINES>
void float_rows(const Matrix& m, const FloatTile& t) {
  const uint8_t* w = t.w;
  const char* ahead = reinterpret_cast<const char*>(t.ahead);
  for (int64_t s = t.begin; s < t.end; ++s) {
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
    for (int64_t k = s * m.span; k < (s + 1) * m.span; ++k, w += input_bytes(KIND)) {
      for (int line = 0; line < LINES; ++line) _mm_prefetch(ahead + line * 64, _MM_HINT_T1);
      ahead += t.advance;
      // Where each line is used once, fetching it to L1 as well pays.
      for (int line = 0; LINES * 64 == input_bytes(KIND) && line < LINES; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + line * 64, _MM_HINT_T0);
      __m512 v[4];
      widen<KIND>(w, v);
      for (int r = 0; r < ROWS; ++r) {
        const __m512 a = _mm512_set1_ps(t.a[r][k]);
        for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_fmadd_ps(v[c], a, sum[r][c]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) {
        float* out = t.out + r * kColumns + c * 16;
        const __m512 before = s > 0 ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
        _mm512_storeu_ps(out, _mm512_add_ps(sum[r][c], before));
      }
  }
}

template <int KIND, int LINES>
void float_tile_by_rows(int rows, const Matrix& m, const FloatTile& t) {
  switch (rows) {
    case 1: return float_rows<1, KIND, LINES>(m, t);
    case 2: return float_rows<2, KIND, LINES>(m, t);
    case 3: return float_rows<3, KIND, LINES>(m, t);
    case 4: return float_rows<4, KIND, LINES>(m, t);
    case 5: return float_rows<5, KIND, LINES>(m, t);
    default: return float_rows<6, KIND, LINES>(m, t);
  }
}

template <int KIND>
void float_tile(int rows, const Matrix& m, const FloatTile& t) {
  if (t.advance <= 64) return float_tile_by_rows<KIND, 1>(rows, m, t);
  if (t.advance <= 128) return float_tile_by_rows<KIND, 2>(rows, m, t);
  return float_tile_by_rows<KIND, 4>(rows, m, t);
}

template <int KIND>
void unpack_floats(const uint8_t* w, int64_t bytes, uint8_t* out) {
  for (; bytes > 0; bytes -= input_bytes(KIND), w += input_bytes(KIND), out += input_bytes(kFp32)) {
    __m512 v[4];
    widen<KIND>(w, v);
    for (int c = 0; c < 4; ++c) _mm512_store_ps(out + c * 64, v[c]);
  }
}

template <int KIND>
struct Floats {
  using Inputs = Values;
  using Tile = FloatTile;
  static constexpr int planes = 1;
  Matrix up, down;

  Values inputs(int64_t rows, const Matrix& m) const { return Values(rows, m); }
  void put(Values& a, int64_t row, const float* x, int64_t width) const {
    float* out = &a.values[row * a.stride];
    std::fill(std::copy_n(x, width, out), out + a.stride, 0.0f);
  }
  void start(Tile&, const Matrix&, int64_t, int64_t) const {}
  void point(Tile& t, int r, const Values& a, int64_t row) const { t.a[r] = &a.values[row * a.stride]; }
  bool can_unpack() const { return KIND != kFp32; }
  int64_t step_bytes(bool) const { return input_bytes(KIND); }
  void unpack(const uint8_t* w, int64_t bytes, uint8_t* out) const { unpack_floats<KIND>(w, bytes, out); }
  void tile(bool unpacked, int rows, const Matrix& m, const Tile& t) const {
    unpacked ? float_tile<kFp32>(rows, m, t) : float_tile<KIND>(rows, m, t);
  }
  void swiglu(const float* sums, float* hidden) const { swiglu_avx512(sums, hidden); }
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace
