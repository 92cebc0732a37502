// SwiGLU experts for ragged rows: int8 or int4 weights with int8 activations on any CPU, float weights on AVX512. C ABI,
// no torch, no OpenMP.
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

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

bool has_vnni() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

struct Code {
  void (*tile_)(int, const Matrix&, const Tile&);
  void (*unpacked)(int, const Matrix&, const Tile&);  // for int4 codes that `unpack` made bytes
  void (*unpack)(const uint8_t*, int64_t, uint8_t*);  // none in the portable code
  void (*quantise)(Activations&, int64_t, const float*, int64_t);
  void (*swiglu)(const float*, float*);
};

Code pick(int bits, bool portable) {
#if defined(__x86_64__)
  if (!portable && has_vnni())
    return {bits == 8 ? tile_avx512<8> : tile_avx512<4>, tile_avx512<8>, bits == 8 ? nullptr : unpack_avx512,
            quantise_avx512, swiglu_avx512};
#endif
  return {bits == 8 ? tile_portable<8> : tile_portable<4>, nullptr, nullptr, quantise_portable, swiglu_portable};
}

struct Codes {
  using Inputs = Activations;
  using Tile = ::Tile;
  Code code;
  Matrix up, down;
  int planes;

  Activations inputs(int64_t rows, const Matrix& m) const { return Activations(rows * planes, m); }
  void put(Activations& a, int64_t row, const float* x, int64_t width) const {
    code.quantise(a, row * planes, x, width);
    if (planes == 1) return;
    std::vector<float> rest(x, x + width);
    for (int64_t i = 0; i < width; ++i) rest[i] -= a.codes[row * 2 * a.stride + i] * a.scales[row * 2 * a.spans + i / a.span];
    code.quantise(a, row * 2 + 1, rest.data(), width);
  }
  void start(Tile& t, const Matrix& m, int64_t e, int64_t p) const { t.w_scales = m.scale(e, p); }
  void point(Tile& t, int r, const Activations& a, int64_t row) const {
    t.a[r] = &a.codes[row * a.stride];
    t.scales[r] = &a.scales[row * a.spans];
    t.starts[r] = &a.starts[row * a.spans];
  }
  bool can_unpack() const { return code.unpack != nullptr; }
  int64_t step_bytes(bool unpacked) const { return kStepBytes / (unpacked ? 2 : 1); }
  void unpack(const uint8_t* w, int64_t bytes, uint8_t* out) const { code.unpack(w, bytes, out); }
  void tile(bool unpacked, int rows, const Matrix& m, const Tile& t) const {
    (unpacked ? code.unpacked : code.tile_)(rows, m, t);
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

// y (T x D) = experts of x (T x D). D and F are the true widths; the packed ones are rounded up to `inputs` and 64.
// Both return 0, 1 when indptr does not rise from 0 to pairs, 2 when memory ran out.
int collegium_moe(const float* x, float* y, int64_t T, int64_t D, int64_t F, int64_t E, const int64_t* indptr,
                  int64_t num_pairs, const int64_t* ids, const float* weights, int threads, Team team, int bits, int64_t group1,
                  int64_t group2, int64_t inputs1, int64_t inputs2, const uint8_t* w1, const uint16_t* s1,
                  const uint8_t* w2, const uint16_t* s2, int planes, int portable) try {
  const Problem problem{x, y, T, D, F, E, indptr, num_pairs, ids, weights, threads, team};
  if (!problem.rises()) return 1;
  const Matrix up(w1, s1, inputs1, up_to(F, 32) * 2, group1, bits);
  const Matrix down(w2, s2, inputs2, up_to(D, 64), group2, bits);
  run(Codes{pick(bits, portable), up, down, planes}, problem);
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

// kind: 0 fp32, 1 bf16, 2 fp16; packed widths are rounded up to 64. Returns 3 where there is no AVX512.
int collegium_moe_floats(const float* x, float* y, int64_t T, int64_t D, int64_t F, int64_t E, const int64_t* indptr,
                         int64_t num_pairs, const int64_t* ids, const float* weights, int threads, Team team, int kind,
                         const uint8_t* w1, const uint8_t* w2) try {
  const Problem problem{x, y, T, D, F, E, indptr, num_pairs, ids, weights, threads, team};
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
