// Simd for ARM's NEON with the dot products of ARMv8.2 (sdot): a vector is four registers.
#pragma once

#include <arm_neon.h>

#include "isa.h"
#include "simd.h"

namespace dapji {

struct Neon {
  static constexpr Isa isa = Isa::neon;
  static constexpr int rows = 1, tokens = 6;  // 24 registers of int32 sums; weights and an activation in the rest
  static constexpr bool has_dot = true, signed_codes = true, has_tiles = false;

  struct F {
    float32x4_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };

// An expression of the quarter i, four times. No loop: arrays that a loop indexes may end in memory.
#define DAPJI_QUARTERS(result, expression)                                                  \
  const auto quarter = [&](int i) __attribute__((always_inline)) { return (expression); };  \
  return result {                                                                           \
    { quarter(0), quarter(1), quarter(2), quarter(3) }                                      \
  }

  static DAPJI_INLINE F load(const float* p) { DAPJI_QUARTERS(F, vld1q_f32(p + 4 * i)); }
  static DAPJI_INLINE F load(const float* p, int n) {
    if (n == kLanes) return load(p);
    float some[kLanes] = {};
    for (int i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
  }
  static DAPJI_INLINE void store(float* p, F x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
  }
  static DAPJI_INLINE void store(float* p, F x, int n) {
    if (n == kLanes) return store(p, x);
    float all[kLanes];
    store(all, x);
    for (int i = 0; i < n; ++i) p[i] = all[i];
  }
  static DAPJI_INLINE F zero() { return set(0.0f); }
  static DAPJI_INLINE F set(float x) {
    const float32x4_t all = vdupq_n_f32(x);
    return {{all, all, all, all}};
  }
  static DAPJI_INLINE F add(F x, F y) { DAPJI_QUARTERS(F, vaddq_f32(x.v[i], y.v[i])); }
  static DAPJI_INLINE F sub(F x, F y) { DAPJI_QUARTERS(F, vsubq_f32(x.v[i], y.v[i])); }
  static DAPJI_INLINE F mul(F x, F y) { DAPJI_QUARTERS(F, vmulq_f32(x.v[i], y.v[i])); }
  static DAPJI_INLINE F div(F x, F y) { DAPJI_QUARTERS(F, vdivq_f32(x.v[i], y.v[i])); }
  static DAPJI_INLINE F sqrt(F x) { DAPJI_QUARTERS(F, vsqrtq_f32(x.v[i])); }
  static DAPJI_INLINE F fma(F x, F y, F z) { DAPJI_QUARTERS(F, vfmaq_f32(z.v[i], x.v[i], y.v[i])); }
  // By comparison: the instructions fmin and fmax give NaN where either is.
  static DAPJI_INLINE F min(F x, F y) { DAPJI_QUARTERS(F, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
  static DAPJI_INLINE F max(F x, F y) { DAPJI_QUARTERS(F, larger(x.v[i], y.v[i])); }
  static DAPJI_INLINE float sum(F x) {
    const float32x4_t y = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    const float32x2_t z = vadd_f32(vget_low_f32(y), vget_high_f32(y));
    return vget_lane_f32(z, 0) + vget_lane_f32(z, 1);
  }
  static DAPJI_INLINE float max(F x) {
    const float32x4_t y = larger(larger(x.v[0], x.v[2]), larger(x.v[1], x.v[3]));
    const float32x4_t z = larger(y, vextq_f32(y, y, 2));
    return vgetq_lane_f32(larger(z, vextq_f32(z, z, 1)), 0);
  }

  static DAPJI_INLINE F to_float(I x) { DAPJI_QUARTERS(F, vcvtq_f32_s32(x.v[i])); }
  static DAPJI_INLINE I to_int(F x) { DAPJI_QUARTERS(I, vcvtnq_s32_f32(x.v[i])); }
  static DAPJI_INLINE F as_float(I x) { DAPJI_QUARTERS(F, vreinterpretq_f32_s32(x.v[i])); }
  static DAPJI_INLINE I as_int(F x) { DAPJI_QUARTERS(I, vreinterpretq_s32_f32(x.v[i])); }

  static DAPJI_INLINE F load_f16(const uint16_t* p) {
    DAPJI_QUARTERS(F, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
  }
  static DAPJI_INLINE F load_bf16(const uint16_t* p) {
    DAPJI_QUARTERS(F, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
  }
  static DAPJI_INLINE void store_f16(uint16_t* p, F x) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
  }

  static DAPJI_INLINE I load_int(const void* p) {
    const auto* const bytes = static_cast<const uint8_t*>(p);
    DAPJI_QUARTERS(I, vreinterpretq_s32_u8(vld1q_u8(bytes + 16 * i)));
  }
  static DAPJI_INLINE void store_int(void* p, I x) {
    auto* const bytes = static_cast<uint8_t*>(p);
    for (int i = 0; i < 4; ++i) vst1q_u8(bytes + 16 * i, vreinterpretq_u8_s32(x.v[i]));
  }
  static DAPJI_INLINE I broadcast4(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return set_int(x);
  }
  static DAPJI_INLINE I broadcast16(const void* p) {
    const int32x4_t all = vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
    return {{all, all, all, all}};
  }
  static DAPJI_INLINE I widen_s8(const int8_t* p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
             vmovl_s16(vget_high_s16(high))}};
  }
  static DAPJI_INLINE I widen_u8(const uint8_t* p) {
    const uint8x16_t x = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
             vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
  }
  static DAPJI_INLINE void narrow_s8(int8_t* p, I x) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }
  static DAPJI_INLINE I set_int(int32_t x) {
    const int32x4_t all = vdupq_n_s32(x);
    return {{all, all, all, all}};
  }
  static DAPJI_INLINE I add_int(I x, I y) { DAPJI_QUARTERS(I, vaddq_s32(x.v[i], y.v[i])); }
  static DAPJI_INLINE I sub_int(I x, I y) { DAPJI_QUARTERS(I, vsubq_s32(x.v[i], y.v[i])); }
  static DAPJI_INLINE I max_int(I x, I y) { DAPJI_QUARTERS(I, vmaxq_s32(x.v[i], y.v[i])); }
  static DAPJI_INLINE int32_t max_int(I x) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
  }
  static DAPJI_INLINE I and_(I x, I y) { DAPJI_QUARTERS(I, vandq_s32(x.v[i], y.v[i])); }
  static DAPJI_INLINE I or_(I x, I y) { DAPJI_QUARTERS(I, vorrq_s32(x.v[i], y.v[i])); }
  template <int n>
  static DAPJI_INLINE I shl32(I x) {
    DAPJI_QUARTERS(I, vshlq_n_s32(x.v[i], n));
  }
  template <int n>
  static DAPJI_INLINE I shr32(I x) {
    DAPJI_QUARTERS(I, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.v[i]), n)));
  }
  template <int n>
  static DAPJI_INLINE I sra32(I x) {
    DAPJI_QUARTERS(I, vshrq_n_s32(x.v[i], n));
  }
  template <int n>
  static DAPJI_INLINE I shl16(I x) {
    DAPJI_QUARTERS(I, vreinterpretq_s32_s16(vshlq_n_s16(int16(x.v[i]), n)));
  }
  template <int n>
  static DAPJI_INLINE I shr16(I x) {
    DAPJI_QUARTERS(I, vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(x.v[i]), n)));
  }
  static DAPJI_INLINE I add8(I x, I y) {
    DAPJI_QUARTERS(I, vreinterpretq_s32_u8(vaddq_u8(uint8(x.v[i]), uint8(y.v[i]))));
  }
  static DAPJI_INLINE I madd16(I x, I y) { DAPJI_QUARTERS(I, madd(int16(x.v[i]), int16(y.v[i]))); }
  // Inserts the low halves of hi above those of lo.
  static DAPJI_INLINE I pair16(I lo, I hi) { DAPJI_QUARTERS(I, vsliq_n_s32(lo.v[i], hi.v[i], 16)); }
  static DAPJI_INLINE I dot(I sum, I codes, I s8) {
    DAPJI_QUARTERS(I, vdotq_s32(sum.v[i], vreinterpretq_s8_s32(codes.v[i]), vreinterpretq_s8_s32(s8.v[i])));
  }
  static DAPJI_INLINE I lookup(I table, I index) {
    DAPJI_QUARTERS(I, vreinterpretq_s32_u8(vqtbl1q_u8(uint8(table.v[i]), uint8(index.v[i]))));
  }

#undef DAPJI_QUARTERS
  static DAPJI_INLINE void transpose(F (&x)[kLanes]) {
    F y[kLanes];
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {  // block (i, j) of 4 x 4 to (j, i)
        const float32x4_t a = x[4 * i].v[j], b = x[4 * i + 1].v[j], c = x[4 * i + 2].v[j], d = x[4 * i + 3].v[j];
        const float64x2_t even = pair(vtrn1q_f32(a, b)), odd = pair(vtrn2q_f32(a, b));
        const float64x2_t next_even = pair(vtrn1q_f32(c, d)), next_odd = pair(vtrn2q_f32(c, d));
        y[4 * j].v[i] = vreinterpretq_f32_f64(vtrn1q_f64(even, next_even));
        y[4 * j + 1].v[i] = vreinterpretq_f32_f64(vtrn1q_f64(odd, next_odd));
        y[4 * j + 2].v[i] = vreinterpretq_f32_f64(vtrn2q_f64(even, next_even));
        y[4 * j + 3].v[i] = vreinterpretq_f32_f64(vtrn2q_f64(odd, next_odd));
      }
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }

 private:
  static DAPJI_INLINE float64x2_t pair(float32x4_t x) { return vreinterpretq_f64_f32(x); }
  static DAPJI_INLINE float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
  static DAPJI_INLINE uint8x16_t uint8(int32x4_t x) { return vreinterpretq_u8_s32(x); }
  static DAPJI_INLINE int16x8_t int16(int32x4_t x) { return vreinterpretq_s16_s32(x); }
  static DAPJI_INLINE int32x4_t madd(int16x8_t x, int16x8_t y) {
    return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
  }
};

}  // namespace dapji
