// CUDA kernel source on the CPU: each thread of a block is a fiber, blocks run one after another.
//
// Beyond the arithmetic it checks: threads run in a random order between barriers, dynamic shared memory starts as NaN, barriers
// and shuffles must be reached by every lane at the same place, and AddressSanitizer and UBSan see every access and its alignment.
//
// Not seen: races between blocks, overflow from one part of shared memory into another, the rounding of the GPU's own expf.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

enum class Wait { none, block, warp, done };

struct Fiber {
  ucontext_t context;
  dim3 thread_index;
  unsigned rank = 0;
  Wait wait = Wait::none;
  const void* site = nullptr;  // where it parked: lanes parked at different places are a bug
  unsigned mask = 0;
  uint64_t slot = 0;  // the value it offers to a shuffle
  std::vector<char> stack;
  void* fake_stack = nullptr;
};

struct State {
  ucontext_t main;
  void* main_fake_stack = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  Fiber* current = nullptr;
  std::vector<Fiber> fibers;
  std::function<void()> body;
  dim3 grid, block, block_index;
  char* shared = nullptr;
  std::mt19937 order{0};
};
inline State& state() {
  static State s;
  return s;
}

[[noreturn]] inline void fail(const char* what) {
  const dim3 b = state().block_index;
  throw std::runtime_error("emulator: " + std::string(what) + " (block " + std::to_string(b.x) + ", " + std::to_string(b.y) + ")");
}

// Switching between fibers, with AddressSanitizer told about it.
inline void to_main() {
  Fiber* f = state().current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f->wait == Wait::done ? nullptr : &f->fake_stack, state().main_bottom, state().main_size);
#endif
  swapcontext(&f->context, &state().main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state().current->fake_stack, &state().main_bottom, &state().main_size);
#endif
}
inline void enter() {
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
  __sanitizer_start_switch_fiber(&state().main_fake_stack, f.stack.data(), f.stack.size());
#endif
  swapcontext(&state().main, &f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state().main_fake_stack, nullptr, nullptr);
#endif
}

// Appends to `ready` the lanes of each warp whose every lane named in the mask has arrived at one warp primitive.
inline void release_warps(std::vector<unsigned>& ready) {
  const auto& fibers = state().fibers;
  for (size_t low = 0; low < fibers.size(); low += 32) {
    const size_t high = std::min(low + 32, fibers.size());
    const Fiber* lead = nullptr;
    for (size_t i = low; i < high && !lead; ++i)
      if (fibers[i].wait == Wait::warp) lead = &fibers[i];
    if (!lead) continue;
    bool all = true;
    for (size_t i = low; i < high; ++i) {
      if (!(lead->mask >> (i - low) & 1)) continue;
      if (fibers[i].wait == Wait::done) fail("a lane named in a shuffle's mask has exited");
      if (fibers[i].wait != Wait::warp) {
        all = false;
      } else if (fibers[i].site != lead->site || fibers[i].mask != lead->mask) {
        fail("lanes of a warp wait at different shuffles");
      }
    }
    for (size_t i = low; all && i < high; ++i)
      if (lead->mask >> (i - low) & 1) ready.push_back(unsigned(i));
  }
}

inline void run_block() {
  State& s = state();
  auto& fibers = s.fibers;
  std::vector<unsigned> ready;
  for (Fiber& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    ready.push_back(f.rank);
  }
  while (true) {
    std::shuffle(ready.begin(), ready.end(), s.order);  // any order must give the same answer
    for (const unsigned i : ready) resume(fibers[i]);
    ready.clear();
    release_warps(ready);
    if (!ready.empty()) continue;
    size_t done = 0, in_warp = 0;
    const void* site = nullptr;
    bool same = true;
    for (const Fiber& f : fibers) {
      if (f.wait == Wait::done) {
        ++done;
      } else if (f.wait == Wait::block) {
        if (!site) site = f.site;
        same = same && f.site == site;
      } else {
        ++in_warp;
      }
    }
    if (done == fibers.size()) return;
    if (in_warp) fail("a shuffle waits for lanes that are elsewhere");
    if (done) fail("__syncthreads is not reached by every thread");
    if (!same) fail("threads wait at different __syncthreads");
    for (unsigned i = 0; i < fibers.size(); ++i) ready.push_back(i);
  }
}

template <typename F> void launch(F&& body, dim3 grid, dim3 block, size_t shared_bytes) {
  State& s = state();
  s.grid = grid;
  s.block = block;
  s.body = body;
  s.fibers = std::vector<Fiber>(block.x * block.y * block.z);
  for (unsigned i = 0; i < s.fibers.size(); ++i) {
    s.fibers[i].rank = i;
    s.fibers[i].thread_index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    s.fibers[i].stack.resize(64 << 10);
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        s.block_index = dim3(x, y, z);
        // Exactly as long as asked for, so that AddressSanitizer stands at the end; 0xff.. is NaN in fp32, bf16 and fp16.
        const std::unique_ptr<char, void (*)(void*)> shared(static_cast<char*>(std::malloc(shared_bytes)), std::free);
        std::memset(shared.get(), 0xff, shared_bytes);
        s.shared = shared.get();
        run_block();
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

}  // namespace emu

#define EMU_SITE                    \
  ([]() -> const char* {            \
    static const char here[2] = {}; \
    return here;                    \
  }())
#define threadIdx (emu::state().current->thread_index)
#define blockIdx (emu::state().block_index)
#define blockDim (emu::state().block)
#define gridDim (emu::state().grid)
#define __syncthreads() emu::barrier(emu::Wait::block, 0, EMU_SITE)
#define __shfl_xor_sync(mask, value, lanes) emu::shuffle(mask, value, int(emu::state().current->rank & 31) ^ (lanes), EMU_SITE)
using std::min;

#define EFFNET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), emu::launch([=] { kernel(__VA_ARGS__); }, grid, block, shared_bytes))
#define EFFNET_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::state().shared)
