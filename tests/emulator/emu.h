// CUDA kernel source on the CPU: each thread of a block is a fiber. The blocks of a cluster, or of a grid that is launched
// together, run together, clusters one after another.
//
// Beyond the arithmetic it checks: threads run in a random order between barriers, some warps only when no other can, dynamic
// shared memory starts as NaN, barriers and warp primitives must be reached by every lane at the same place, and AddressSanitizer
// and UBSan see every access and its alignment. A copy_async turns its destination into NaN when it is issued and writes it when
// its thread waits for it: a missing wait and a copy issued while others still read the old bytes both change the result. Of the
// blocks of a cluster that have come to a barrier of their own some go on before the others; the shared memory of one that has
// ended is gone.
//
// Not seen: races between blocks of different clusters, overflow from one part of shared memory into another, the rounding of the
// GPU's own expf and approximate functions, that tensor cores truncate fp32 sums, and memory that others see in another order than
// it was written in: releases and acquires are but an addition and a look.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "context.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

enum class Wait { none, block, warp, cluster, others, done };

struct Copy {
  char* to;
  const void* from;
  bool real;  // or zeros
};

struct Fiber {
  Context context;
  dim3 thread_index;
  unsigned rank = 0;   // in the cluster
  unsigned block = 0;  // likewise
  Wait wait = Wait::none;
  const void* site = nullptr;  // where it parked: lanes parked at different places are a bug
  unsigned mask = 0;
  int arrivals = 0, waits = 0;  // at the cluster's barrier
  uint64_t slot = 0;            // the value it offers to a shuffle
  char* rows[2] = {};           // that it names for matrices; a lane that is ahead names the next one already
  unsigned named = 0;
  float a[8] = {}, b[4] = {};                // its part of an mma's A and B
  std::vector<std::vector<Copy>> groups{1};  // of asynchronous copies; the last is being filled
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
};

constexpr size_t kStack = 32 << 10;  // AddressSanitizer clears its shadow for each launch

struct Block {
  dim3 index;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
};

struct State {
  Context main;
  void* main_fake_stack = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  Fiber* current = nullptr;
  std::vector<Fiber> fibers;  // of a cluster, block by block
  std::vector<Block> blocks;
  std::function<void()> body;
  dim3 grid, block;
  size_t shared_bytes = 0;
  std::mt19937 order{0};
  std::vector<bool> slow;  // warps that run only when no other can
  int looks = 0;           // of threads that wait for others, since a block has passed a barrier
};
inline State& state() {
  static State s;
  return s;
}

inline Block& block_now() { return state().blocks[state().current->block]; }

[[noreturn]] inline void fail(const char* what) {
  const dim3 b = block_now().index;
  throw std::runtime_error("emulator: " + std::string(what) + " (block " + std::to_string(b.x) + ", " + std::to_string(b.y) + ")");
}

// Switching between fibers, with AddressSanitizer told about it.
inline void to_main() {
  Fiber* f = state().current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f->wait == Wait::done ? nullptr : &f->fake_stack, state().main_bottom, state().main_size);
#endif
  switch_context(f->context, state().main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state().current->fake_stack, &state().main_bottom, &state().main_size);
#endif
}
inline void enter() noexcept {  // what is thrown in a fiber ends the process, with its message
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state().main_bottom, &state().main_size);
#endif
  state().body();
  state().current->wait = Wait::done;
  to_main();
}
inline void resume(Fiber& f) {
  state().current = &f;
  f.wait = Wait::none;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state().main_fake_stack, f.stack.get(), kStack);
#endif
  switch_context(state().main, f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state().main_fake_stack, nullptr, nullptr);
#endif
}

// Appends to `ready` the lanes of each warp whose every lane named in the mask has arrived at one warp primitive.
inline void release_warps(std::vector<unsigned>& ready) {
  auto& fibers = state().fibers;
  for (size_t low = 0; low < fibers.size(); low += 32) {
    const size_t high = std::min(low + 32, fibers.size());
    const Fiber* lead = nullptr;
    for (size_t i = low; i < high && !lead; ++i)
      if (fibers[i].wait == Wait::warp) lead = &fibers[i];
    if (!lead) continue;
    bool all = true;
    for (size_t i = low; i < high; ++i) {
      if (!(lead->mask >> (i - low) & 1)) continue;
      if (fibers[i].wait == Wait::done) fail("a lane named in the mask of a shuffle or warp primitive has exited");
      if (fibers[i].wait != Wait::warp) {
        all = false;
      } else if (fibers[i].site != lead->site || fibers[i].mask != lead->mask) {
        fail("lanes of a warp wait at different shuffles or warp primitives");
      }
    }
    for (size_t i = low; all && i < high; ++i)
      if (lead->mask >> (i - low) & 1) ready.push_back(unsigned(i));
  }
  for (const unsigned i : ready) fibers[i].wait = Wait::none;
}

inline void draw_slow() {
  State& s = state();
  s.slow.resize(s.fibers.size() / 32);
  for (size_t warp = 0; warp < s.slow.size(); ++warp) s.slow[warp] = s.order() % 2;
}

// Appends to `ready` the threads of some of the blocks that can pass a barrier: all of a block's threads wait at the same one, and
// at a cluster's all threads of the cluster have arrived or exited. Blocks keep no step with each other. And those that wait for
// what others write: they look again.
inline void release_barriers(std::vector<unsigned>& ready) {
  State& s = state();
  const size_t threads = s.fibers.size() / s.blocks.size();
  int arrived = INT_MAX;  // how often every thread that has not exited has
  for (const Fiber& f : s.fibers)
    if (f.wait != Wait::done) arrived = std::min(arrived, f.arrivals);
  std::vector<size_t> passing;
  for (size_t block = 0; block < s.blocks.size(); ++block) {
    Fiber* const first = s.current = &s.fibers[block * threads];
    const auto count = [&](Wait wait) {
      return size_t(std::count_if(first, first + threads, [&](const Fiber& f) { return f.wait == wait; }));
    };
    const size_t done = count(Wait::done);
    if (done == threads) continue;
    const size_t looking = count(Wait::others);
    for (size_t i = 0; looking && i < threads; ++i)
      if (first[i].wait == Wait::others) ready.push_back(unsigned(block * threads + i));
    if (looking) continue;
    if (count(Wait::warp)) fail("a shuffle or warp primitive waits for lanes that are elsewhere");
    if (done) fail("a barrier is not reached by every thread");
    for (const Fiber* f = first; f < first + threads; ++f)
      if (f->site != first->site) fail("threads wait at different barriers");
    if (first->wait == Wait::block || first->arrivals <= arrived) passing.push_back(block);
  }
  s.looks = passing.empty() ? s.looks + 1 : 0;
  if (passing.empty() && (ready.empty() || s.looks > 2)) fail("blocks wait for each other");
  std::shuffle(passing.begin(), passing.end(), s.order);
  if (!passing.empty()) passing.resize(1 + s.order() % passing.size());
  for (const size_t block : passing)
    for (size_t i = 0; i < threads; ++i) ready.push_back(unsigned(block * threads + i));
  draw_slow();
}

inline void run_cluster() {
  State& s = state();
  auto& fibers = s.fibers;
  const size_t threads = fibers.size() / s.blocks.size();
  std::vector<unsigned> ready, now;
  std::vector<size_t> running(s.blocks.size(), threads);
  size_t left = fibers.size();
  for (Fiber& f : fibers) {
    prepare_context(f.context, f.stack.get(), kStack, enter);
    f.groups.assign(1, {});
    f.arrivals = f.waits = 0;
    f.wait = Wait::none;
    ready.push_back(f.rank);
  }
  draw_slow();
  while (left) {
    const auto later = std::partition(ready.begin(), ready.end(), [&](unsigned i) { return !s.slow[i / 32]; });
    const auto end = later == ready.begin() ? ready.end() : later;
    now.assign(ready.begin(), end);
    ready.erase(ready.begin(), end);
    std::shuffle(now.begin(), now.end(), s.order);  // any order must give the same answer
    for (const unsigned i : now) {
      resume(fibers[i]);
      if (fibers[i].wait != Wait::done) continue;
      --left;
      if (--running[fibers[i].block] == 0) s.blocks[fibers[i].block].shared.reset();
    }
    release_warps(ready);
    if (ready.empty() && left) release_barriers(ready);
  }
}

// A grid whose blocks are clusters of `cluster` in x.
template <typename F> void launch(F&& body, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster = 1) {
  State& s = state();
  const unsigned threads = block.x * block.y * block.z;
  if (threads % 32 || grid.x % cluster) throw std::runtime_error("emulator: a block is whole warps, a grid whole clusters");
  s.grid = grid;
  s.block = block;
  s.body = body;
  s.shared_bytes = shared_bytes;
  s.fibers = std::vector<Fiber>(cluster * threads);
  s.blocks = std::vector<Block>(cluster);
  for (unsigned i = 0; i < s.fibers.size(); ++i) {
    const unsigned thread = i % threads;
    s.fibers[i].rank = i;
    s.fibers[i].block = i / threads;
    s.fibers[i].thread_index = dim3(thread % block.x, thread / block.x % block.y, thread / (block.x * block.y));
    s.fibers[i].stack.reset(new char[kStack]);
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (unsigned i = 0; i < cluster; ++i) {
          s.blocks[i].index = dim3(x + i, y, z);
          // Exactly as long as asked for, so that AddressSanitizer stands at the end; 0xff.. is NaN in fp32, bf16 and fp16.
          s.blocks[i].shared.reset(static_cast<char*>(std::malloc(shared_bytes)));
          std::memset(s.blocks[i].shared.get(), 0xff, shared_bytes);
        }
        run_cluster();
      }
}

__attribute__((noinline)) inline void barrier(Wait wait, unsigned mask, const void* site) {
  Fiber* f = state().current;
  f->wait = wait;
  f->mask = mask;
  f->site = site;
  to_main();
}

template <typename T> __attribute__((noinline)) T shuffle(unsigned mask, T value, int source, const char* site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&state().current->slot, &value, sizeof(T));
  barrier(Wait::warp, mask, site);
  T result;
  std::memcpy(&result, &state().fibers[(state().current->rank & ~31u) + source].slot, sizeof(T));
  barrier(Wait::warp, mask, site + 1);  // or a fast lane would offer its next value before a slow one has read this
  return result;
}

__attribute__((noinline)) inline unsigned ballot(unsigned mask, bool predicate, const char* site) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(shuffle(mask, predicate, lane, site)) << lane;
  return votes;
}

// A place in the source, for primitives that are functions in common/.
inline const char* site_of(const std::source_location& at) { return reinterpret_cast<const char*>(uintptr_t(at.line()) << 8); }

inline void check_shared_16(const char* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail((std::string(what) + ": misaligned").c_str());
  if (p < block_now().shared.get() || p + 16 > block_now().shared.get() + state().shared_bytes)
    fail((std::string(what) + ": outside shared memory").c_str());
}

// This lane's 4 bytes of its row of a matrix, when every lane has named a row.
inline char* matrix_element(int matrix) {
  const unsigned rank = state().current->rank;
  const unsigned now = state().current->named & 1;
  return state().fibers[(rank & ~31u) + matrix * 8 + rank % 32 / 4].rows[now] + rank % 4 * 4;
}
// Its two halves of a column.
inline uint32_t turned_element(int matrix) {
  const unsigned rank = state().current->rank, now = state().current->named & 1;
  uint16_t halves[2];
  for (int i = 0; i < 2; ++i)
    std::memcpy(&halves[i], state().fibers[(rank & ~31u) + matrix * 8 + rank % 4 * 2 + i].rows[now] + rank % 32 / 4 * 2, 2);
  return halves[0] | uint32_t(halves[1]) << 16;
}
__attribute__((noinline)) inline void name_row(char* row, const char* site) {
  check_shared_16(row, "a matrix's row");
  Fiber* const f = state().current;
  f->rows[++f->named & 1] = row;
  barrier(Wait::warp, ~0u, site);
}

template <typename T, int K> __attribute__((noinline)) void mma(float* c, const uint32_t* a, const uint32_t* b, const char* site) {
  const auto half = [](uint32_t pair, int which) { return effnet_fast::to_float(T{uint16_t(pair >> 16 * which)}); };
  Fiber* f = state().current;
  for (int i = 0; i < K / 2; ++i) f->a[i] = half(a[i / 2], i % 2);
  for (int i = 0; i < K / 4; ++i) f->b[i] = half(b[i / 2], i % 2);
  barrier(Wait::warp, ~0u, site);
  f = state().current;
  const Fiber* warp = &state().fibers[f->rank & ~31u];
  for (int i = 0; i < 4; ++i) {
    const unsigned row = f->rank % 32 / 4 + i / 2 * 8, column = f->rank % 4 * 2 + i % 2;
    for (int k = 0; k < K; ++k) {  // register k / 8 * 2 + row / 8 of A's lane, k / 8 of B's
      const unsigned q = k % 8 / 2;
      c[i] += warp[row % 8 * 4 + q].a[k / 8 * 4 + row / 8 * 2 + k % 2] * warp[column * 4 + q].b[k / 8 * 2 + k % 2];
    }
  }
  barrier(Wait::warp, ~0u, site + 1);
}

}  // namespace emu

// The host twins of common/cuda.h and common/tensor_core.h.
namespace effnet_fast {

inline float exp2_fast(float v) { return std::exp2(v); }
inline float reciprocal_fast(float v) { return 1.f / v; }
// With as much error as PTX allows it, up or down by the last bit of v; but 1 where processors have 1, of which PTX says nothing.
inline float tanh_fast(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return std::abs(v) > 8.f ? std::copysign(1.f, v)
                           : std::clamp(std::tanh(v) * (bits & 1 ? 1.f + 0x1p-11f : 1.f - 0x1p-11f), -1.f, 1.f);
}
inline float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }
inline float lesser(float a, float b) { return std::fmin(a, b); }
inline float greater_or_nan(float a, float b) { return a < b ? b : a; }
inline float late_zero() { return 0.f; }
template <typename T> T pin(T v) { return v; }
template <typename T> T* pin_global(T* p) { return p; }

inline uint16_t round_half(bf16, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return uint16_t(v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
}
inline uint16_t round_half(fp16, float v) {
  const _Float16 rounded = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
template <typename T> uint32_t round_pair(float low, float high) {
  return round_half(T{}, low) | uint32_t(round_half(T{}, high)) << 16;
}

template <typename T> uint32_t multiply_pair(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t pair, int which) { return to_float(T{uint16_t(pair >> 16 * which)}); };
  return round_pair<T>(half(a, 0) * half(b, 0), half(a, 1) * half(b, 1));
}

inline void cluster_arrive() {
  emu::Fiber* const f = emu::state().current;
  if (f->arrivals++ != f->waits) emu::fail("a thread arrives again at its cluster's barrier and has not waited");
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait(std::source_location at = std::source_location::current()) {
  emu::Fiber* const f = emu::state().current;
  if (++f->waits != f->arrivals) emu::fail("a thread waits at its cluster's barrier and has not arrived");
  emu::barrier(emu::Wait::cluster, 0, emu::site_of(at));
}
inline float* cluster_peer(float* shared, int rank) {
  emu::Block& theirs = emu::state().blocks.at(rank);
  if (emu::Block& mine = emu::block_now(); &mine != &theirs) {
    if (emu::state().current->waits == 0)
      emu::fail("a thread uses another block's memory before all blocks are known to have started");
    return reinterpret_cast<float*>(theirs.shared.get() + (reinterpret_cast<char*>(shared) - mine.shared.get()));
  }
  return shared;
}
template <typename... Parameters, typename... Arguments> void launch_cluster(void (*kernel)(Parameters...), unsigned blocks,
                                                                             unsigned threads, int size, size_t shared_bytes, void*,
                                                                             const Arguments&... arguments) {
  emu::launch([=] { kernel(arguments...); }, dim3(blocks), dim3(threads), shared_bytes, size);
}

#define EFFNET_GRID_CONSTANT(type, name) const type& name
inline unsigned add_release(unsigned* p, unsigned value) { return std::exchange(*p, *p + value); }
// Others come before it.
inline unsigned load_acquire(const unsigned* p) {
  emu::barrier(emu::Wait::others, 0, nullptr);
  return *p;
}
template <typename... Parameters, typename... Arguments> void launch_together(void (*kernel)(Parameters...), unsigned blocks,
                                                                              unsigned threads, size_t shared_bytes, void* stream,
                                                                              const Arguments&... arguments) {
  launch_cluster(kernel, blocks, threads, int(blocks), shared_bytes, stream, arguments...);
}

using Shared = char*;
inline Shared shared_address(void* p) { return static_cast<char*>(p); }
inline void copy_async(Shared to, const void* from, int bytes) {
  emu::check_shared_16(to, "copy_async's destination");
  if (bytes && reinterpret_cast<uintptr_t>(from) % 16) emu::fail("copy_async's source: misaligned");
  std::memset(to, 0xff, 16);
  emu::state().current->groups.back().push_back({to, from, bytes != 0});
}
inline void copy_async_commit() { emu::state().current->groups.emplace_back(); }
template <int kKeep> void copy_async_wait() {
  auto& groups = emu::state().current->groups;
  while (int(groups.size()) - 1 > kKeep) {
    for (const emu::Copy& c : groups.front()) c.real ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
    groups.erase(groups.begin());
  }
}
inline void load_matrices(uint32_t (&r)[4], Shared row, std::source_location at = std::source_location::current()) {
  emu::name_row(row, emu::site_of(at));
  for (int m = 0; m < 4; ++m) std::memcpy(&r[m], emu::matrix_element(m), 4);
  emu::barrier(emu::Wait::warp, ~0u, emu::site_of(at) + 1);
}
inline void load_matrices_turned(uint32_t (&r)[4], Shared row, std::source_location at = std::source_location::current()) {
  emu::name_row(row, emu::site_of(at));
  for (int m = 0; m < 4; ++m) r[m] = emu::turned_element(m);
  emu::barrier(emu::Wait::warp, ~0u, emu::site_of(at) + 1);
}
// Nothing waits behind it: other lanes may see these bytes only after a __syncwarp of the kernel's own.
inline void store_matrices(Shared row, const uint32_t (&r)[4], std::source_location at = std::source_location::current()) {
  emu::name_row(row, emu::site_of(at));
  for (int m = 0; m < 4; ++m) std::memcpy(emu::matrix_element(m), &r[m], 4);
}
template <typename T> void mma_k16(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   std::source_location at = std::source_location::current()) {
  const uint32_t b[2] = {b0, b1};
  emu::mma<T, 16>(c, a, b, emu::site_of(at));
}
template <typename T>
void mma_k8(T, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0, std::source_location at = std::source_location::current()) {
  const uint32_t a[2] = {a0, a1};
  emu::mma<T, 8>(c, a, &b0, emu::site_of(at));
}

}  // namespace effnet_fast

#define EMU_SITE                    \
  ([]() -> const char* {            \
    static const char here[2] = {}; \
    return here;                    \
  }())
#define threadIdx (emu::state().current->thread_index)
#define blockIdx (emu::block_now().index)
#define blockDim (emu::state().block)
#define gridDim (emu::state().grid)
#define __syncthreads() emu::barrier(emu::Wait::block, 0, EMU_SITE)
#define __syncwarp() emu::barrier(emu::Wait::warp, ~0u, EMU_SITE)
#define __ballot_sync(mask, predicate) emu::ballot(mask, predicate, EMU_SITE)
#define __shfl_sync(mask, value, source) emu::shuffle(mask, value, source, EMU_SITE)
#define __shfl_xor_sync(mask, value, lanes) emu::shuffle(mask, value, int(emu::state().current->rank & 31) ^ (lanes), EMU_SITE)
using std::max;
using std::min;

#define EFFNET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), emu::launch([=] { kernel(__VA_ARGS__); }, grid, block, shared_bytes))
#define EFFNET_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::block_now().shared.get())
#define EFFNET_ALLOW_SHARED(kernel, bytes)
