// A network's kernel calls, recorded for one image and replayed without torch: the CPU's counterpart of a CUDA graph.
//
// While a Plan records, the bindings hand it the params of each CPU kernel that they start. It copies and packs the weights. The
// pointers to what flows through the network it turns into places: in the image or what else it is given, in one of the results,
// or in an arena, where values that are not needed at the same time share memory. A pointwise convolution and the depthwise one
// after it become one step. To run, it copies the params, puts pointers in and calls the kernels: for image after image, and at the
// end, where weights are larger than what they make of an image, for several at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "../conv/params.h"
#include "../depthwise/params.h"
#include "../pointwise/params.h"
#include "../pool/params.h"
#include "../squeeze_excite/params.h"
#include "expand_depthwise.h"
#include "store.h"

namespace effnet_fast::inference {

struct Range {
  const void* data;
  size_t bytes;
};

class Plan {
 public:
  // Starts to record in this thread. `store` is that of the network's other plans.
  explicit Plan(std::shared_ptr<Store> store);
  ~Plan();

  // The next thing that the kernels are given, of one image: the image, or what is made of it elsewhere. It lives until the end,
  // and lies where no kernel writes meanwhile.
  void add_input(Range input) { inputs_.push_back(input); }

  void add(const conv::Params& p);
  void add(const depthwise::ForwardParams& p);
  void add(const squeeze_excite::GateParams& p);
  void add(const pointwise::Params& p);
  void add(const pool::Params& p);

  // Ends the recording: what kernels this thread starts from now on is none of it.
  void stop();

  // After that. `results` were computed by it, and nobody has written to them since.
  // Throws std::runtime_error where a result is not what a kernel wrote, as add does where a kernel reads what none wrote.
  void finish(const std::vector<Range>& results);

  // Of so many images, one after the other: their inputs, and their results. Any number of threads may run a plan at the same time.
  // Throws std::runtime_error where the bytes are not those of that many recorded images and results.
  void run(int64_t images, const std::vector<Range>& inputs, const std::vector<Range>& results) const;

  size_t steps() const { return steps_.size(); }
  size_t arena_bytes() const { return arena_bytes_; }  // of the images that a thread computes
  const std::shared_ptr<Store>& store() const { return store_; }

 private:
  using Params = std::variant<conv::Params, depthwise::ForwardParams, squeeze_excite::GateParams, pointwise::Params, pool::Params,
                              ExpandDepthwise>;
  enum class Where { nowhere, input, arena, result };
  struct Place {
    Where where = Where::nowhere;
    int number = 0;                 // of the input or the result
    size_t offset = 0, stride = 0;  // from one image to the next; 0 where the next takes its place
  };
  static constexpr int kMostPointers = 4;
  static constexpr int kTogether = 4;  // images
  struct Step {
    Params params;
    Place places[kMostPointers];
    bool joint = false;  // from together_ on: computes several images at once
  };
  // What a kernel wrote: its bytes while recording, and from which step to which it is needed.
  struct Value {
    const char* data;
    size_t bytes;
    int written, needed;
    int result = -1;
    size_t offset = 0;
    int images = 1;  // that lie next to one another
  };
  enum class Of { nothing, input, value };
  struct Use {
    Of of = Of::nothing;
    int number = 0;
    size_t offset = 0;
  };

  template <typename P> void add_step(P p);
  template <typename P> void add_packed(P p);
  const void* copy(const void* data, size_t bytes);
  Use find(const void* data, size_t bytes) const;
  size_t bytes_of(const Use& use) const { return use.of == Of::value ? values_[use.number].bytes : inputs_[use.number].bytes; }
  // Where some images begin, and what becomes of them.
  struct Memories {
    std::vector<const char*> inputs;
    char* arena;
    std::vector<char*> results;
  };

  void join();
  void find_together();
  void place_values();
  void run_step(const Step& step, int64_t image, int64_t images, const Memories& memories) const;

  std::vector<Range> inputs_;
  std::vector<Step> steps_;
  std::vector<Value> values_;
  std::vector<std::vector<Use>> uses_;  // of each step's pointers
  std::vector<size_t> result_bytes_;
  size_t together_ = 0;  // the steps from here on go on with several images
  size_t arena_bytes_ = 0;
  const std::shared_ptr<Store> store_;
};

// The plan that this thread records, or null.
extern thread_local Plan* recording;

// Starts a CPU kernel, and records it where a plan is being made.
template <typename P> void call(const P& p, void (*kernel)(const P&)) {
  kernel(p);
  if (recording) recording->add(p);
}

}  // namespace effnet_fast::inference
