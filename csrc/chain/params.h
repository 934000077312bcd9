// A chain: kernels of few images that follow one another, in one launch.
#pragma once
#include <cstddef>
#include <vector>

#include "../conv/params.h"
#include "../depthwise/params.h"
#include "../pointwise/params.h"
#include "../pool/params.h"
#include "../squeeze_excite/params.h"

namespace effnet_fast::chain {

enum class Kind { stem, depthwise, gate, pointwise, pool };

// What one kernel would be given, and how chain.cuh deals it out to the blocks.
struct Step {
  Kind kind;
  // items, that blocks share. stem: 8 channels of a pixel; depthwise: 32 channels of a piece of an image; gate: a slice of an
  // image's channels; pointwise: a tile of 16 pixels; pool: 64 channels of an image. across: of them, those side by side.
  int items, across;
  int parts;    // depthwise: pieces of an image; gate: channels of a slice; pointwise: warps that share a tile
  int width;    // pointwise: 8 output channels each of a tile
  bool staged;  // gate: its weights come to shared memory ahead
  union {
    conv::Params stem;
    depthwise::ForwardParams depthwise;
    squeeze_excite::GateParams gate;
    pointwise::Params pointwise;
    pool::Params pool;
  };

  Step() {}  // unwritten
  explicit Step(const conv::Params& p) : kind(Kind::stem), stem(p) {}
  explicit Step(const depthwise::ForwardParams& p) : kind(Kind::depthwise), depthwise(p) {}
  explicit Step(const squeeze_excite::GateParams& p) : kind(Kind::gate), gate(p) {}
  explicit Step(const pointwise::Params& p) : kind(Kind::pointwise), pointwise(p) {}
  explicit Step(const pool::Params& p) : kind(Kind::pool), pool(p) {}
};

// Whether a chain takes it. Few images only are worth it; many are refused.
constexpr int kMostRows = 1 << 24, kMostChannels = 8192, kMostStem = 128;
bool takes(const conv::Params& p);
bool takes(const depthwise::ForwardParams& p);
bool takes(const squeeze_excite::GateParams& p);
bool takes(const pointwise::Params& p);
bool takes(const pool::Params& p);
template <typename P> bool takes(const P&) { return false; }

// Starts steps of one dtype, on the current device. barrier: 4 bytes there, zero before their first use, of no two launches at
// the same time. Returns how many launches they took.
int launch_cuda(const std::vector<Step>& steps, DType dtype, unsigned* barrier, void* stream);

}  // namespace effnet_fast::chain
