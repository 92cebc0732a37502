// moe.cpp at edge shapes with exactly sized buffers and wild ids, for the sanitizers.
#include <cstdio>
#include <cstdlib>

#include "moe.cpp"

namespace {

struct Case {
  int64_t T, D, F, E;
  std::vector<float> x, y, weights;
  std::vector<int64_t> indptr, ids;

  Case(int64_t tokens, int64_t width, int64_t experts)
      : T(tokens), D(width), F(width / 2 + 1), E(experts), x(T * D), y(T * D), indptr(T + 1) {
    for (auto& v : x) v = static_cast<float>(rand()) / RAND_MAX - 0.5f;
    for (int64_t i = 0; i < T * D; ++i)
      if (i / D % 4 == 1) x[i] *= 1e-38f;  // too small for any scale
    const int64_t wild[] = {0, -1, E - 1, E, INT64_MAX, INT64_MIN, 1LL << 32, 0};
    for (int64_t t = 0; t < T; ++t) indptr[t + 1] = indptr[t] + t % 3;
    for (int64_t p = 0; p < indptr[T]; ++p) ids.push_back(wild[p % 8]);
    weights.assign(ids.size(), 0.5f);
  }
};

// One call; returns its code.
int run(Case c, int bits, int64_t group, int planes, int portable, int threads, Team team = nullptr) {
  const int64_t inputs1 = up_to(c.D, group ? group : 32), inputs2 = up_to(c.F, group ? group : 32);
  const int64_t span1 = group ? group : inputs1, span2 = group ? group : inputs2;
  const int64_t columns1 = c.E * up_to(c.F, 32) * 2, columns2 = c.E * up_to(c.D, 64);
  const std::vector<uint8_t> w1(columns1 * inputs1 * bits / 8, 0x5a), w2(columns2 * inputs2 * bits / 8, 0xa5);
  const std::vector<uint16_t> s1(columns1 * (inputs1 / span1), 0x3c00), s2(columns2 * (inputs2 / span2), 0x3c00);
  return collegium_moe(c.x.data(), c.y.data(), planes - 1, planes - 1, c.T, c.D, c.F, c.E, c.indptr.data(),
                       c.indptr[c.T], c.ids.data(), c.weights.data(), threads, team, bits, span1, span2, inputs1,
                       inputs2, w1.data(), s1.data(), w2.data(), s2.data(), planes, portable);
}

// A team that is smaller than asked, with a thread of its own.
void two(void (*work)(void*), void* data, unsigned, unsigned) {
  std::thread other(work, data);
  work(data);
  other.join();
}

int run_floats(Case c, int kind, int threads, Team team = nullptr) {
  const int64_t bytes = kind == 0 ? 4 : 2;
  const std::vector<uint8_t> w1(c.E * up_to(c.F, 32) * 2 * up_to(c.D, 64) * bytes, 0x3c);
  const std::vector<uint8_t> w2(c.E * up_to(c.D, 64) * up_to(c.F, 64) * bytes, 0x3c);
  return collegium_moe_floats(c.x.data(), c.y.data(), kind > 0, kind > 1, c.T, c.D, c.F, c.E, c.indptr.data(),
                              c.indptr[c.T], c.ids.data(), c.weights.data(), threads, team, kind, w1.data(),
                              w2.data());
}

}  // namespace

int main() {
  int calls = 0;
  for (int64_t T : {0, 1, 2, 9, 33, 150})
    for (int64_t width : {1, 37, 64, 130, 700}) {
      const Case c(T, width, 3);
      const int threads = T < 33 ? 1 : 3;
      const Team team = T == 33 ? two : nullptr;
      for (int bits : {4, 8})
        for (int portable : {0, 1})
          for (int64_t group : {0, 32})
            for (int planes : {1, 2}) calls += run(c, bits, group, planes, portable, threads, team) == 0;
      for (int kind : {0, 1, 2}) calls += run_floats(c, kind, threads, team) == (collegium_has_avx512() ? 0 : 3);
    }
  Case bad(2, 1, 1);
  bad.indptr = {0, 2, 1};
  if (run(bad, 8, 32, 1, 1, 1) != 1 || run_floats(bad, 0, 1) != 1) return 1;
  std::printf("%d calls\n", calls);
}
