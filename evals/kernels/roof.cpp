// What this CPU can do at most: int8 and bf16 products and fp32 FMA from registers, and reading memory in order.
#include <immintrin.h>

#include <chrono>
#include <cstdint>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")

namespace {

constexpr int kChains = 16;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

extern "C" {

// Operations a second (a multiplication and an addition are two). kind: 0 int8, 1 bf16, 2 fp32.
double roof_compute(int kind, int64_t rounds) {
  __m512i a = _mm512_set1_epi32(0x01010101), b = _mm512_set1_epi32(0x01010101);
  __m512i ints[kChains];
  __m512 floats[kChains];
  for (int i = 0; i < kChains; ++i) {
    ints[i] = _mm512_setzero_si512();
    floats[i] = _mm512_setzero_ps();
  }
  const double start = seconds();
  for (int64_t n = 0; n < rounds; ++n) {
    asm volatile("" : "+v"(a), "+v"(b));
    if (kind == 0) {
      for (int i = 0; i < kChains; ++i) ints[i] = _mm512_dpbusd_epi32(ints[i], a, b);
    } else if (kind == 1) {
      for (int i = 0; i < kChains; ++i) floats[i] = _mm512_dpbf16_ps(floats[i], (__m512bh)a, (__m512bh)b);
    } else {
      for (int i = 0; i < kChains; ++i) floats[i] = _mm512_fmadd_ps((__m512)a, (__m512)b, floats[i]);
    }
  }
  const double spent = seconds() - start;
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "v"(ints[i]), "v"(floats[i]));
  const double lanes = kind == 0 ? 64 : kind == 1 ? 32 : 16;
  return 2 * lanes * kChains * rounds / spent;
}

// Bytes a second.
double roof_read(const uint8_t* data, int64_t bytes) {
  __m512i sums[4] = {};
  const double start = seconds();
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int c = 0; c < 4; ++c) {
      _mm_prefetch(reinterpret_cast<const char*>(data + i + 4096 + c * 64), _MM_HINT_T0);
      sums[c] = _mm512_add_epi64(sums[c], _mm512_loadu_si512(data + i + c * 64));
    }
  const double spent = seconds() - start;
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
  return bytes / spent;
}
}
