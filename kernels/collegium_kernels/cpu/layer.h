// One layer of SwiGLU experts over ragged rows, for any engine: what holds the weights and multiplies with them.
//
// Panels of the first product hold 32 gate columns, then the 32 up columns that belong to them.
// Every sum runs over the inputs in order and every token adds its experts in order of their number, so a token's
// result has the same bits whatever the batch and the number of threads.
#pragma once
#include <atomic>
#include <exception>
#include <new>
#include <thread>

#include "tiles.h"

namespace {

// OpenMP's way to run a function on a team of threads.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

constexpr int kShares = 4;  // parts a thread: experts have unequal rows

struct Problem {
  const void* x;  // T x D, fp32 or bf16
  void* y;        // the same
  bool narrow_x, narrow_y;  // bf16
  int64_t T, D, F, E;
  const int64_t* indptr;
  int64_t num_pairs;
  const int64_t* ids;
  const float* weights;
  int threads;
  Team team;  // of the runtime that torch runs on: warm, and bound to the cores it should use; null where there is none

  bool rises() const { return indptr[0] == 0 && indptr[T] == num_pairs && std::is_sorted(indptr, indptr + T + 1); }
};

// Parts of the items, which threads take as they come. Running out of memory in one of them ends as in the caller.
template <typename Work>
struct Job {
  const Work& work;
  int64_t items, parts;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  void run() {
    for (int64_t i; (i = next++) < parts;) try {
        work(items * i / parts, items * (i + 1) / parts);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
  }
};

template <typename Work>
void parallel(const Problem& p, int64_t items, const Work& work) {
  const int64_t threads = std::min<int64_t>(std::max(p.threads, 1), items);
  Job<Work> job{work, items, threads > 1 ? std::min(items, threads * kShares) : threads};
  std::vector<std::thread> others;
  if (threads > 1 && p.team != nullptr) {
    p.team([](void* it) { static_cast<Job<Work>*>(it)->run(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    try {
      for (int64_t i = 1; i < threads; ++i) others.emplace_back([&] { job.run(); });
    } catch (const std::exception&) {  // as many as the system grants, and has memory for
    }
    job.run();
    for (auto& other : others) other.join();
  }
  if (job.failed) throw std::bad_alloc();
}

// The transpose of the routing: rows by expert, in token order. Ids outside [0, E) are dropped.
struct Rows {
  std::vector<int64_t> starts, tokens, pairs, used;  // `used`: the experts that have rows

  explicit Rows(const Problem& p) : starts(p.E + 1) {
    const auto known = [&](int64_t pair) { return p.ids[pair] >= 0 && p.ids[pair] < p.E; };
    for (int64_t pair = 0; pair < p.num_pairs; ++pair)
      if (known(pair)) ++starts[p.ids[pair] + 1];
    for (int64_t e = 0; e < p.E; ++e) {
      if (starts[e + 1] > 0) used.push_back(e);
      starts[e + 1] += starts[e];
    }
    tokens.resize(starts[p.E]);
    pairs.resize(starts[p.E]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t pair = p.indptr[t]; pair < p.indptr[t + 1]; ++pair)
        if (known(pair)) {
          const int64_t row = next[p.ids[pair]]++;
          tokens[row] = t;
          pairs[row] = pair;
        }
  }
};

// Calls `block` with the first row and the number of each block of an expert's rows.
template <typename Block>
void blocks(const Rows& rows, int64_t e, int64_t size, Block block) {
  for (int64_t first = rows.starts[e]; first < rows.starts[e + 1]; first += size)
    block(first, static_cast<int>(std::min(size, rows.starts[e + 1] - first)));
}

template <typename Tile>
struct Sums {
  float row[kBlock][kColumns];
  alignas(64) uint8_t slice[kColumns * kSpan];  // unpacked
  Tile tiles[(kBlock + kRows - 1) / kRows];
};

// Tiles of equal height, to the unit, for `count` rows. Returns their number.
template <typename Engine, typename RowOf>
int split(const Engine& engine, const typename Engine::Inputs& a, int count, RowOf row_of,
          Sums<typename Engine::Tile>& sums) {
  const int tiles = (count + kRows - 1) / kRows;
  for (int i = 0, first = 0; i < tiles; ++i) {
    auto& t = sums.tiles[i];
    t.rows = (count - first) / (tiles - i);
    t.out = sums.row[first];
    for (int r = 0; r < t.rows; ++r) engine.point(t, r, a, row_of(first + r));
    first += t.rows;
  }
  return tiles;
}

// One panel for `count` rows, at most kBlock: every slice of the panel is read from L1 by all of them, and each fetches
// its part of what comes next: memory is read all the time.
template <typename Engine, typename RowOf>
void panel_sums(const Engine& engine, const Matrix& m, int64_t e, int64_t p, const typename Engine::Inputs& a,
                int count, RowOf row_of, Sums<typename Engine::Tile>& sums) {
  Slice slice;
  const int tiles = split(engine, a, count, row_of, sums);
  slice.share = tiles == 1 ? 1 : tiles < 4 ? 2 : 4;
  slice.w_scales = m.scale(e, p);
  slice.unpacked = sums.slice;
  const int lines = engine.step_lines / slice.share;
  slice.advance = (engine.step_lines * 64 + tiles * lines - 1) / (tiles * lines);
  for (slice.begin = 0; slice.begin < m.spans; slice.begin = slice.end) {
    slice.end = std::min(slice.begin + m.spans_per_slice, m.spans);
    slice.w = m.panel(e, p) + slice.begin * m.bytes_per_span;
    const int64_t bytes = (slice.end - slice.begin) * m.bytes_per_span;
    const int64_t stretch = std::max(bytes, tiles == 1 ? kFetchAlone : kFetch);
    const int64_t at = (slice.w - m.codes) % stretch;
    slice.apart = stretch / lines;
    const uint8_t* next = slice.w - at + stretch + at / lines;
    for (int i = 0; i < tiles; ++i) {
      sums.tiles[i].ahead = next + i * bytes / tiles / lines;
      engine.tile(i == 0, m, slice, sums.tiles[i]);
    }
  }
}

// The same where `planes` rows of inputs stand for one.
template <typename Engine, typename RowOf>
void row_sums(const Engine& engine, const Matrix& m, int64_t e, int64_t p, const typename Engine::Inputs& a, int count,
              RowOf row_of, Sums<typename Engine::Tile>& sums) {
  const int planes = engine.planes;
  if (planes == 1) return panel_sums(engine, m, e, p, a, count, row_of, sums);
  panel_sums(engine, m, e, p, a, count * planes, [&](int r) { return row_of(r / planes) * planes + r % planes; }, sums);
  for (int r = 0; r < count; ++r)
    for (int c = 0; c < kColumns; ++c) sums.row[r][c] = sums.row[2 * r][c] + sums.row[2 * r + 1][c];
}

// A token in fp32; in `wide` where it is bf16.
const float* token(const Problem& p, int64_t t, std::vector<float>& wide) {
  if (!p.narrow_x) return static_cast<const float*>(p.x) + t * p.D;
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + t * p.D;
  std::transform(x, x + p.D, wide.begin(), widen);
  return wide.data();
}

template <typename Engine>
void run(const Engine& engine, const Problem& p) {
  const Matrix &up = engine.up, &down = engine.down;
  const Rows rows(p);
  const int64_t count = rows.starts[p.E], width = up.panels * 32, size = kBlock / engine.planes;

  auto in = engine.inputs(p.T, up);
  parallel(p, p.T, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(p.narrow_x ? p.D : 0);
    for (int64_t t = begin; t < end; ++t)
      if (p.indptr[t + 1] > p.indptr[t]) engine.put(in, t, token(p, t, wide), p.D);
  });
  const Buffer<float> own_y(p.narrow_y ? p.T * p.D : 0);
  float* const y = p.narrow_y ? own_y.data.get() : static_cast<float*>(p.y);
  // Hidden values lie in y where they fit: with few experts a token it is not needed before they are used up.
  const Buffer<float> own(count * width > p.T * p.D ? count * width : 0);
  float* const hidden = count * width > p.T * p.D ? own.data.get() : y;
  parallel(p, rows.used.size() * up.panels, [&](int64_t begin, int64_t end) {
    Sums<typename Engine::Tile> sums;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t e = rows.used[item / up.panels], panel = item % up.panels;
      blocks(rows, e, size, [&](int64_t first, int n) {
        row_sums(engine, up, e, panel, in, n, [&](int r) { return rows.tokens[first + r]; }, sums);
        for (int r = 0; r < n; ++r) engine.swiglu(sums.row[r], hidden + (first + r) * width + panel * 32);
      });
    }
  });
  auto mid = engine.inputs(count, down);
  parallel(p, count, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) engine.put(mid, row, hidden + row * width, p.F);
  });
  std::fill_n(y, p.T * p.D, 0.0f);
  parallel(p, down.panels, [&](int64_t begin, int64_t end) {
    Sums<typename Engine::Tile> sums;
    for (const int64_t e : rows.used)
      for (int64_t panel = begin; panel < end; ++panel)
        blocks(rows, e, size, [&](int64_t first, int n) {
          row_sums(engine, down, e, panel, mid, n, [&](int r) { return first + r; }, sums);
          const int64_t columns = std::min<int64_t>(kColumns, p.D - panel * kColumns);
          for (int r = 0; r < n; ++r) {
            float* out = y + rows.tokens[first + r] * p.D + panel * kColumns;
            const float weight = p.weights[rows.pairs[first + r]];
            for (int64_t c = 0; c < columns; ++c) out[c] += weight * sums.row[r][c];
          }
        });
  });
  if (p.narrow_y)
    parallel(p, p.T, [&](int64_t begin, int64_t end) {
      std::transform(y + begin * p.D, y + end * p.D, static_cast<uint16_t*>(p.y) + begin * p.D, narrow);
    });
}

}  // namespace
