// Simd for AVX-512 (F, BW, DQ, VL) with VNNI: a vector is one register.
#pragma once

#include <immintrin.h>

#include "isa.h"
#include "simd.h"

namespace dapji {

struct Avx512Vnni {
  static constexpr Isa isa = Isa::avx512vnni;
  static constexpr int rows = 2, tokens = 6;  // twelve sums in int32 and in float32, in 32 registers
  static constexpr bool has_dot = true, signed_codes = false, has_tiles = false;

  using F = __m512;
  using I = __m512i;

  static DAPJI_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static DAPJI_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static DAPJI_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static DAPJI_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, mask(n), x); }
  static DAPJI_INLINE F zero() { return _mm512_setzero_ps(); }
  static DAPJI_INLINE F set(float x) { return _mm512_set1_ps(x); }
  static DAPJI_INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
  static DAPJI_INLINE F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static DAPJI_INLINE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static DAPJI_INLINE F div(F x, F y) { return _mm512_div_ps(x, y); }
  static DAPJI_INLINE F sqrt(F x) { return _mm512_sqrt_ps(x); }
  static DAPJI_INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static DAPJI_INLINE F min(F x, F y) { return _mm512_min_ps(x, y); }
  static DAPJI_INLINE F max(F x, F y) { return _mm512_max_ps(x, y); }
  static DAPJI_INLINE float sum(F x) {
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
  }
  static DAPJI_INLINE float max(F x) {
    const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
  }

  static DAPJI_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static DAPJI_INLINE I to_int(F x) { return _mm512_cvtps_epi32(x); }
  static DAPJI_INLINE F as_float(I x) { return _mm512_castsi512_ps(x); }
  static DAPJI_INLINE I as_int(F x) { return _mm512_castps_si512(x); }

  static DAPJI_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load256(p)); }
  static DAPJI_INLINE F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
  }
  static DAPJI_INLINE void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static DAPJI_INLINE I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static DAPJI_INLINE void store_int(void* p, I x) { _mm512_storeu_si512(p, x); }
  static DAPJI_INLINE I broadcast4(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  static DAPJI_INLINE I broadcast16(const void* p) { return _mm512_broadcast_i32x4(load128(p)); }
  static DAPJI_INLINE I widen_s8(const int8_t* p) { return _mm512_cvtepi8_epi32(load128(p)); }
  static DAPJI_INLINE I widen_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(load128(p)); }
  static DAPJI_INLINE void narrow_s8(int8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
  }
  static DAPJI_INLINE I set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static DAPJI_INLINE I add_int(I x, I y) { return _mm512_add_epi32(x, y); }
  static DAPJI_INLINE I sub_int(I x, I y) { return _mm512_sub_epi32(x, y); }
  static DAPJI_INLINE I max_int(I x, I y) { return _mm512_max_epi32(x, y); }
  static DAPJI_INLINE int32_t max_int(I x) {
    const __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti32x8_epi32(x, 1));
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
  }
  static DAPJI_INLINE I and_(I x, I y) { return _mm512_and_si512(x, y); }
  static DAPJI_INLINE I or_(I x, I y) { return _mm512_or_si512(x, y); }
  template <int n>
  static DAPJI_INLINE I shl32(I x) {
    return _mm512_slli_epi32(x, n);
  }
  template <int n>
  static DAPJI_INLINE I shr32(I x) {
    return _mm512_srli_epi32(x, n);
  }
  template <int n>
  static DAPJI_INLINE I sra32(I x) {
    return _mm512_srai_epi32(x, n);
  }
  template <int n>
  static DAPJI_INLINE I shl16(I x) {
    return _mm512_slli_epi16(x, n);
  }
  template <int n>
  static DAPJI_INLINE I shr16(I x) {
    return _mm512_srli_epi16(x, n);
  }
  static DAPJI_INLINE I add8(I x, I y) { return _mm512_add_epi8(x, y); }
  static DAPJI_INLINE I madd16(I x, I y) { return _mm512_madd_epi16(x, y); }
  static DAPJI_INLINE I pair16(I lo, I hi) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, lo, _mm512_slli_epi32(hi, 16));
  }
  static DAPJI_INLINE I dot(I sum, I u8, I s8) { return _mm512_dpbusd_epi32(sum, u8, s8); }
  static DAPJI_INLINE I lookup(I table, I index) { return _mm512_shuffle_epi8(table, index); }
  static DAPJI_INLINE void transpose(F (&x)[kLanes]) {
    // 4 x 4 lanes within the quarters of four vectors, then the quarters.
    F y[kLanes];
    DAPJI_UNROLL
    for (int i = 0; i < kLanes; i += 4) {
      const __m512d a = pair(_mm512_unpacklo_ps(x[i], x[i + 1])), b = pair(_mm512_unpackhi_ps(x[i], x[i + 1]));
      const __m512d c = pair(_mm512_unpacklo_ps(x[i + 2], x[i + 3])), d = pair(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
      y[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      y[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      y[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      y[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    DAPJI_UNROLL
    for (int i = 0; i < 4; ++i) {
      const F a = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x44), b = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xee);
      const F c = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x44), d = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xee);
      x[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      x[i + 4] = _mm512_shuffle_f32x4(a, c, 0xdd);
      x[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
      x[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

 private:
  static DAPJI_INLINE __m512d pair(F x) { return _mm512_castps_pd(x); }
  static DAPJI_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static DAPJI_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static DAPJI_INLINE __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
};

}  // namespace dapji
