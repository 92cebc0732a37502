// SwiGLU experts for ragged rows: int8 or int4 weights with int8 activations on any CPU, float weights on AVX512.
// C ABI, no torch, no OpenMP but for the team that the caller names.
//
// Codes are unsigned, c with value (c - zero) * scale; a scale covers `group` codes of a row. A panel holds 64 output
// columns: for each step of 4 inputs, 64 columns x 4 codes; int4 puts two steps in the halves of a byte.
// Activations are signed and have a scale for the same groups. The zero is subtracted by starting each integer sum at
// -zero * (sum of the activations). With two planes the second row holds what the first one's rounding left.
#include "layer.h"
#if defined(__x86_64__)
#include "floats.h"
#include "tiles_avx512.h"
#endif

namespace {

// What the float kernels and swiglu_avx512 are compiled for. Xeon Phi has the first alone.
bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_vnni() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

using TileFunction = void (*)(const Matrix&, const Slice&, const Tile&);

struct Code {
  TileFunction first, rest;  // of the tiles that read a slice
  void (*quantise)(Activations&, int64_t, const float*, int64_t);
  void (*swiglu)(const float*, float*);
};

Code pick(int bits, bool portable) {
#if defined(__x86_64__)
  if (!portable && has_vnni())
    return {bits == 8 ? tile_avx512<8, true> : tile_avx512<4, true>,
            bits == 8 ? tile_avx512<8, false> : tile_avx512<4, false>, quantise_avx512, swiglu_avx512};
#endif
  const TileFunction tile = bits == 8 ? tile_portable<8> : tile_portable<4>;
  return {tile, tile, quantise_portable, swiglu_portable};
}

struct Codes {
  using Inputs = Activations;
  using Tile = ::Tile;
  Code code;
  Matrix up, down;
  int planes, step_lines;  // eight inputs a step

  Activations inputs(int64_t rows, const Matrix& m) const { return Activations(rows * planes, m); }
  void put(Activations& a, int64_t row, const float* x, int64_t width) const {
    code.quantise(a, row * planes, x, width);
    if (planes == 1) return;
    std::vector<float> rest(x, x + width);
    const int8_t* codes = &a.codes[row * 2 * a.stride];
    const float* scales = &a.scales[row * 2 * a.spans];
    for (int64_t i = 0; i < width; ++i) rest[i] -= codes[i] * scales[i / a.span];
    code.quantise(a, row * 2 + 1, rest.data(), width);
  }
  void point(Tile& t, int r, const Activations& a, int64_t row) const {
    t.a[r] = &a.codes[row * a.stride];
    t.scales[r] = &a.scales[row * a.spans];
    t.starts[r] = &a.starts[row * a.spans];
  }
  void tile(bool first, const Matrix& m, const Slice& slice, const Tile& t) const {
    (first ? code.first : code.rest)(m, slice, t);
  }
  void swiglu(const float* sums, float* hidden) const { code.swiglu(sums, hidden); }
};

int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

#if defined(__x86_64__)
template <int KIND>
void run_floats(const Problem& p, const uint8_t* w1, const uint8_t* w2) {
  const int bits = KIND == kFp32 ? 32 : 16;
  const Matrix up(w1, nullptr, up_to(p.D, kFloatSpan), up_to(p.F, 32) * 2, kFloatSpan, bits);
  const Matrix down(w2, nullptr, up_to(p.F, kFloatSpan), up_to(p.D, 64), kFloatSpan, bits);
  run(Floats<KIND>{up, down}, p);
}
#endif

}  // namespace

extern "C" {

int collegium_has_vnni() { return has_vnni(); }
int collegium_has_avx512() { return has_avx512(); }
int collegium_is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return 0;
#endif
}

// y (T x D) = experts of x (T x D), each fp32, or bf16 where narrow, apart in memory. D and F are the true widths; the
// packed ones are rounded up to `inputs` and 64.
// Both return 0, 1 when indptr does not rise from 0 to pairs, 2 when memory ran out.
int collegium_moe(const void* x, void* y, int narrow_x, int narrow_y, int64_t T, int64_t D, int64_t F, int64_t E,
                  const int64_t* indptr, int64_t num_pairs, const int64_t* ids, const float* weights, int threads,
                  Team team, int bits, int64_t group1, int64_t group2, int64_t inputs1, int64_t inputs2,
                  const uint8_t* w1, const uint16_t* s1, const uint8_t* w2, const uint16_t* s2, int planes,
                  int portable) try {
  const Problem problem{x, y, narrow_x != 0, narrow_y != 0, T, D, F, E, indptr, num_pairs, ids, weights, threads, team};
  if (!problem.rises()) return 1;
  const Matrix up(w1, s1, inputs1, up_to(F, 32) * 2, group1, bits);
  const Matrix down(w2, s2, inputs2, up_to(D, 64), group2, bits);
  run(Codes{pick(bits, portable), up, down, planes, bits}, problem);
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

// kind: 0 fp32, 1 bf16, 2 fp16; packed widths are rounded up to 64. Returns 3 where there is no AVX512.
int collegium_moe_floats(const void* x, void* y, int narrow_x, int narrow_y, int64_t T, int64_t D, int64_t F, int64_t E,
                         const int64_t* indptr, int64_t num_pairs, const int64_t* ids, const float* weights,
                         int threads, Team team, int kind, const uint8_t* w1, const uint8_t* w2) try {
  const Problem problem{x, y, narrow_x != 0, narrow_y != 0, T, D, F, E, indptr, num_pairs, ids, weights, threads, team};
  if (!problem.rises()) return 1;
#if defined(__x86_64__)
  if (has_avx512()) {
    if (kind == kFp32) run_floats<kFp32>(problem, w1, w2);
    if (kind == kBf16) run_floats<kBf16>(problem, w1, w2);
    if (kind == kFp16) run_floats<kFp16>(problem, w1, w2);
    return 0;
  }
#endif
  return 3;
} catch (const std::bad_alloc&) {
  return 2;
}
}
