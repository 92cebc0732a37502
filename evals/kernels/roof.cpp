// What this CPU can do at most: int8 and bf16 products and fp32 FMA from registers, reading memory in order, and both.
#include <immintrin.h>

#include <chrono>
#include <cstdint>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")

namespace {

constexpr int kChains = 12;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <int KIND>
void spin(int64_t rounds) {
  __m512i a = _mm512_set1_epi32(0x01010101), b = a, sums[kChains];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t n = 0; n < rounds; ++n) {
    asm volatile("" : "+v"(a), "+v"(b));
    for (auto& sum : sums) {
      if (KIND == 0) sum = _mm512_dpbusd_epi32(sum, a, b);
      if (KIND == 1) sum = (__m512i)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
      if (KIND == 2) sum = (__m512i)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
    }
  }
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
}

// Every cache line read takes part in PRODUCTS int8 products. Weights of experts with few rows cannot go faster:
// reading and multiplying hide each other in part only. Four places are read in turn, which is faster than one: the
// hardware's prefetcher follows pages.
template <int PRODUCTS>
double read_and_multiply(const uint8_t* data, int64_t bytes) {
  __m512i sums[kChains] = {}, a = _mm512_set1_epi8(1);
  const double start = seconds();
  for (int64_t i = 0; i + 64 <= bytes / 4; i += 64)
    for (int c = 0; c < 4; ++c) {
      const char* line = reinterpret_cast<const char*>(data + i + c * (bytes / 4));
      _mm_prefetch(line + 16384, _MM_HINT_T1);
      _mm_prefetch(line + 2048, _MM_HINT_T0);
      const __m512i w = _mm512_loadu_si512(line);
#pragma GCC unroll 64
      for (int n = 0; n < PRODUCTS; ++n)
        asm volatile("vpdpbusd %2, %1, %0" : "+v"(sums[(c * PRODUCTS + n) % kChains]) : "v"(w), "v"(a));
    }
  const double spent = seconds() - start;
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
  return bytes / spent;
}

}  // namespace

extern "C" {

// Operations a second (a multiplication and an addition are two). kind: 0 int8, 1 bf16, 2 fp32.
double roof_compute(int kind, int64_t rounds) {
  const double start = seconds();
  if (kind == 0) spin<0>(rounds);
  else if (kind == 1) spin<1>(rounds);
  else spin<2>(rounds);
  const double lanes = kind == 0 ? 64 : kind == 1 ? 32 : 16;
  return 2 * lanes * kChains * rounds / (seconds() - start);
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

// The same with 4, 8, 16 or 32 products a line.
double roof_read_and_multiply(const uint8_t* data, int64_t bytes, int products) {
  switch (products) {
    case 4: return read_and_multiply<4>(data, bytes);
    case 8: return read_and_multiply<8>(data, bytes);
    case 16: return read_and_multiply<16>(data, bytes);
    default: return read_and_multiply<32>(data, bytes);
  }
}
}
