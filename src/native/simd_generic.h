// Simd in plain C++: for processors without a version of their own, and the reference for those with one.
#pragma once

#include <cstring>

#include "isa.h"
#include "simd.h"

namespace dapji {

struct Generic {
  static constexpr Isa isa = Isa::generic;
  static constexpr int rows = 1, tokens = 2;
  static constexpr bool has_dot = true, signed_codes = false, has_tiles = false;

  struct F {
    float v[kLanes];
  };
  struct I {
    int32_t v[kLanes];
  };

#define DAPJI_LANES(result, expression) \
  result r;                             \
  for (int i = 0; i < kLanes; ++i) {    \
    r.v[i] = (expression);              \
  }                                     \
  return r

  static DAPJI_INLINE F load(const float* p) { return copy<F>(p); }
  static DAPJI_INLINE F load(const float* p, int n) { DAPJI_LANES(F, i < n ? p[i] : 0.0f); }
  static DAPJI_INLINE void store(float* p, F a) { std::memcpy(p, &a, 64); }
  static DAPJI_INLINE void store(float* p, F a, int n) { std::memcpy(p, &a, 4 * static_cast<size_t>(n)); }
  static DAPJI_INLINE F zero() { return set(0.0f); }
  static DAPJI_INLINE F set(float a) { DAPJI_LANES(F, a); }
  static DAPJI_INLINE F add(F a, F b) { DAPJI_LANES(F, a.v[i] + b.v[i]); }
  static DAPJI_INLINE F sub(F a, F b) { DAPJI_LANES(F, a.v[i] - b.v[i]); }
  static DAPJI_INLINE F mul(F a, F b) { DAPJI_LANES(F, a.v[i] * b.v[i]); }
  static DAPJI_INLINE F div(F a, F b) { DAPJI_LANES(F, a.v[i] / b.v[i]); }
  static DAPJI_INLINE F sqrt(F a) { DAPJI_LANES(F, __builtin_sqrtf(a.v[i])); }
  static DAPJI_INLINE F fma(F a, F b, F c) { DAPJI_LANES(F, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
  static DAPJI_INLINE F min(F a, F b) { DAPJI_LANES(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
  static DAPJI_INLINE F max(F a, F b) { DAPJI_LANES(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
  static DAPJI_INLINE float sum(F a) {
    for (int n = kLanes / 2; n; n /= 2) {
      for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
    }
    return a.v[0];
  }
  static DAPJI_INLINE float max(F a) {
    for (int n = kLanes / 2; n; n /= 2) {
      for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    }
    return a.v[0];
  }

  static DAPJI_INLINE F to_float(I a) { DAPJI_LANES(F, static_cast<float>(a.v[i])); }
  static DAPJI_INLINE I to_int(F a) {
    DAPJI_LANES(I, a.v[i] >= -2147483648.0f && a.v[i] < 2147483648.0f ? static_cast<int32_t>(__builtin_lrintf(a.v[i]))
                                                                      : INT32_MIN);
  }
  static DAPJI_INLINE F as_float(I a) { return copy<F>(&a); }
  static DAPJI_INLINE I as_int(F a) { return copy<I>(&a); }

  static DAPJI_INLINE F load_f16(const uint16_t* p) { DAPJI_LANES(F, from_f16(p[i])); }
  static DAPJI_INLINE F load_bf16(const uint16_t* p) {
    const auto bits = [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16); };
    I r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = bits(i);
    return as_float(r);
  }
  static DAPJI_INLINE void store_f16(uint16_t* p, F a) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_f16(a.v[i]);
  }

  static DAPJI_INLINE I load_int(const void* p) { return copy<I>(p); }
  static DAPJI_INLINE void store_int(void* p, I a) { std::memcpy(p, &a, 64); }
  static DAPJI_INLINE I broadcast4(const void* p) {
    int32_t a;
    std::memcpy(&a, p, 4);
    return set_int(a);
  }
  static DAPJI_INLINE I broadcast16(const void* p) {
    I r;
    for (int i = 0; i < 4; ++i) std::memcpy(r.v + 4 * i, p, 16);
    return r;
  }
  static DAPJI_INLINE I widen_s8(const int8_t* p) { DAPJI_LANES(I, p[i]); }
  static DAPJI_INLINE I widen_u8(const uint8_t* p) { DAPJI_LANES(I, p[i]); }
  static DAPJI_INLINE void narrow_s8(int8_t* p, I a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
  }
  static DAPJI_INLINE I set_int(int32_t a) { DAPJI_LANES(I, a); }
  static DAPJI_INLINE I add_int(I a, I b) { DAPJI_LANES(I, wrap(uint32_t(a.v[i]) + uint32_t(b.v[i]))); }
  static DAPJI_INLINE I sub_int(I a, I b) { DAPJI_LANES(I, wrap(uint32_t(a.v[i]) - uint32_t(b.v[i]))); }
  static DAPJI_INLINE I max_int(I a, I b) { DAPJI_LANES(I, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
  static DAPJI_INLINE int32_t max_int(I a) {
    for (int n = kLanes / 2; n; n /= 2) {
      for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    }
    return a.v[0];
  }
  static DAPJI_INLINE I and_(I a, I b) { DAPJI_LANES(I, a.v[i] & b.v[i]); }
  static DAPJI_INLINE I or_(I a, I b) { DAPJI_LANES(I, a.v[i] | b.v[i]); }
  template <int n>
  static DAPJI_INLINE I shl32(I a) {
    DAPJI_LANES(I, wrap(uint32_t(a.v[i]) << n));
  }
  template <int n>
  static DAPJI_INLINE I shr32(I a) {
    DAPJI_LANES(I, wrap(uint32_t(a.v[i]) >> n));
  }
  template <int n>
  static DAPJI_INLINE I sra32(I a) {
    DAPJI_LANES(I, a.v[i] >> n);
  }
  template <int n>
  static DAPJI_INLINE I shl16(I a) {
    constexpr uint32_t keep = (0xffffu << n & 0xffffu) * 0x10001u;
    DAPJI_LANES(I, wrap(uint32_t(a.v[i]) << n & keep));
  }
  template <int n>
  static DAPJI_INLINE I shr16(I a) {
    constexpr uint32_t keep = (0xffffu >> n) * 0x10001u;
    DAPJI_LANES(I, wrap(uint32_t(a.v[i]) >> n & keep));
  }
  static DAPJI_INLINE I add8(I a, I b) {
    uint8_t x[64], y[64];
    std::memcpy(x, &a, 64);
    std::memcpy(y, &b, 64);
    for (int i = 0; i < 64; ++i) x[i] = static_cast<uint8_t>(x[i] + y[i]);
    return copy<I>(x);
  }
  static DAPJI_INLINE I madd16(I a, I b) { DAPJI_LANES(I, low(a.v[i]) * low(b.v[i]) + high(a.v[i]) * high(b.v[i])); }
  static DAPJI_INLINE I pair16(I lo, I hi) {
    DAPJI_LANES(I, wrap((uint32_t(lo.v[i]) & 0xffffu) | uint32_t(hi.v[i]) << 16));
  }
  static DAPJI_INLINE I dot(I sum, I u8, I s8) {
    uint8_t u[4 * kLanes];
    int8_t s[4 * kLanes];
    std::memcpy(u, &u8, 64);
    std::memcpy(s, &s8, 64);
    for (int i = 0; i < kLanes; ++i) {
      sum.v[i] +=
          u[4 * i] * s[4 * i] + u[4 * i + 1] * s[4 * i + 1] + u[4 * i + 2] * s[4 * i + 2] + u[4 * i + 3] * s[4 * i + 3];
    }
    return sum;
  }
  static DAPJI_INLINE I lookup(I table, I index) {
    uint8_t t[64], x[64];
    std::memcpy(t, &table, 64);
    std::memcpy(x, &index, 64);
    for (uint8_t& b : x) b = t[b & 15];
    return copy<I>(x);
  }

  static DAPJI_INLINE void transpose(F (&x)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float other = x[i].v[j];
        x[i].v[j] = x[j].v[i];
        x[j].v[i] = other;
      }
    }
  }

#undef DAPJI_LANES

 private:
  template <class T>
  static DAPJI_INLINE T copy(const void* p) {
    T r;
    std::memcpy(&r, p, 64);
    return r;
  }
  static DAPJI_INLINE int32_t wrap(uint32_t a) { return static_cast<int32_t>(a); }
  static DAPJI_INLINE int32_t low(int32_t a) { return static_cast<int16_t>(a); }
  static DAPJI_INLINE int32_t high(int32_t a) { return a >> 16; }

 public:
  // Bit patterns of IEEE 754 binary16.
  static DAPJI_INLINE float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    float f;
    if (magnitude >= 0x7c00u) {  // infinity, NaN (made quiet, as the hardware does)
      const uint32_t bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u);
      std::memcpy(&f, &bits, 4);
      return f;
    }
    // The exponent is rebiased by a multiplication, which is exact and does subnormal numbers too.
    const uint32_t bits = magnitude << 13;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    return sign ? -f : f;
  }
  static DAPJI_INLINE uint16_t to_f16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t h;
    if (magnitude > 0x7f800000u) {
      h = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x47800000u) {  // 65536 and beyond
      h = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 leaves the rounded result in the low bits
      float a;
      std::memcpy(&a, &magnitude, 4);
      a += 0.5f;
      uint32_t rounded;
      std::memcpy(&rounded, &a, 4);
      h = rounded - 0x3f000000u;
    } else {
      h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    return static_cast<uint16_t>(sign | h);
  }
};

}  // namespace dapji
