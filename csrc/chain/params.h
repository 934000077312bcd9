// A chain: kernels of few images that follow one another, in one launch.
#pragma once
#include <cstddef>
#include <vector>

#include "../depthwise/params.h"
#include "../pointwise/params.h"
#include "../squeeze_excite/params.h"

namespace effnet_fast::chain {

enum class Kind { depthwise, gate, pointwise };

// What one kernel would be given, and how chain.cuh deals it out to the blocks.
struct Step {
  Kind kind;
  int items;    // that blocks share: tiles of 16 pixels; pieces of 32 channels of an image; slices of an image's gates
  int across;   // of items, those side by side: tiles of channels; groups of 32 channels; slices
  int parts;    // pointwise: warps that share a tile; depthwise: pieces of an image; gate: channels of a slice
  int width;    // pointwise: 8 output channels each of a tile
  bool staged;  // gate: its weights come to shared memory ahead
  union {
    depthwise::ForwardParams depthwise;
    squeeze_excite::GateParams gate;
    pointwise::Params pointwise;
  };

  Step() {}  // unwritten
  explicit Step(const depthwise::ForwardParams& p) : kind(Kind::depthwise), depthwise(p) {}
  explicit Step(const squeeze_excite::GateParams& p) : kind(Kind::gate), gate(p) {}
  explicit Step(const pointwise::Params& p) : kind(Kind::pointwise), pointwise(p) {}
};

// Whether a chain takes it. Few images only are worth it; many are refused.
constexpr int kMostRows = 1 << 24, kMostChannels = 8192;
bool takes(const depthwise::ForwardParams& p);
bool takes(const squeeze_excite::GateParams& p);
bool takes(const pointwise::Params& p);
template <typename P> bool takes(const P&) { return false; }

// Starts steps of one dtype, on the current device. barrier: 4 bytes there, zero before their first use, of no two launches at
// the same time.
// Returns how many launches they took.
int launch_cuda(const std::vector<Step>& steps, DType dtype, unsigned* barrier, void* stream);

}  // namespace effnet_fast::chain
