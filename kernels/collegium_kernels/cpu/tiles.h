// What a tile is, and the code for it that any machine runs. See moe.cpp for the layout.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kColumns = 64;
constexpr int kRows = 6;
constexpr int kBlock = 64;           // rows that read a slice of a panel before the next slice is touched
constexpr int64_t kSpan = 512;       // inputs at most between two conversions of integer sums
constexpr int64_t kSliceBytes = 32 << 10;  // of a panel: stays in L1 for a block of rows

struct Matrix {
  const uint8_t* codes;
  const uint16_t* scales;  // bf16
  int64_t inputs, panels, groups, span, spans, spans_per_group, spans_per_slice, bytes_per_input;

  Matrix(const uint8_t* c, const uint16_t* s, int64_t in, int64_t out, int64_t group, int bits)
      : codes(c), scales(s), inputs(in), panels(out / kColumns), groups(in / group), span(span_of(group)),
        spans(in / span), spans_per_group(group / span),
        spans_per_slice(std::max<int64_t>(1, kSliceBytes * 8 / (kColumns * bits * span))),
        bytes_per_input(kColumns * bits / 8) {}
  // The most inputs up to kSpan that divide a group, in steps of 32.
  static int64_t span_of(int64_t group) {
    int64_t span = std::min(group, kSpan);
    while (group % span) span -= 32;
    return span;
  }
  const uint8_t* panel(int64_t e, int64_t p) const { return codes + (e * panels + p) * inputs * bytes_per_input; }
  const uint16_t* scale(int64_t e, int64_t p) const { return scales + (e * panels + p) * groups * kColumns; }
};

// Rows of activations as int8, one scale a row, and their sums by span.
struct Activations {
  int64_t inputs, spans, span;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  Activations(int64_t rows, const Matrix& m)
      : inputs(m.inputs), spans(m.spans), span(m.span),
        codes(rows * m.inputs), scales(rows), sums(rows * m.spans) {}
};

struct Tile {
  const int8_t* a[kRows];
  const int32_t* sums[kRows];
  float* out[kRows];
  bool fetch;  // the first to read this slice fetches what comes after it
};

float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

constexpr uint32_t kInfinity = 0x7f800000;

// The largest magnitude by its bits, in which infinities and NaN come last; they make the whole row NaN.
float row_scale(uint32_t top_bits) {
  float top;
  std::memcpy(&top, &top_bits, 4);
  return top_bits < kInfinity ? top / 127 : std::numeric_limits<float>::quiet_NaN();
}

void quantise_portable(Activations& a, int64_t row, const float* x, int64_t width) {
  uint32_t top = 0;
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  const float scale = a.scales[row] = row_scale(top);
  const float inverse = scale > 0 ? 1 / scale : 0;
  int8_t* out = &a.codes[row * a.inputs];
  for (int64_t i = 0; i < a.inputs; ++i)
    out[i] = static_cast<int8_t>(i < width && inverse > 0 ? std::nearbyint(std::min(x[i] * inverse, 127.0f)) : 0);
  for (int64_t s = 0; s < a.spans; ++s) {
    int32_t sum = 0;
    for (int64_t i = s * a.span; i < (s + 1) * a.span; ++i) sum += out[i];
    a.sums[row * a.spans + s] = sum;
  }
}

float silu(float x) { return x / (1 + std::exp(-x)); }

// Adds spans `begin` to `end` of a panel to the rows' sums, which lack the rows' own scale yet.
template <int BITS>
void tile_portable(int rows, const Matrix& m, const uint8_t* w, const uint16_t* scales, int64_t begin, int64_t end,
                   const Tile& t) {
  constexpr int zero = BITS == 8 ? 128 : 8;
  for (int r = 0; r < rows; ++r)
    for (int64_t s = begin; s < end; ++s) {
      int32_t sum[kColumns];
      std::fill_n(sum, kColumns, -zero * t.sums[r][s]);
      for (int64_t k = s * m.span; k < (s + 1) * m.span; ++k) {
        const int64_t step = BITS == 8 ? k / 4 : k / 8;
        const int shift = BITS == 8 ? 0 : (k / 4 % 2) * 4;
        const uint8_t* bytes = w + step * kColumns * 4 + k % 4;
        for (int c = 0; c < kColumns; ++c) {
          const int code = BITS == 8 ? bytes[c * 4] : (bytes[c * 4] >> shift) & 15;
          sum[c] += code * t.a[r][k];
        }
      }
      const uint16_t* scale = scales + s / m.spans_per_group * kColumns;
      for (int c = 0; c < kColumns; ++c) t.out[r][c] += static_cast<float>(sum[c]) * widen(scale[c]);
    }
}

// 32 gates and 32 ups, and the row's scale, to 32 hidden values.
void swiglu_portable(const float* sums, float scale, float* hidden) {
  for (int c = 0; c < 32; ++c) hidden[c] = silu(sums[c] * scale) * (sums[c + 32] * scale);
}

}  // namespace
