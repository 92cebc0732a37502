// What a tile is, and the code for it that any machine runs. See moe.cpp for the layout.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

constexpr int kColumns = 64;
constexpr int kRows = 6;
constexpr int kBlock = 64;             // rows that read a slice of a panel before the next slice is touched
constexpr int64_t kSpan = 512;         // inputs at most between two conversions of integer sums
constexpr int64_t kFloatSpan = 64;     // inputs of a partial sum of floats
constexpr int64_t kSliceBytes = 16384;  // of a slice, unpacked, if a span is no longer: it stays in L1
constexpr int64_t kStepBytes = kColumns * 4;  // of codes that take a byte each: 4 inputs
constexpr int64_t kFetch = 65536;  // bytes: a stretch of memory that is fetched from several places in turn
constexpr int64_t kFetchAlone = 16384;  // the same for one tile: what lies behind its expert may not be needed

// Codes of 4 or 8 bits, or floats of 16 or 32, which have no scales.
struct Matrix {
  const uint8_t* codes;
  const uint16_t* scales;  // bf16
  int64_t inputs, panels, groups, span, spans, spans_per_group, spans_per_slice, bytes_per_span;
  int bits;

  Matrix(const uint8_t* c, const uint16_t* s, int64_t in, int64_t out, int64_t group, int b)
      : codes(c), scales(s), inputs(in), panels(out / kColumns), groups(in / group), span(span_of(group)),
        spans(in / span), spans_per_group(group / span), bytes_per_span(kColumns * span * b / 8), bits(b) {
    const int64_t unpacked = kColumns * span * (bits > 8 ? 4 : 1);
    spans_per_slice = std::max<int64_t>(1, kSliceBytes / unpacked);
  }
  // The most inputs up to kSpan that divide a group, in steps of 32.
  static int64_t span_of(int64_t group) {
    int64_t span = std::min(group, kSpan);
    while (group % span) span -= 32;
    return span;
  }
  const uint8_t* panel(int64_t e, int64_t p) const { return codes + (e * panels + p) * spans * bytes_per_span; }
  const uint16_t* scale(int64_t e, int64_t p) const {
    return scales == nullptr ? nullptr : scales + (e * panels + p) * groups * kColumns;
  }
};

// An array that nobody filled with zeros.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  explicit Buffer(int64_t size) : data(new T[size]) {}
  T& operator[](int64_t at) const { return data[at]; }
};

// Rows of activations as int8. Each span has a scale, its group's, and the value at which its integer sums start:
// -zero * (sum of the codes).
struct Activations {
  int64_t inputs, stride, spans, span, spans_per_group;
  int zero;
  Buffer<int8_t> codes;
  Buffer<float> scales;
  Buffer<int32_t> starts;

  // Rows start on different cache sets: a power of two apart they would push each other out of L1.
  Activations(int64_t rows, const Matrix& m)
      : inputs(m.inputs), stride(m.inputs + 64), spans(m.spans), span(m.span), spans_per_group(m.spans_per_group),
        zero(1 << (m.bits - 1)), codes(rows * stride), scales(rows * m.spans), starts(rows * m.spans) {}
};

// Part of a panel, spans `begin` to `end` of the inputs, that every tile reads before the next slice is touched.
struct Slice {
  int64_t begin, end;
  const uint8_t* w;
  const uint16_t* w_scales;  // the panel's
  uint8_t* unpacked;         // codes as bytes, floats as fp32: the first of several tiles writes, the others read
  int share;                 // of the tiles that read it: 1 for one, 2 for two or three, 4 for more
  int64_t apart, advance;    // of what is fetched in each step: bytes between its lines, and to those of the next step
};

// A few rows.
struct Tile {
  int rows;
  const int8_t* a[kRows];
  const float* scales[kRows];
  const int32_t* starts[kRows];
  float* out;                // kColumns a row
  const uint8_t* ahead;      // what is fetched meanwhile
};

// Calls `tile` with a tile's number of rows as a constant.
template <typename Call>
void with_rows(int rows, Call tile) {
  switch (rows) {
    case 1: return tile(std::integral_constant<int, 1>());
    case 2: return tile(std::integral_constant<int, 2>());
    case 3: return tile(std::integral_constant<int, 3>());
    case 4: return tile(std::integral_constant<int, 4>());
    case 5: return tile(std::integral_constant<int, 5>());
    default: return tile(std::integral_constant<int, kRows>());
  }
}

float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

constexpr uint32_t kInfinity = 0x7f800000;

// To the nearest, ties to even, as torch rounds.
uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>((bits & 0x7fffffff) > kInfinity ? 0x7fc0 : rounded >> 16);
}

// Of the largest magnitude by its bits, in which infinities and NaN come last: they make the group, and so the row's
// results, NaN. A group so small that 1 / scale overflows counts as zero.
float code_scale(uint32_t top_bits) {
  if (top_bits >= kInfinity) return std::numeric_limits<float>::quiet_NaN();
  float top;
  std::memcpy(&top, &top_bits, 4);
  return top < 127 * std::numeric_limits<float>::min() ? 0 : top / 127;
}

// One scale for each group of inputs, the groups of the weights.
void quantise_portable(Activations& a, int64_t row, const float* x, int64_t width) {
  int8_t* out = &a.codes[row * a.stride];
  float scale = 0, inverse = 0;
  for (int64_t s = 0; s < a.spans; ++s) {
    const int64_t begin = s * a.span, end = begin + a.span;
    if (s % a.spans_per_group == 0) {
      uint32_t top = 0;
      for (int64_t i = begin; i < std::min(begin + a.span * a.spans_per_group, width); ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        top = std::max(top, bits & 0x7fffffff);
      }
      scale = code_scale(top);
      inverse = scale > 0 ? 1 / scale : 0;
    }
    int32_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<int8_t>(i < width && inverse > 0 ? std::nearbyint(std::min(x[i] * inverse, 127.0f)) : 0);
      sum += out[i];
    }
    a.scales[row * a.spans + s] = scale;
    a.starts[row * a.spans + s] = -a.zero * sum;
  }
}

float silu(float x) { return x / (1 + std::exp(-x)); }

// Adds spans of a panel to the rows' sums, the first of all with nothing before it.
template <int BITS>
void tile_portable(const Matrix& m, const Slice& slice, const Tile& t) {
  for (int r = 0; r < t.rows; ++r)
    for (int64_t s = slice.begin; s < slice.end; ++s) {
      int32_t sum[kColumns];
      std::fill_n(sum, kColumns, t.starts[r][s]);
      for (int64_t i = 0; i < m.span; ++i) {
        const int64_t k = (s - slice.begin) * m.span + i, step = BITS == 8 ? k / 4 : k / 8;
        const int shift = BITS == 8 ? 0 : (k / 4 % 2) * 4;
        const uint8_t* bytes = slice.w + step * kStepBytes + k % 4;
        for (int c = 0; c < kColumns; ++c) {
          const int code = BITS == 8 ? bytes[c * 4] : (bytes[c * 4] >> shift) & 15;
          sum[c] += code * t.a[r][s * m.span + i];
        }
      }
      const uint16_t* scale = slice.w_scales + s / m.spans_per_group * kColumns;
      float* out = t.out + r * kColumns;
      for (int c = 0; c < kColumns; ++c)
        out[c] = static_cast<float>(sum[c]) * (widen(scale[c]) * t.scales[r][s]) + (s > 0 ? out[c] : 0.0f);
    }
}

// 32 gates and 32 ups to 32 hidden values.
void swiglu_portable(const float* sums, float* hidden) {
  for (int c = 0; c < 32; ++c) hidden[c] = silu(sums[c]) * sums[c + 32];
}

}  // namespace
