// What one multiprocessor does a clock, an instruction at a time: the rates that kernel designs and the roofline rest on.
//   nvcc -O3 -std=c++20 -arch=native -shared -Xcompiler -fPIC benchmarks/ceilings.cu -o ceilings.so
// One block of 1024 threads a multiprocessor, eight independent chains a thread: enough to hide every latency. Each block reports
// the clocks that its loop took.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

enum Rate {
  kMmaK8,
  kMmaK16,
  kFma,
  kFmaTaps,
  kEx2,
  kRcp,
  kTanh,
  kEx2Bf16x2,
  kTanhBf16x2,
  kEx2F16x2,
  kTanhF16x2,
  kRates,
};
constexpr int kThreads = 1024, kChains = 8, kRepeats = 4, kTaps = 5, kColumns = 4;

template <int kRate>
__device__ __forceinline__ void step(float& v, uint32_t& pair, float (&c)[4], const uint32_t (&a)[6], float scale) {
  if constexpr (kRate == kMmaK8)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]));
  if constexpr (kRate == kMmaK16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
  if constexpr (kRate == kFma) asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(v) : "f"(scale));
  if constexpr (kRate == kEx2) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  // The addition keeps two reciprocals in a row from cancelling.
  if constexpr (kRate == kRcp) asm volatile("{.reg .f32 t; rcp.approx.ftz.f32 t, %0; add.f32 %0, t, %1;}" : "+f"(v) : "f"(scale));
  if constexpr (kRate == kTanh) asm volatile("tanh.approx.f32 %0, %0;" : "+f"(v));
#if __CUDA_ARCH__ >= 900
  if constexpr (kRate == kEx2Bf16x2) asm volatile("ex2.approx.ftz.bf16x2 %0, %0;" : "+r"(pair));
  if constexpr (kRate == kTanhBf16x2) asm volatile("tanh.approx.bf16x2 %0, %0;" : "+r"(pair));
  if constexpr (kRate == kEx2F16x2) asm volatile("ex2.approx.f16x2 %0, %0;" : "+r"(pair));
  if constexpr (kRate == kTanhF16x2) asm volatile("tanh.approx.f16x2 %0, %0;" : "+r"(pair));
#endif
}

template <int kRate> __global__ void __launch_bounds__(kThreads) rate_kernel(long long* clocks, float* sink, int iterations) {
  float v[kChains], c[kChains][4] = {}, row[kTaps + kColumns - 1], weight[kTaps * kTaps];
  uint32_t pair[kChains], a[6];
  const float base = 1e-3f * (1 + threadIdx.x % 7);
  const __nv_bfloat162 both = __floats2bfloat162_rn(base, base * 0.5f);
#pragma unroll
  for (int i = 0; i < kChains; ++i) {
    v[i] = row[i] = base * (i + 1);
    memcpy(&pair[i], &both, 4);
    pair[i] += i;
    if (i < 6) a[i] = pair[i];
  }
#pragma unroll
  for (int i = 0; i < kTaps * kTaps; ++i) weight[i] = base * (i - 12);
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int n = 0; n < iterations; ++n) {
    if constexpr (kRate == kFmaTaps) {  // the taps of four neighbouring outputs of a 5x5 depthwise convolution, from registers
#pragma unroll
      for (int tap = 0; tap < kTaps * kTaps; ++tap)
#pragma unroll
        for (int column = 0; column < kColumns; ++column) v[column] = fmaf(row[column + tap % kTaps], weight[tap], v[column]);
      asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]));
    } else {
#pragma unroll
      for (int r = 0; r < kRepeats; ++r)
#pragma unroll
        for (int i = 0; i < kChains; ++i) step<kRate>(v[i], pair[i], c[i], a, base);
    }
  }
  __syncthreads();
  const long long spent = clock64() - start;
  if (threadIdx.x == 0) clocks[blockIdx.x] = spent;
  if (iterations < 0) {  // never: keeps the work alive
    float total = 0;
    for (int i = 0; i < kChains; ++i) total += v[i] + __uint_as_float(pair[i]) + c[i][0] + c[i][1] + c[i][2] + c[i][3];
    sink[threadIdx.x] = total;
  }
}

template <int kRate> int launch(int rate, int iterations, int blocks, long long* clocks, float* sink, cudaStream_t stream) {
  if constexpr (kRate < kRates) {
    if (rate != kRate) return launch<kRate + 1>(rate, iterations, blocks, clocks, sink, stream);
    rate_kernel<kRate><<<blocks, kThreads, 0, stream>>>(clocks, sink, iterations);
    return cudaGetLastError();
  }
  return cudaErrorInvalidValue;
}

// clocks: [blocks]; sink: [kThreads]. A cudaError_t.
extern "C" int run_rate(int rate, int iterations, int blocks, void* clocks, void* sink, void* stream) {
  return launch<0>(rate, iterations, blocks, static_cast<long long*>(clocks), static_cast<float*>(sink),
                   static_cast<cudaStream_t>(stream));
}
// Instructions of one thread in one iteration.
extern "C" int instructions(int rate) { return rate == kFmaTaps ? kTaps * kTaps * kColumns : kChains * kRepeats; }
