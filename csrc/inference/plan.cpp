#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "../common/parallel.h"

namespace effnet_fast::inference {

thread_local Plan* recording = nullptr;

namespace {

// Calls f(pointer, bytes, written) for the pointers of a kernel's params to what flows through the network: bytes of what it reads
// or writes there, of whole images that lie without gaps.
template <typename F> void each_pointer(conv::Params& p, const F& f) {
  const int64_t size = size_of(p.dtype), made = p.batch * p.out_height * p.out_width * p.channels * size;
  f(p.x, p.batch * p.height * p.width * p.in_channels * (p.pixels ? 1 : size), false);
  f(p.residual, made, false);
  f(p.y, made, true);
}
template <typename F> void each_pointer(depthwise::ForwardParams& p, const F& f) {
  const int64_t size = size_of(p.dtype);
  f(p.x, p.batch * p.height * p.width * p.channels * size, false);
  f(p.y, p.batch * p.out_height * p.out_width * p.channels * size, true);
  f(p.partial, p.batch * p.pieces * p.channels * sizeof(float), true);
}
template <typename F> void each_pointer(squeeze_excite::GateParams& p, const F& f) {
  f(p.partial, p.batch * p.pieces * p.channels * sizeof(float), false);
  f(p.gate, p.batch * p.channels * sizeof(float), true);
}
template <typename F> void each_pointer(pointwise::Params& p, const F& f) {
  const int64_t size = size_of(p.dtype), made = p.rows * p.out_channels * size;
  f(p.x, p.rows * p.in_channels * size, false);
  f(p.gate, p.rows / p.pixels * p.in_channels * sizeof(float), false);
  f(p.residual, made, false);
  f(p.y, made, true);
}
template <typename F> void each_pointer(pool::Params& p, const F& f) {
  f(p.x, p.batch * p.pixels * p.channels * size_of(p.dtype), false);
  f(p.y, p.batch * p.channels * size_of(p.dtype), true);
}
template <typename F> void each_pointer(ExpandDepthwise& p, const F& f) {
  f(p.expand.x, p.expand.rows * p.expand.in_channels * size_of(p.expand.dtype), false);
  depthwise::ForwardParams& d = p.depthwise;
  f(d.y, d.batch * d.out_height * d.out_width * d.channels * size_of(d.dtype), true);
  f(d.partial, d.batch * d.pieces * d.channels * sizeof(float), true);
}

void start(const conv::Params& p) { conv::conv_cpu(p); }
void start(const depthwise::ForwardParams& p) { depthwise::forward_cpu(p); }
void start(const squeeze_excite::GateParams& p) { squeeze_excite::gate_cpu(p); }
void start(const pointwise::Params& p) { pointwise::conv_bn_act_cpu(p); }
void start(const pool::Params& p) { pool::average_cpu(p); }
void start(const ExpandDepthwise& p) { expand_depthwise_cpu(p); }

// Whether the params are of one image, whole and without gaps, so that those of several can follow one another; and makes them so
// many's. The gate rounds its sums in another way for many images: it takes one after the other.
bool is_one_image(const conv::Params& p) {
  return p.batch == 1 && p.x_channel == 1 && p.x_pixel == p.in_channels && p.x_row == p.width * p.x_pixel;
}
bool is_one_image(const depthwise::ForwardParams& p) {
  return p.batch == 1 && p.x_pixel == p.channels && p.x_row == p.width * p.x_pixel;
}
bool is_one_image(const squeeze_excite::GateParams&) { return false; }
bool is_one_image(const pointwise::Params& p) { return p.rows == p.pixels; }
bool is_one_image(const pool::Params& p) { return p.batch == 1; }
bool is_one_image(const ExpandDepthwise& p) { return p.depthwise.batch == 1; }

void set_images(conv::Params& p, int64_t images) {
  p.batch = images;
  p.x_image = p.height * p.x_row;
}
void set_images(depthwise::ForwardParams& p, int64_t images) {
  p.batch = images;
  p.x_image = p.height * p.x_row;
}
void set_images(squeeze_excite::GateParams&, int64_t) {}
void set_images(pointwise::Params& p, int64_t images) { p.rows = images * p.pixels; }
void set_images(pool::Params& p, int64_t images) { p.batch = images; }
void set_images(ExpandDepthwise& p, int64_t images) { p.depthwise.batch = images; }

// Of the weights that a convolution reads for an image; 0 of what is none.
template <typename P> size_t weight_bytes(const P& p) { return packed_bytes(p); }
size_t weight_bytes(const ExpandDepthwise& p) { return packed_bytes(p.expand); }
size_t weight_bytes(const squeeze_excite::GateParams&) { return 0; }
size_t weight_bytes(const pool::Params&) { return 0; }

}  // namespace

Plan::Plan(std::shared_ptr<Store> store) : store_(std::move(store)) { recording = this; }

Plan::~Plan() { stop(); }

void Plan::stop() {
  if (recording == this) recording = nullptr;
}

const void* Plan::copy(const void* data, size_t bytes) {
  if (!data) return nullptr;
  return store_->keep(bytes, [&](void* to) { memcpy(to, data, bytes); });
}

template <typename P> void Plan::add_packed(P p) {
  p.packed = store_->keep(packed_bytes(p), [&](void* to) { pack_cpu(p, to); });
  p.weight = p.norm_weight = p.norm_bias = p.norm_mean = p.norm_var = nullptr;  // the packed form holds them
  add_step(p);
}

void Plan::add(const conv::Params& given) {
  conv::Params p = given;
  p.pixels = static_cast<const float*>(copy(p.pixels, 2 * p.in_channels * sizeof(float)));
  add_packed(p);
}
void Plan::add(const depthwise::ForwardParams& p) { add_packed(p); }
void Plan::add(const pointwise::Params& p) { add_packed(p); }

void Plan::add(const squeeze_excite::GateParams& given) {
  squeeze_excite::GateParams p = given;
  const size_t size = size_of(p.dtype), weights = size * p.channels * p.reduced;
  p.reduce_weight = copy(p.reduce_weight, weights);
  p.reduce_bias = copy(p.reduce_bias, size * p.reduced);
  p.expand_weight = copy(p.expand_weight, weights);
  p.expand_bias = copy(p.expand_bias, size * p.channels);
  add_step(p);
}

void Plan::add(const pool::Params& p) { add_step(p); }

// Memory that was freed and given out again is whoever wrote it last.
Plan::Use Plan::find(const void* data, size_t bytes) const {
  const char* at = static_cast<const char*>(data);
  if (!at) return {};
  for (int i = int(values_.size()) - 1; i >= 0; --i)
    if (at >= values_[i].data && at < values_[i].data + values_[i].bytes) return {Of::value, i, size_t(at - values_[i].data)};
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const char* input = static_cast<const char*>(inputs_[i].data);
    if (at >= input && at + bytes <= input + inputs_[i].bytes) return {Of::input, int(i), size_t(at - input)};
  }
  throw std::runtime_error("inference plan: step " + std::to_string(steps_.size()) + " reads what no step wrote");
}

template <typename P> void Plan::add_step(P p) {
  const int step = int(steps_.size());
  std::vector<Use> uses;
  std::vector<Value> written;
  each_pointer(p, [&](auto pointer, size_t bytes, bool is_written) {
    if (!is_written) {
      uses.push_back(find(pointer, bytes));
      if (uses.back().of == Of::value) values_[uses.back().number].needed = step;
    } else if (bytes == 0) {  // sums that are not asked for
      uses.push_back({});
    } else {
      uses.push_back({Of::value, int(values_.size() + written.size()), 0});
      written.push_back({reinterpret_cast<const char*>(pointer), bytes, step, step});
    }
  });
  values_.insert(values_.end(), written.begin(), written.end());
  uses_.push_back(uses);
  steps_.push_back(Step{p, {}});
}

// What is expanded for a depthwise convolution, and for nothing else, need not be stored: both become one step. Values keep the
// numbers of the steps as they were, of which only the order matters.
void Plan::join() {
  std::vector<Step> steps;
  std::vector<std::vector<Use>> uses;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto* expand = std::get_if<pointwise::Params>(&steps_[i].params);
    const auto* depthwise = i + 1 < steps_.size() ? std::get_if<depthwise::ForwardParams>(&steps_[i + 1].params) : nullptr;
    if (expand && depthwise && can_join(*expand, *depthwise)) {
      const Use x = uses_[i].front(), expanded = uses_[i].back();
      Value& value = values_[expanded.number];
      const Use& read = uses_[i + 1].front();
      if (read.of == Of::value && read.number == expanded.number && value.needed == int(i + 1)) {
        value.bytes = 0;
        if (x.of == Of::value) values_[x.number].needed = std::max(values_[x.number].needed, int(i + 1));
        uses_[i + 1].front() = x;
        steps_[i + 1].params = ExpandDepthwise{*expand, *depthwise};
        continue;
      }
    }
    steps.push_back(steps_[i]);
    uses.push_back(uses_[i]);
  }
  steps_ = std::move(steps);
  uses_ = std::move(uses);
}

// The last steps, from a convolution on whose weights are larger than what it makes of an image, as those of all after it are: they
// read more than they write, and once for several images. What such a step reads or writes lies next to the other images'. Where
// that is not a whole value, it goes from image to image.
void Plan::find_together() {
  together_ = steps_.size();
  for (size_t i = steps_.size(); i > 0; --i) {
    Step& step = steps_[i - 1];
    const std::vector<Use>& uses = uses_[i - 1];
    size_t written = 0, weights = 0;
    std::visit(
        [&](auto& params) {
          step.joint = is_one_image(params);
          weights = weight_bytes(params);
          const Use* use = uses.data();
          each_pointer(params, [&](auto&, size_t bytes, bool is_written) {
            written += is_written ? bytes : 0;
            if (use->of != Of::nothing && (use->offset != 0 || bytes_of(*use) != bytes)) step.joint = false;
            ++use;
          });
        },
        step.params);
    if (weights > 0 && weights < written) break;
    if (weights > 0) together_ = i - 1;
  }
  for (size_t i = together_; i < steps_.size(); ++i)
    for (const Use& use : uses_[i])
      if (use.of == Of::value && values_[use.number].result < 0) values_[use.number].images = kTogether;
  for (size_t i = 0; i < together_; ++i)  // what waits for the other images' is in use while they are computed
    for (const Use& use : uses_[i])
      if (use.of == Of::value && values_[use.number].images > 1) values_[use.number].written = 0;
}

// First fit, the largest first: each value at the lowest offset where it meets none that is needed at the same time.
void Plan::place_values() {
  std::vector<Value*> order, placed;
  for (Value& value : values_)
    if (value.result < 0) order.push_back(&value);
  const auto size = [](const Value* value) { return value->bytes * value->images; };
  std::stable_sort(order.begin(), order.end(), [&](const Value* a, const Value* b) { return size(a) > size(b); });
  for (Value* value : order) {
    std::vector<const Value*> meets;
    for (const Value* other : placed)
      if (other->written <= value->needed && value->written <= other->needed) meets.push_back(other);
    std::sort(meets.begin(), meets.end(), [](const Value* a, const Value* b) { return a->offset < b->offset; });
    size_t offset = 0;
    for (const Value* other : meets) {
      if (offset + size(value) <= other->offset) break;
      offset = std::max(offset, rounded_up(other->offset + size(other), kLine));
    }
    value->offset = offset;
    placed.push_back(value);
    arena_bytes_ = std::max(arena_bytes_, rounded_up(offset + size(value), kLine));
  }
}

void Plan::finish(const std::vector<Range>& results) {
  for (size_t i = 0; i < results.size(); ++i) {
    const Use use = find(results[i].data, results[i].bytes);
    if (use.of != Of::value || use.offset != 0 || bytes_of(use) != results[i].bytes || values_[use.number].result >= 0)
      throw std::runtime_error("inference plan: result " + std::to_string(i) + " is not what a step wrote, whole and once");
    values_[use.number].result = int(i);
    values_[use.number].needed = int(steps_.size());
    result_bytes_.push_back(results[i].bytes);
  }
  join();
  find_together();
  place_values();
  for (size_t i = 0; i < steps_.size(); ++i)
    for (size_t k = 0; k < uses_[i].size(); ++k) {
      const Use& use = uses_[i][k];
      Place& place = steps_[i].places[k];
      place.offset = use.offset;
      if (use.of == Of::input) place = {Where::input, use.number, use.offset, inputs_[use.number].bytes};
      if (use.of != Of::value) continue;
      const Value& value = values_[use.number];
      place.where = value.result >= 0 ? Where::result : Where::arena;
      place.number = value.result;
      if (value.result >= 0 || value.images > 1) place.stride = value.bytes;
      place.offset += value.offset;
    }
  uses_.clear();
  values_.clear();
}

void Plan::run_step(const Step& step, int64_t image, int64_t images, const Memories& memories) const {
  std::visit(
      [&](auto params) {
        const Place* place = step.places;
        each_pointer(params, [&](auto& pointer, size_t, bool) {
          char* at = nullptr;
          switch (place->where) {
            case Where::nowhere: break;
            case Where::input: at = const_cast<char*>(memories.inputs[place->number]); break;
            case Where::arena: at = memories.arena; break;
            case Where::result: at = memories.results[place->number]; break;
          }
          if (at) at += place->offset + image * place->stride;
          pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
          ++place;
        });
        if (images > 1) set_images(params, images);
        start(params);
      },
      step.params);
}

void Plan::run(int64_t images, const std::vector<Range>& inputs, const std::vector<Range>& results) const {
  bool fits = inputs.size() == inputs_.size() && results.size() == result_bytes_.size();
  for (size_t i = 0; fits && i < inputs.size(); ++i) fits = inputs[i].bytes == images * inputs_[i].bytes;
  for (size_t i = 0; fits && i < results.size(); ++i) fits = results[i].bytes == images * result_bytes_[i];
  if (!fits || recording == this) throw std::runtime_error("inference plan: images or results are not like those recorded");
  const auto range = [&](int64_t begin, int64_t end) {
    auto arena = store_->acquire(arena_bytes_);
    Memories memories{std::vector<const char*>(inputs.size()), arena->data(), std::vector<char*>(results.size())};
    for (int64_t first = begin, count; first < end; first += count) {
      count = std::min<int64_t>(kTogether, end - first);
      for (size_t k = 0; k < inputs.size(); ++k)
        memories.inputs[k] = static_cast<const char*>(inputs[k].data) + first * inputs_[k].bytes;
      for (size_t k = 0; k < results.size(); ++k)
        memories.results[k] = static_cast<char*>(const_cast<void*>(results[k].data)) + first * result_bytes_[k];
      for (int64_t i = 0; i < count; ++i)
        for (size_t k = 0; k < together_; ++k) run_step(steps_[k], i, 1, memories);
      for (size_t k = together_; k < steps_.size(); ++k) {
        const int64_t at_once = steps_[k].joint ? count : 1;
        for (int64_t i = 0; i < count; i += at_once) run_step(steps_[k], i, at_once, memories);
      }
    }
    store_->release(std::move(arena));
  };
  // An image a thread, as long as there is one for each; the threads share the others.
  const int64_t threads = thread_count(), alone = threads > 1 ? images / threads * threads : 0;
  if (alone > 0)
    parallel_for(alone, alone / threads, [&](int64_t begin, int64_t end) {
      const AloneGuard guard;
      range(begin, end);
    });
  if (alone < images) range(alone, images);
}

}  // namespace effnet_fast::inference
