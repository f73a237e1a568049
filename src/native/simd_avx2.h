// Simd for AVX2 + FMA + F16C (x86-64-v3): a vector is two registers.
#pragma once

#include <immintrin.h>

#include "isa.h"
#include "simd.h"

namespace dapji {

struct Avx2 {
  static constexpr Isa isa = Isa::avx2;
  static constexpr int rows = 1, tokens = 6;  // twelve accumulators; weights, an activation and a product in the rest
  static constexpr bool has_dot = false, signed_codes = false, has_tiles = false;

  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };

  static DAPJI_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static DAPJI_INLINE F load(const float* p, int n) {
    const I m = mask(n);
    return {_mm256_maskload_ps(p, m.a), _mm256_maskload_ps(p + 8, m.b)};
  }
  static DAPJI_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static DAPJI_INLINE void store(float* p, F x, int n) {
    const I m = mask(n);
    _mm256_maskstore_ps(p, m.a, x.a);
    _mm256_maskstore_ps(p + 8, m.b, x.b);
  }
  static DAPJI_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static DAPJI_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static DAPJI_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static DAPJI_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static DAPJI_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static DAPJI_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static DAPJI_INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
  static DAPJI_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static DAPJI_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static DAPJI_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static DAPJI_INLINE float sum(F x) {
    const __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
  }
  static DAPJI_INLINE float max(F x) {
    const __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
  }

  static DAPJI_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static DAPJI_INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  static DAPJI_INLINE F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static DAPJI_INLINE I as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

  static DAPJI_INLINE F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
  }
  static DAPJI_INLINE F load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 8)), 16))};
  }
  static DAPJI_INLINE void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
  }

  static DAPJI_INLINE I load_int(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static DAPJI_INLINE void store_int(void* p, I x) {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
  }
  static DAPJI_INLINE I broadcast4(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return set_int(x);
  }
  static DAPJI_INLINE I broadcast16(const void* p) {
    const __m256i x = _mm256_broadcastsi128_si256(load128(p));
    return {x, x};
  }
  static DAPJI_INLINE I widen_s8(const int8_t* p) {
    const __m128i x = load128(p);
    return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
  }
  static DAPJI_INLINE I widen_u8(const uint8_t* p) {
    const __m128i x = load128(p);
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
  }
  static DAPJI_INLINE void narrow_s8(int8_t* p, I x) {
    const __m128i lo = _mm_packs_epi32(_mm256_castsi256_si128(x.a), _mm256_extracti128_si256(x.a, 1));
    const __m128i hi = _mm_packs_epi32(_mm256_castsi256_si128(x.b), _mm256_extracti128_si256(x.b, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(lo, hi));
  }
  static DAPJI_INLINE I set_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static DAPJI_INLINE I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static DAPJI_INLINE I sub_int(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static DAPJI_INLINE I max_int(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static DAPJI_INLINE int32_t max_int(I x) {
    const __m256i y = _mm256_max_epi32(x.a, x.b);
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
  }
  static DAPJI_INLINE I and_(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static DAPJI_INLINE I or_(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <int n>
  static DAPJI_INLINE I shl32(I x) {
    return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
  }
  template <int n>
  static DAPJI_INLINE I shr32(I x) {
    return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)};
  }
  template <int n>
  static DAPJI_INLINE I sra32(I x) {
    return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)};
  }
  template <int n>
  static DAPJI_INLINE I shl16(I x) {
    return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)};
  }
  template <int n>
  static DAPJI_INLINE I shr16(I x) {
    return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)};
  }
  static DAPJI_INLINE I add16(I x, I y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
  static DAPJI_INLINE I madd16(I x, I y) { return {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}; }
  static DAPJI_INLINE I pair16(I lo, I hi) {
    return {_mm256_blend_epi16(lo.a, _mm256_slli_epi32(hi.a, 16), 0xaa),
            _mm256_blend_epi16(lo.b, _mm256_slli_epi32(hi.b, 16), 0xaa)};
  }
  static DAPJI_INLINE I dot16(I u8, I s8) {
    return {_mm256_maddubs_epi16(u8.a, s8.a), _mm256_maddubs_epi16(u8.b, s8.b)};
  }
  static DAPJI_INLINE I lookup(I table, I index) {
    return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
  }
  static DAPJI_INLINE void transpose(F (&x)[kLanes]) {
    __m256 block[2][2][8];  // of 8 x 8
    for (int i = 0; i < 8; ++i) {
      block[0][0][i] = x[i].a;
      block[0][1][i] = x[i].b;
      block[1][0][i] = x[8 + i].a;
      block[1][1][i] = x[8 + i].b;
    }
    for (auto& row : block) {
      for (auto& one : row) transpose8(one);
    }
    for (int i = 0; i < 8; ++i) {
      x[i] = {block[0][0][i], block[1][0][i]};
      x[8 + i] = {block[0][1][i], block[1][1][i]};
    }
  }

 private:
  static DAPJI_INLINE void transpose8(__m256 (&x)[8]) {
    __m256 y[8];
    DAPJI_UNROLL
    for (int i = 0; i < 8; i += 4) {
      const __m256 a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
      const __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
      y[i] = _mm256_shuffle_ps(a, c, 0x44);
      y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    DAPJI_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
      x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
    }
  }
  static DAPJI_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static DAPJI_INLINE I mask(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane)};
  }
};

}  // namespace dapji
