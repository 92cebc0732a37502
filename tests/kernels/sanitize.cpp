// moe.cpp at edge shapes with exactly sized buffers and wild ids, for the sanitizers.
#include <cstdio>
#include <cstdlib>

#include "moe.cpp"

namespace {

int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// One call; returns its code.
int run(int64_t T, int64_t D, int64_t F, int64_t E, int bits, int64_t group, int portable, int threads) {
  const int64_t inputs1 = up_to(D, group ? group : 32), inputs2 = up_to(F, group ? group : 32);
  const int64_t span1 = group ? group : inputs1, span2 = group ? group : inputs2;
  const int64_t panels1 = (F + 31) / 32, panels2 = (D + 63) / 64;
  std::vector<uint8_t> w1(E * panels1 * inputs1 * 64 * bits / 8, 0x5a), w2(E * panels2 * inputs2 * 64 * bits / 8, 0xa5);
  std::vector<uint16_t> s1(E * panels1 * (inputs1 / span1) * 64, 0x3c00), s2(E * panels2 * (inputs2 / span2) * 64, 0x3c00);
  std::vector<float> x(T * D), y(T * D);
  for (auto& v : x) v = static_cast<float>(rand()) / RAND_MAX - 0.5f;
  for (int64_t i = 0; i < T * D; ++i)
    if (i / D % 4 == 1) x[i] *= 1e-38f;  // too small for any scale
  const int64_t wild[] = {0, -1, E - 1, E, INT64_MAX, INT64_MIN, 1LL << 32, 0};
  std::vector<int64_t> indptr(T + 1), ids(2 * T);
  std::vector<float> weights(2 * T, 0.5f);
  for (int64_t t = 0; t < T; ++t) indptr[t + 1] = indptr[t] + t % 3;
  ids.resize(indptr[T]);
  weights.resize(indptr[T]);
  for (size_t p = 0; p < ids.size(); ++p) ids[p] = wild[p % 8];
  return collegium_moe(x.data(), y.data(), T, D, F, E, bits, span1, span2, inputs1, inputs2, w1.data(), s1.data(),
                       w2.data(), s2.data(), indptr.data(), indptr[T], ids.data(), weights.data(), threads, portable);
}

}  // namespace

int main() {
  int calls = 0;
  for (int64_t T : {0, 1, 2, 9, 33, 150})
    for (int bits : {4, 8})
      for (int portable : {0, 1})
        for (int64_t group : {0, 32})
          for (int64_t width : {1, 37, 64, 130, 700}) {
            if (run(T, width, width / 2 + 1, 3, bits, group, portable, T == 33 ? 3 : 1) != 0) return 1;
            ++calls;
          }
  const int64_t falling[] = {0, 2, 1};
  const int64_t ids[] = {0};
  if (collegium_moe(nullptr, nullptr, 2, 1, 1, 1, 8, 32, 32, 32, 32, nullptr, nullptr, nullptr, nullptr, falling, 1, ids,
                    nullptr, 1, 1) != 1)
    return 1;
  std::printf("%d calls\n", calls);
}
