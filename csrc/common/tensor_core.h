// Asynchronous copies into shared memory (cp.async), the matrices that mma takes and gives (ldmatrix, stmatrix), and mma itself.
// Under g++ all of them come from the emulator's emu.h.
#pragma once
#include "cuda.h"
#ifdef __CUDACC__

namespace effnet_fast {

// An address in shared memory. The empty asm hides where it came from: left to itself nvcc 13 works the base out again (S2R,
// MOV, LEA) before every single use.
using Shared = uint32_t;
__device__ __forceinline__ Shared shared_address(void* p) { return pin(static_cast<Shared>(__cvta_generic_to_shared(p))); }

// 16 bytes from global to shared memory without registers: the first `bytes` (16 or 0) copied, the rest zeros. .cg: no L1 line is
// spent on data that is read once.
__device__ __forceinline__ void copy_async(Shared to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kKeep of this thread's groups are in flight.
template <int kKeep> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kKeep) : "memory");
}

// Four 8x8 matrices of halves. Lane i names the 16-byte row i % 8 of matrix i / 8; with g = lane / 4 and q = lane % 4 it gets
// columns 2q and 2q + 1 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
// The same matrices turned: the lane gets rows 2q and 2q + 1 of column g of each.
__device__ __forceinline__ void load_matrices_turned(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
// The reverse of load_matrices. Ampere has no stmatrix: the owner of each row is asked for its address, and four plain stores do
// it.
__device__ __forceinline__ void store_matrices(Shared row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const Shared to = __shfl_sync(0xffffffffu, row, m * 8 + lane / 4) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(r[m]) : "memory");
  }
#endif
}
__device__ __forceinline__ Vec<uint32_t, 4> load_shared_16(Shared from) {
  Vec<uint32_t, 4> v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.at[0]), "=r"(v.at[1]), "=r"(v.at[2]), "=r"(v.at[3])
               : "r"(from)
               : "memory");
  return v;
}

// Two halves times two. A fused multiply-add with -0 is what sm_80 has for bf16.
template <typename T> __device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
}

// c += a . b by a warp: a [16, k], b [k, 8], both of T, c [16, 8] fp32. A lane holds: a0 (row g, k 2q and 2q + 1), a1 (row g + 8),
// a2 (row g, k 8 + 2q and on), a3 (row g + 8); b0 (k 2q and 2q + 1, column g), b1 (k 8 + 2q and on); c0 and c1 (row g, columns 2q
// and 2q + 1), c2 and c3 (row g + 8).
#define EFFNET_MMA(T, NAME)                                                                                                 \
  __device__ __forceinline__ void mma_k16(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {             \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                    \
  }                                                                                                                         \
  __device__ __forceinline__ void mma_k8(T, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {                         \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                    \
        : "r"(a0), "r"(a1), "r"(b0));                                                                                       \
  }
EFFNET_MMA(bf16, "bf16")
EFFNET_MMA(fp16, "f16")
#undef EFFNET_MMA

}  // namespace effnet_fast
#else
namespace effnet_fast {

inline Vec<uint32_t, 4> load_shared_16(Shared from) { return load<4>(reinterpret_cast<const uint32_t*>(from)); }

}  // namespace effnet_fast
#endif
