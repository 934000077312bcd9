// Vectors of W floats for the CPU kernels, as GCC and Clang vector types: the instruction set is that of the function they are
// inlined into. A kernel is written once as an EFFNET_INLINE template over W and instantiated by EFFNET_PER_ISA.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "activation.h"

#define EFFNET_INLINE inline __attribute__((always_inline))

namespace effnet_fast::simd {

// Types of W lanes. Members of a template, because an alias template would drop the attribute.
template <int W> struct Lanes {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef int32_t Int __attribute__((vector_size(W * 4)));
  typedef uint16_t Half __attribute__((vector_size(W * 2)));
};
template <int W> using Float = typename Lanes<W>::Float;
template <int W> using Int = typename Lanes<W>::Int;

template <int W> EFFNET_INLINE Float<W> load(const float* p) {
  Float<W> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <int W> EFFNET_INLINE Int<W> load_bits(const void* p) {
  typename Lanes<W>::Half bits;
  memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, Int<W>);
}
template <int W> EFFNET_INLINE Float<W> load(const bf16* p) { return (Float<W>)(load_bits<W>(p) << 16); }
template <int W> EFFNET_INLINE Float<W> load(const fp16* p) {  // to_float(fp16), lane by lane
  const Int<W> bits = load_bits<W>(p), magnitude = (bits & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const Int<W> normal = magnitude + (112 << 23) + ((exponent == 0x0f800000) & (112 << 23));
  const Float<W> offset = (Float<W>)(Int<W>{} + (113 << 23));
  const Int<W> subnormal = (Int<W>)((Float<W>)(magnitude + (113 << 23)) - offset);
  const Int<W> is_subnormal = exponent == 0;
  return (Float<W>)((is_subnormal & subnormal) | (~is_subnormal & normal) | (bits & 0x8000) << 16);
}
template <int W> EFFNET_INLINE void store(float* p, Float<W> v) { memcpy(p, &v, sizeof(v)); }
template <int W> EFFNET_INLINE void store_bits(void* p, Int<W> v) {
  const auto bits = __builtin_convertvector(v, typename Lanes<W>::Half);
  memcpy(p, &bits, sizeof(bits));
}
// To half types values are rounded to nearest, ties to even.
template <int W> EFFNET_INLINE void store(bf16* p, Float<W> v) {
  const Int<W> bits = (Int<W>)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_bits<W>(p, v == v ? rounded : (bits >> 16) | 0x40);
}
template <int W> EFFNET_INLINE void store(fp16* p, Float<W> v) {
  const Int<W> bits = (Int<W>)v, magnitude = bits & 0x7fffffff;
  const Int<W> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Int<W> subnormal = (Int<W>)((Float<W>)magnitude + 0.5f) - (126 << 23);  // the sum is rounded to multiples of 2^-24
  Int<W> half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? Int<W>{} + 0x7c00 : half;  // 65520 and more: infinity
  half = magnitude > 0x7f800000 ? Int<W>{} + 0x7e00 : half;
  store_bits<W>(p, half | ((bits >> 16) & 0x8000));
}

// The first `count` lanes of a vector, 1 to W of them: the others are zero, and are not written. Floats of AVX-512 by one masked
// move, which no sanitizer would see: a memcpy of a length that is not known is a call, and what it stored in pieces is no vector
// to load at once.
template <int W, typename T> EFFNET_INLINE Float<W> load_first(const T* p, int count) {
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
  if constexpr (W == 16 && std::is_same_v<T, float>) {
    Float<W> v;
    const uint16_t lanes = 0xffff >> (W - count);
    asm("vmovups %1, %0%{%2%}%{z%}" : "=v"(v) : "m"(*reinterpret_cast<const char (*)[sizeof(v)]>(p)), "Yk"(lanes));
    return v;
  }
#endif
  T edge[W] = {};
  memcpy(edge, p, count * sizeof(T));
  return load<W>(edge);
}
template <int W, typename T> EFFNET_INLINE void store_first(T* p, Float<W> v, int count) {
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
  if constexpr (W == 16 && std::is_same_v<T, float>) {
    const uint16_t lanes = 0xffff >> (W - count);
    asm("vmovups %1, %0%{%2%}" : "+m"(*reinterpret_cast<char (*)[sizeof(v)]>(p)) : "v"(v), "Yk"(lanes));
    return;
  }
#endif
  T edge[W];
  store<W>(edge, v);
  memcpy(p, edge, count * sizeof(T));
}

template <int W> EFFNET_INLINE float sum(Float<W> v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    Float<W / 2> half[2];
    memcpy(half, &v, sizeof(v));
    return sum<W / 2>(half[0] + half[1]);
  }
}

template <int W, bool high, size_t... lane>
EFFNET_INLINE Float<W> interleave(Float<W> a, Float<W> b, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (int(lane) / 2 + int(lane) % 2 * W + (high ? W / 2 : 0))...);
#else
  return __builtin_shuffle(a, b, Int<W>{(int(lane) / 2 + int(lane) % 2 * W + (high ? W / 2 : 0))...});
#endif
}
// The lower or the higher half of a, its lanes taking turns with those of b's.
template <int W, bool high> EFFNET_INLINE Float<W> interleave(Float<W> a, Float<W> b) {
  return interleave<W, high>(a, b, std::make_index_sequence<W>());
}

// Lane i is the sum of vector i. A vector is left with half as many sums in each round.
template <int W> EFFNET_INLINE Float<W> sum_each(Float<W> (&vectors)[W]) {
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Float<W> a = vectors[i], b = vectors[i + half];
      vectors[i] = interleave<W, false>(a, b) + interleave<W, true>(a, b);
    }
  return vectors[0];
}

// a > b ? a : b and a < b ? a : b, lane by lane: b where one of them is NaN. GCC would make two instructions of that.
template <int W> EFFNET_INLINE Float<W> maximum(Float<W> a, Float<W> b) {
#if defined(__x86_64__)
  if constexpr (W >= 8) {
    asm("vmaxps %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
    return a;
  }
#endif
  return a > b ? a : b;
}
template <int W> EFFNET_INLINE Float<W> minimum(Float<W> a, Float<W> b) {
#if defined(__x86_64__)
  if constexpr (W >= 8) {
    asm("vminps %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
    return a;
  }
#endif
  return a < b ? a : b;
}

// 2^(j / kPowers), less the exponent that j << kPowerShift adds to it.
constexpr int kPowers = 32, kPowerShift = 18;
struct Powers {
  alignas(64) float at[kPowers]{};
  constexpr Powers() {
    double power = 1;
    for (int j = 0; j < kPowers; ++j, power *= 1.0218971486541166)  // 2^(1 / 32)
      at[j] = std::bit_cast<float>(std::bit_cast<int32_t>(float(power)) - (j << kPowerShift));
  }
};
inline constexpr Powers powers;

// 1 + e^-v; e^-v within 3 ulp for |v| <= 8 and 7 ulp for v <= 86, for greater ones what it is there, infinity below -88.7, for NaN
// anything. e^-v = 2^(n / of) e^r with |r| <= ln2 / (2 of). Vectors of 16 take of = 32 and 2^(n / 32) from two registers: a
// polynomial of degree 2 is left, 12 % less time for SiLU than one of degree 5, which others take for of = 1. Its largest relative
// error, 9.2e-8 and there 5.3e-8, is the least of those that give e^0 = 1.
template <int W> EFFNET_INLINE Float<W> one_plus_exp_of_minus(Float<W> v) {
  constexpr float ln2 = 0.693147182f, lowest = -128 * ln2, highest = 86.f;  // at the lowest, 2^128 has the bits of infinity
  constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves n in the low bits of the significand
#if defined(__x86_64__)
  constexpr bool has_powers = W == 16;
#else
  constexpr bool has_powers = false;
#endif
  constexpr float of = has_powers ? kPowers : 1;
  const Float<W> zero{};
  v = minimum<W>(zero + highest, maximum<W>(zero + lowest, v));
  const Float<W> shifted = v * (-1.44269504f * of) + round, n = shifted - round;
  const Float<W> r = n * (-ln2 / of) - v;
#if defined(__x86_64__)
  if constexpr (has_powers) {
    Int<W> power = (Int<W>)shifted;
    asm("vpermi2ps %2, %1, %0" : "+v"(power) : "v"(load<W>(powers.at)), "vm"(load<W>(powers.at + W)));
    const Float<W> p = (r * 0.5f + 1.00001466f) * r + 1.f;
    return (Float<W>)(power + ((Int<W>)shifted << kPowerShift)) * p + 1.f;
  }
#endif
  Float<W> p = r * 8.29031039e-3f + 4.18979526e-2f;
  p = p * r + 1.66676357e-1f;
  p = p * r + 4.99991506e-1f;
  p = p * r + 9.99999702e-1f;
  p = p * r + 1.f;
  return (Float<W>)((Int<W>)p + ((Int<W>)shifted << 23)) + 1.f;
}

template <int W> EFFNET_INLINE Float<W> activate(Activation activation, Float<W> v) {
  const Float<W> zero{};
  switch (activation) {
    case Activation::identity: break;
    case Activation::silu: return v / one_plus_exp_of_minus<W>(v);
    case Activation::relu: return maximum<W>(zero, v);
    case Activation::relu6: return minimum<W>(zero + 6.f, maximum<W>(zero, v));
    case Activation::sigmoid: return v == v ? 1.f / one_plus_exp_of_minus<W>(v) : v;
  }
  return v;
}

// Floats in a vector of the best instruction set of this machine.
inline int width() {
#if defined(__x86_64__)
  static const int width = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 4;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 16 : 8;
  }();
  return width;
#else
  return 4;
#endif
}

// Floats in the widest vector, 16, 8, 4 or 1, that so many elements fill.
inline int width_for(int elements) {
  int lanes = width();
  while (lanes > elements) lanes = lanes > 4 ? lanes / 2 : 1;
  return lanes;
}

}  // namespace effnet_fast::simd

// Defines `void name parameters`, which calls body<simd::width()> arguments compiled for AVX-512 (16), AVX2 (8) or the
// compiler's baseline (4: an SSE or NEON register).
#if defined(__x86_64__)
#define EFFNET_PER_ISA(name, parameters, body, arguments)                                                                      \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void name##_avx512 parameters { body<16> arguments; } \
  __attribute__((target("avx2,fma"))) void name##_avx2 parameters { body<8> arguments; }                                       \
  void name##_baseline parameters { body<4> arguments; }                                                                       \
  void name parameters {                                                                                                       \
    switch (simd::width()) {                                                                                                   \
      case 16: return name##_avx512 arguments;                                                                                 \
      case 8: return name##_avx2 arguments;                                                                                    \
      default: return name##_baseline arguments;                                                                               \
    }                                                                                                                          \
  }
#define EFFNET_NARROWER(name, task)             \
  if (width == 8) return name##_isa_avx2(task); \
  if (width == 4) return name##_isa_baseline(task);
#else
#define EFFNET_PER_ISA(name, parameters, body, arguments) \
  void name parameters { body<4> arguments; }
#define EFFNET_NARROWER(name, task)
#endif

// Defines `void name(const Task& task, int width)`, which calls body<width>(task) for a width that simd::width_for gives.
#define EFFNET_PER_WIDTH(name, body)                           \
  EFFNET_PER_ISA(name##_isa, (const Task& task), body, (task)) \
  void name(const Task& task, int width) {                     \
    if (width == simd::width()) return name##_isa(task);       \
    EFFNET_NARROWER(name, task)                                \
    body<1>(task);                                             \
  }
