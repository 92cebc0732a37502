// SwiGLU experts with int8 or int4 weights and int8 activations, for ragged rows. C ABI, no torch, no OpenMP.
//
// Weights are unsigned codes c with value (c - zero) * scale; a scale covers `group` codes of a row. A panel holds 64
// output columns: for each step of 4 inputs, 64 columns x 4 codes; int4 puts two steps in the halves of a byte. Panels
// of the first product hold 32 gate columns, then the 32 up columns that belong to them.
// Activations are signed and have a scale for the same groups. The zero is subtracted by starting each integer sum at
// -zero * (sum of the activations).
// Every sum runs over the inputs in order and every token adds its experts in order of their number, so a token's
// result has the same bits whatever the batch and the number of threads.
#include <new>
#include <thread>

#include "tiles.h"
#if defined(__x86_64__)
#include "tiles_avx512.h"
#endif

namespace {

using TileFunction = void (*)(int, const Matrix&, const Tile&);

struct Code {
  TileFunction tile;
  TileFunction unpacked;  // for int4 codes that `unpack` made bytes; none in the portable code
  void (*unpack)(const uint8_t*, int64_t, uint8_t*);
  void (*quantise)(Activations&, int64_t, const float*, int64_t);
  void (*swiglu)(const float*, float*);
};

bool has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

Code pick(int bits, bool portable) {
#if defined(__x86_64__)
  if (!portable && has_vnni())
    return {bits == 8 ? tile_avx512<8> : tile_avx512<4>, tile_avx512<8>, bits == 8 ? nullptr : unpack_avx512,
            quantise_avx512, swiglu_avx512};
#endif
  return {bits == 8 ? tile_portable<8> : tile_portable<4>, nullptr, nullptr, quantise_portable, swiglu_portable};
}

template <typename Work>
void parallel(int threads, int64_t items, Work work) {
  const int used = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(items, 1)));
  std::vector<std::thread> others;
  for (int i = 1; i < used; ++i) others.emplace_back([&, i] { work(items * i / used, items * (i + 1) / used); });
  work(0, items / used);
  for (auto& other : others) other.join();
}

// The transpose of the routing: rows by expert, in token order. Ids outside [0, E) are dropped.
struct Rows {
  std::vector<int64_t> starts, tokens, pairs;

  Rows(int64_t T, int64_t E, const int64_t* indptr, const int64_t* ids) : starts(E + 1) {
    for (int64_t p = 0; p < indptr[T]; ++p)
      if (ids[p] >= 0 && ids[p] < E) ++starts[ids[p] + 1];
    for (int64_t e = 0; e < E; ++e) starts[e + 1] += starts[e];
    tokens.resize(starts[E]);
    pairs.resize(starts[E]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t p = indptr[t]; p < indptr[t + 1]; ++p)
        if (ids[p] >= 0 && ids[p] < E) {
          const int64_t row = next[ids[p]]++;
          tokens[row] = t;
          pairs[row] = p;
        }
  }
};

constexpr int kUnpack = 3;  // tiles that share a slice: so many pay for unpacking it first

struct Sums {
  float row[kBlock][kColumns];
  alignas(64) uint8_t slice[kColumns * kSpan];  // of int4 codes, unpacked
};

// One panel for `count` rows, at most kBlock: every slice of the panel is read from L1 by all of them, and each of them
// fetches its part of the next slice: memory is read all the time.
template <typename RowOf>
void panel_sums(const Code& code, const Matrix& m, int64_t e, int64_t p, const Activations& a, int count, RowOf row_of,
                Sums& sums) {
  const int tiles = (count + kRows - 1) / kRows;
  Tile t;
  t.w_scales = m.scale(e, p);
  const bool unpack = code.unpack != nullptr && tiles >= kUnpack;
  t.advance = (kStepBytes / (unpack ? 2 : 1) + tiles - 1) / tiles;
  for (t.begin = 0; t.begin < m.spans; t.begin = t.end) {
    t.end = std::min(t.begin + m.spans_per_slice, m.spans);
    t.w = m.panel(e, p) + t.begin * m.bytes_per_span;
    const int64_t bytes = (t.end - t.begin) * m.bytes_per_span;
    const uint8_t* next = t.w + bytes;
    if (unpack) {
      code.unpack(t.w, bytes, sums.slice);
      t.w = sums.slice;
    }
    for (int i = 0, first = 0; i < tiles; ++i) {
      const int rows = (count - first) / (tiles - i);
      t.ahead = next + i * bytes / tiles;
      t.out = sums.row[first];
      for (int r = 0; r < rows; ++r) {
        const int64_t row = row_of(first + r);
        t.a[r] = &a.codes[row * a.stride];
        t.scales[r] = &a.scales[row * a.spans];
        t.starts[r] = &a.starts[row * a.spans];
      }
      (unpack ? code.unpacked : code.tile)(rows, m, t);
      first += rows;
    }
  }
}

// Calls `block` with the first row and the number of each block of an expert's rows.
template <typename Block>
void blocks(const Rows& rows, int64_t e, Block block) {
  for (int64_t first = rows.starts[e]; first < rows.starts[e + 1]; first += kBlock)
    block(first, static_cast<int>(std::min<int64_t>(kBlock, rows.starts[e + 1] - first)));
}

}  // namespace

extern "C" {

int collegium_has_vnni() { return has_vnni(); }

// y (T x D) = experts of x (T x D). D and F are the true widths; the packed ones are rounded up to `inputs` and 64.
// Returns 0, 1 when indptr does not rise from 0 to pairs, 2 when memory ran out.
int collegium_moe(const float* x, float* y, int64_t T, int64_t D, int64_t F, int64_t E, int bits, int64_t group1,
                  int64_t group2, int64_t inputs1, int64_t inputs2, const uint8_t* w1, const uint16_t* s1,
                  const uint8_t* w2, const uint16_t* s2, const int64_t* indptr, int64_t num_pairs, const int64_t* ids,
                  const float* weights, int threads, int portable) try {
  if (indptr[0] != 0 || indptr[T] != num_pairs) return 1;
  for (int64_t t = 0; t < T; ++t)
    if (indptr[t] > indptr[t + 1]) return 1;
  const Code code = pick(bits, portable);
  const Matrix up(w1, s1, inputs1, (F + 31) / 32 * 64, group1, bits);
  const Matrix down(w2, s2, inputs2, (D + 63) / 64 * 64, group2, bits);
  const Rows rows(T, E, indptr, ids);
  const int64_t count = rows.starts[E];
  std::fill_n(y, T * D, 0.0f);

  Activations in(T, up);
  parallel(threads, T, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (indptr[t + 1] > indptr[t]) code.quantise(in, t, x + t * D, D);
  });
  const Buffer<float> hidden(count * up.panels * 32);
  parallel(threads, E * up.panels, [&](int64_t begin, int64_t end) {
    Sums sums;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t e = item / up.panels, p = item % up.panels;
      blocks(rows, e, [&](int64_t first, int n) {
        const auto token = [&](int r) { return rows.tokens[first + r]; };
        panel_sums(code, up, e, p, in, n, token, sums);
        for (int r = 0; r < n; ++r)
          code.swiglu(sums.row[r], &hidden[(first + r) * up.panels * 32 + p * 32]);
      });
    }
  });
  Activations mid(count, down);
  parallel(threads, count, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) code.quantise(mid, row, &hidden[row * up.panels * 32], F);
  });
  parallel(threads, down.panels, [&](int64_t begin, int64_t end) {
    Sums sums;
    for (int64_t e = 0; e < E; ++e)
      for (int64_t p = begin; p < end; ++p)
        blocks(rows, e, [&](int64_t first, int n) {
          panel_sums(code, down, e, p, mid, n, [&](int r) { return first + r; }, sums);
          const int64_t width = std::min<int64_t>(kColumns, D - p * kColumns);
          for (int r = 0; r < n; ++r) {
            float* out = y + rows.tokens[first + r] * D + p * kColumns;
            const float weight = weights[rows.pairs[first + r]];
            for (int64_t c = 0; c < width; ++c) out[c] += weight * sums.row[r][c];
          }
        });
  });
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}
}
