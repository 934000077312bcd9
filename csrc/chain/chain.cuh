// Whole networks of few images in one launch on CUDA, half types: a stem, depthwise convolutions, squeeze-excite gates, 1x1
// convolutions, the mean and the classifier, one after the other, each what the kernel of its own would make. For one image B0 is
// 67 such steps. As kernels of their own an H200 takes 4 us for one of them (benchmarks/results/model-trials-cuda.json), whatever
// there is to compute.
//
// A block lies on every SM from the first step to the last, 8 warps, and between two steps all blocks meet at a barrier, whose two
// halves are an addition and a look at a number in L2. What a step needs that no step makes comes before that look: its parameters,
// weights of the first product, taps, norms, and both weights of a gate where they fit. Then what is left is a trip to L2 for x,
// what is computed of it, and a trip to write it. How the steps do that stands in their files.
//
// Bytes and operations are those of the kernels of the steps; what binds is latency. By the counts of an H200 (a trip to L2 0.3 us,
// a meeting two of them) B0's 67 steps should take some 0.12 ms; no GPU has run this yet. How many warps share what is chosen by
// such counts too.
//
// Sums have a fixed order: an answer does not depend on the run, only on the number of SMs.
#pragma once
#include "depthwise.cuh"
#include "gate.cuh"
#include "pointwise.cuh"
#include "pool.cuh"
#include "stem.cuh"

namespace effnet_fast::chain {

// What a launch takes of parameters: 32,764 bytes since CUDA 12.1.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr size_t kParameterBytes = 4096;
#else
constexpr size_t kParameterBytes = 32764;
#endif
constexpr size_t kMostSteps = (kParameterBytes - 16) / sizeof(Step);

struct Program {
  Step steps[kMostSteps];
  int count;
  unsigned* barrier;
};
static_assert(sizeof(Program) <= kParameterBytes && sizeof(Step) <= 208);  // of 32,764: B5's 157 steps in one launch

constexpr int kStepBytes = (sizeof(Step) + 63) / 64 * 64;
static_assert(2 * kStepBytes % alignof(DepthwiseWork<5>) == 0);

template <typename T> __global__ void __launch_bounds__(kThreads, 1) chain_kernel(EFFNET_GRID_CONSTANT(Program, program)) {
  EFFNET_DYNAMIC_SHARED(char, shared);
  char* const memory = shared + 2 * kStepBytes;
  // Parameters of two steps: that which runs and the next.
  auto fetch = [&](int i) {
    constexpr int kWords = sizeof(Step) / 4;
    static_assert(sizeof(Step) % 4 == 0 && kWords <= kThreads - 32);
    if (const int word = int(threadIdx.x) - (kThreads - kWords); word >= 0)  // not the thread that looks at the barrier
      reinterpret_cast<uint32_t*>(shared + i % 2 * kStepBytes)[word] = reinterpret_cast<const uint32_t*>(program.steps + i)[word];
  };
  fetch(0);
  __syncthreads();
  unsigned before = 0;
  for (int i = 0; i < program.count; ++i) {
    const Step& step = *reinterpret_cast<const Step*>(shared + i % 2 * kStepBytes);
    // A step calls it once, when it has all that no step makes.
    auto wait = [&] {
      if (i + 1 < program.count) fetch(i + 1);
      if (i == 0) {
        __syncthreads();
      } else {
        grid_wait(program.barrier, before);
      }
    };
    if (step.kind == Kind::stem) {
      stem_step<T>(step, memory, wait);
    } else if (step.kind == Kind::pool) {
      pool_step<T>(step, memory, wait);
    } else if (step.kind == Kind::gate) {
      gate_step<T>(step, memory, wait);
    } else if (step.kind == Kind::depthwise) {
      if (step.depthwise.kernel == 3) {
        depthwise_step<T, 3>(step, memory, wait);
      } else {
        depthwise_step<T, 5>(step, memory, wait);
      }
    } else if (step.width == 2) {
      pointwise_step<T, 2>(step, memory, wait);
    } else {
      pointwise_step<T, 4>(step, memory, wait);
    }
    if (i + 1 < program.count) before = grid_arrive(program.barrier);
  }
}

// Deals a step out to that many blocks, each of which has `room` bytes of shared memory. Returns how many of them it takes.
inline int plan_step(Step& step, int blocks, int room) {
  step.staged = false;
  step.width = 0;
  switch (step.kind) {
    case Kind::stem: return plan_stem(step);
    case Kind::depthwise: return plan_depthwise(step, blocks);
    case Kind::gate: return plan_gate(step, blocks, room);
    case Kind::pointwise: return plan_pointwise(step, blocks);
    case Kind::pool: break;
  }
  return plan_pool(step);
}

constexpr int kStagedBytes = 128 << 10;  // of shared memory at most, where weights of gates are staged: the rest of it is L1

// Starts the steps in as few launches as they take, and returns how many, on a GPU of that many multiprocessors, of which a block
// may have so much shared memory.
template <typename T>
int launch(const std::vector<Step>& steps, unsigned* barrier, int multiprocessors, int shared_bytes, void* stream) {
  const int room = std::min(shared_bytes, kStagedBytes) - 2 * kStepBytes;
  EFFNET_ALLOW_SHARED(chain_kernel<T>, shared_bytes);
  int launches = 0;
  for (size_t first = 0; first < steps.size(); first += kMostSteps, ++launches) {
    Program program;
    int bytes = 2 * kStepBytes;
    program.count = int(std::min(steps.size() - first, kMostSteps));
    program.barrier = barrier;
    for (int i = 0; i < program.count; ++i) {
      program.steps[i] = steps[first + i];
      bytes = std::max(bytes, 2 * kStepBytes + plan_step(program.steps[i], multiprocessors, room));
    }
    launch_together(chain_kernel<T>, multiprocessors, kThreads, bytes, stream, program);
  }
  return launches;
}

}  // namespace effnet_fast::chain
