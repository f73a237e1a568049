// The vector of the kernels, and the functions that are written once over it.
//
// A `Simd` struct per instruction set (simd_generic.h, simd_avx2.h, simd_avx512.h, simd_neon.h) hides everything that
// differs. To the kernels a vector is always 64 bytes: `F` sixteen float32, `I` sixteen int32 (or 32 int16, or 64
// bytes). Every operation gives the same bits on every instruction set (fma is fused everywhere, sums have a fixed
// order), so a kernel does too. A struct has these static members; p needs no alignment:
//
//   Isa isa                                    which one it is (isa.h)
//   int rows, tokens                           tile of the prompt kernels: vectors of 16 rows x tokens
//   bool has_dot                               I dot(I sum, I codes, I s8): sum += four products of bytes per int32;
//                                              otherwise I dot16(I u8, I s8): two products per int16, saturating
//   bool signed_codes                          whether dot takes the codes as signed bytes
//   bool has_tiles                             whether a matrix unit multiplies many tokens: start_tiles, multiply_tile,
//                                              end_tiles (simd_amx.h)
//   F load(p) | load(p, n)    store(p, F) | store(p, F, n)    with n: the first n lanes, 0 elsewhere, 0 <= n <= 16
//   F load_f16(p), load_bf16(p)    store_f16(p, F)            sixteen 2-byte floats; rounds to nearest even
//   F zero(), set(float), add, sub, mul, div, sqrt, fma(a, b, c) = a * b + c
//   F min(a, b), max(a, b)                     b where either is NaN
//   float sum(F), max(F), int32 max_int(I)     over the lanes; sum adds lane i and i + 8, then + 4, + 2, + 1
//   F to_float(I)    I to_int(F)               to_int rounds to nearest even; any integer for NaN and beyond int32
//   F as_float(I)    I as_int(F)               the same bits
//   I load_int(p)    store_int(p, I)           64 bytes
//   I broadcast4(p), broadcast16(p)            repeat 4 or 16 bytes
//   I widen_s8(p), widen_u8(p)                 sixteen bytes to int32
//   void narrow_s8(p, I)                       int32 in -128 .. 127 to sixteen bytes
//   I set_int(int32), add_int, sub_int, max_int, and_, or_, shl32<n>, shr32<n>, sra32<n>
//   I shl16<n>, shr16<n>                       logical, on int16
//   I add8(a, b)                               bytes, wraps; with has_dot alone
//   I add16(a, b)                              int16, wraps; without has_dot alone
//   I madd16(a, b)                             two products of int16 per int32, added
//   I pair16(lo, hi)                           int16 pairs (lo, hi) out of int32 lanes that fit
//   void transpose(F (&x)[16])                 lane j of x[i] and lane i of x[j] change places
//   I lookup(table, index)                     bytes of a broadcast16 table at the indices 0 .. 15
#pragma once

#include <cstddef>
#include <cstdint>

// Kernels are one flat piece of code per instruction set: nothing in them may survive as a function of its own, which
// the linker could merge with another instruction set's.
#define DAPJI_INLINE inline __attribute__((always_inline))

// A loop over registers: only without the loop do arrays live in them.
#ifdef __clang__
#define DAPJI_UNROLL _Pragma("unroll")
#else
#define DAPJI_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dapji {

constexpr int kLanes = 16;

enum class Activation : int { silu, gelu, gelu_tanh };

/// e^x within 2 ulp; 0 below -104, infinity above 88.8, NaN stays.
template <class S>
DAPJI_INLINE typename S::F exp(typename S::F x) {
  // e^x = 2^n e^r with |r| <= ln(2) / 2, where the Taylor polynomial of degree 7 is exact to 5e-9.
  x = S::min(S::set(89.0f), S::max(S::set(-104.0f), x));
  const typename S::I n = S::to_int(S::mul(x, S::set(1.44269504f)));
  const typename S::F nf = S::to_float(n);
  typename S::F r = S::fma(nf, S::set(-0.693359375f), x);  // ln 2 in two parts; the first has few bits
  r = S::fma(nf, S::set(2.12194440e-4f), r);
  typename S::F p = S::set(1.0f / 5040);
  p = S::fma(p, r, S::set(1.0f / 720));
  p = S::fma(p, r, S::set(1.0f / 120));
  p = S::fma(p, r, S::set(1.0f / 24));
  p = S::fma(p, r, S::set(1.0f / 6));
  p = S::fma(p, r, S::set(0.5f));
  p = S::fma(p, r, S::set(1.0f));
  p = S::fma(p, r, S::set(1.0f));
  // 2^n in two factors, since n reaches beyond the exponents of normal numbers.
  const typename S::I half = S::template sra32<1>(n), rest = S::sub_int(n, half), bias = S::set_int(127);
  p = S::mul(p, S::as_float(S::template shl32<23>(S::add_int(half, bias))));
  return S::mul(p, S::as_float(S::template shl32<23>(S::add_int(rest, bias))));
}

/// tanh x within 3 ulp; NaN stays.
template <class S>
DAPJI_INLINE typename S::F tanh(typename S::F x) {
  // By m = e^2x - 1: tanh x = m / (m + 2). m = 2^n (e^r - 1) + (2^n - 1) loses nothing near 0, where n is 0.
  x = S::min(S::set(20.0f), S::max(S::set(-20.0f), S::add(x, x)));
  const typename S::I n = S::to_int(S::mul(x, S::set(1.44269504f)));
  const typename S::F nf = S::to_float(n);
  typename S::F r = S::fma(nf, S::set(-0.693359375f), x);  // as in exp
  r = S::fma(nf, S::set(2.12194440e-4f), r);
  typename S::F p = S::set(1.0f / 5040);
  p = S::fma(p, r, S::set(1.0f / 720));
  p = S::fma(p, r, S::set(1.0f / 120));
  p = S::fma(p, r, S::set(1.0f / 24));
  p = S::fma(p, r, S::set(1.0f / 6));
  p = S::fma(p, r, S::set(0.5f));
  p = S::fma(S::mul(p, r), r, r);
  const typename S::F power = S::as_float(S::template shl32<23>(S::add_int(n, S::set_int(127))));
  const typename S::F m = S::fma(power, p, S::sub(power, S::set(1.0f)));
  return S::div(m, S::add(m, S::set(2.0f)));
}

/// cap tanh(x / cap), given 1 / cap.
template <class S>
DAPJI_INLINE typename S::F softcap(typename S::F x, typename S::F cap, typename S::F inverse) {
  return S::mul(cap, tanh<S>(S::mul(x, inverse)));
}

/// x / (1 + e^-x)
template <class S>
DAPJI_INLINE typename S::F silu(typename S::F x) {
  const typename S::F one = S::set(1.0f);
  return S::div(x, S::add(one, exp<S>(S::sub(S::zero(), x))));
}

/// x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, by tanh(z) = 2 / (1 + e^-2z) - 1.
template <class S>
DAPJI_INLINE typename S::F gelu_tanh(typename S::F x) {
  const typename S::F one = S::set(1.0f);
  const typename S::F cubic = S::fma(S::mul(x, x), S::mul(x, S::set(0.044715f)), x);
  return S::div(x, S::add(one, exp<S>(S::mul(cubic, S::set(-1.5957691216f)))));
}

/// x (1 + erf(x / sqrt 2)) / 2
template <class S>
DAPJI_INLINE typename S::F gelu(typename S::F x) {
  alignas(64) float v[kLanes];
  S::store(v, x);
  for (float& e : v) e = 0.5f * e * (1.0f + __builtin_erff(e * 0.70710678f));
  return S::load(v);
}

template <class S>
DAPJI_INLINE typename S::F activate(Activation kind, typename S::F x) {
  switch (kind) {
    case Activation::silu:
      return silu<S>(x);
    case Activation::gelu:
      return gelu<S>(x);
    case Activation::gelu_tanh:
      return gelu_tanh<S>(x);
  }
  __builtin_unreachable();
}

}  // namespace dapji
