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
constexpr int kRows = 4;

struct Matrix {
  const uint8_t* codes;
  const uint16_t* scales;  // bf16
  int64_t inputs, panels, groups, group, bytes_per_panel;

  Matrix(const uint8_t* c, const uint16_t* s, int64_t in, int64_t out, int64_t g, int bits)
      : codes(c), scales(s), inputs(in), panels(out / kColumns), groups(in / g), group(g),
        bytes_per_panel(in * kColumns * bits / 8) {}
  const uint8_t* panel(int64_t e, int64_t p) const { return codes + (e * panels + p) * bytes_per_panel; }
  const uint16_t* scale(int64_t e, int64_t p) const { return scales + (e * panels + p) * groups * kColumns; }
};

// Rows of activations as int8, one scale a row, and their sums by group.
struct Activations {
  int64_t inputs, groups, group;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  Activations(int64_t rows, const Matrix& m)
      : inputs(m.inputs), groups(m.groups), group(m.group),
        codes(rows * m.inputs), scales(rows), sums(rows * m.groups) {}
};

struct Tile {
  const int8_t* a[kRows];
  const int32_t* sums[kRows];
  float scale[kRows];
  float out[kRows][kColumns];
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
  for (int64_t g = 0; g < a.groups; ++g) {
    int32_t sum = 0;
    for (int64_t i = g * a.group; i < (g + 1) * a.group; ++i) sum += out[i];
    a.sums[row * a.groups + g] = sum;
  }
}

float silu(float x) { return x / (1 + std::exp(-x)); }

template <int BITS>
void tile_portable(int rows, const Matrix& m, const uint8_t* w, const uint16_t* scales, Tile& t) {
  constexpr int zero = BITS == 8 ? 128 : 8;
  for (int r = 0; r < rows; ++r) {
    std::fill_n(t.out[r], kColumns, 0.0f);
    for (int64_t g = 0; g < m.groups; ++g) {
      int32_t sum[kColumns];
      std::fill_n(sum, kColumns, -zero * t.sums[r][g]);
      for (int64_t k = g * m.group; k < (g + 1) * m.group; ++k) {
        const int64_t step = BITS == 8 ? k / 4 : k / 8;
        const int shift = BITS == 8 ? 0 : (k / 4 % 2) * 4;
        const uint8_t* bytes = w + step * kColumns * 4 + k % 4;
        for (int c = 0; c < kColumns; ++c) {
          const int code = BITS == 8 ? bytes[c * 4] : (bytes[c * 4] >> shift) & 15;
          sum[c] += code * t.a[r][k];
        }
      }
      for (int c = 0; c < kColumns; ++c) t.out[r][c] += static_cast<float>(sum[c]) * widen(scales[g * kColumns + c]);
    }
    for (int c = 0; c < kColumns; ++c) t.out[r][c] *= t.scale[r];
  }
}

void swiglu_portable(int rows, Tile& t) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 32; ++c) t.out[r][c] = silu(t.out[r][c]) * t.out[r][c + 32];
}

}  // namespace
