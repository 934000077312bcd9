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

// Calls f(pointer, bytes) for the pointers of a kernel's params to what flows through the network; bytes of what it writes there,
// 0 where it reads.
template <typename F> void each_pointer(conv::Params& p, const F& f) {
  f(p.x, 0);
  f(p.residual, 0);
  f(p.y, p.batch * p.out_height * p.out_width * p.channels * size_of(p.dtype));
}
template <typename F> void each_pointer(depthwise::ForwardParams& p, const F& f) {
  f(p.x, 0);
  f(p.y, p.batch * p.out_height * p.out_width * p.channels * size_of(p.dtype));
  f(p.partial, p.batch * p.pieces * p.channels * sizeof(float));
}
template <typename F> void each_pointer(squeeze_excite::GateParams& p, const F& f) {
  f(p.partial, 0);
  f(p.gate, p.batch * p.channels * sizeof(float));
}
template <typename F> void each_pointer(pointwise::Params& p, const F& f) {
  f(p.x, 0);
  f(p.gate, 0);
  f(p.residual, 0);
  f(p.y, p.rows * p.out_channels * size_of(p.dtype));
}
template <typename F> void each_pointer(pool::Params& p, const F& f) {
  f(p.x, 0);
  f(p.y, p.batch * p.channels * size_of(p.dtype));
}

template <typename F> void each_pointer(ExpandDepthwise& p, const F& f) {
  f(p.expand.x, 0);
  depthwise::ForwardParams& d = p.depthwise;
  f(d.y, d.batch * d.out_height * d.out_width * d.channels * size_of(d.dtype));
  f(d.partial, d.batch * d.pieces * d.channels * sizeof(float));
}

void start(const conv::Params& p) { conv::conv_cpu(p); }
void start(const depthwise::ForwardParams& p) { depthwise::forward_cpu(p); }
void start(const squeeze_excite::GateParams& p) { squeeze_excite::gate_cpu(p); }
void start(const pointwise::Params& p) { pointwise::conv_bn_act_cpu(p); }
void start(const pool::Params& p) { pool::average_cpu(p); }
void start(const ExpandDepthwise& p) { expand_depthwise_cpu(p); }

// The kernel's own packed_bytes, which a member of Plan would hide.
template <typename P> size_t bytes_to_pack(const P& p) { return packed_bytes(p); }

}  // namespace

Plan::Plan(Range image, std::shared_ptr<Store> store) : image_(image), store_(std::move(store)) { recording = this; }

Plan::~Plan() {
  if (recording == this) recording = nullptr;
}

const void* Plan::copy(const void* data, size_t bytes) {
  if (!data) return nullptr;
  packed_bytes_ += bytes;
  return store_->keep(bytes, [&](void* to) { memcpy(to, data, bytes); });
}

template <typename P> void Plan::add_packed(P p) {
  const size_t bytes = bytes_to_pack(p);
  packed_bytes_ += bytes;
  p.packed = store_->keep(bytes, [&](void* to) { pack_cpu(p, to); });
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
Plan::Use Plan::find(const void* data) const {
  const char* at = static_cast<const char*>(data);
  if (!at) return {-2, 0};
  for (int i = int(values_.size()) - 1; i >= 0; --i)
    if (at >= values_[i].data && at < values_[i].data + values_[i].bytes) return {i, size_t(at - values_[i].data)};
  const char* image = static_cast<const char*>(image_.data);
  if (at >= image && at < image + image_.bytes) return {-1, size_t(at - image)};
  throw std::runtime_error("inference plan: step " + std::to_string(steps_.size()) + " reads what no step wrote");
}

template <typename P> void Plan::add_step(P p) {
  const int step = int(steps_.size());
  std::vector<Use> uses;
  std::vector<Value> written;
  each_pointer(p, [&](auto pointer, size_t bytes) {
    if (bytes == 0) {
      uses.push_back(find(pointer));
      if (uses.back().value >= 0) values_[uses.back().value].needed = step;
    } else {
      uses.push_back({int(values_.size() + written.size()), 0});
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
      Value& value = values_[expanded.value];
      if (uses_[i + 1].front().value == expanded.value && value.needed == int(i + 1)) {
        value.bytes = 0;
        if (x.value >= 0) values_[x.value].needed = std::max(values_[x.value].needed, int(i + 1));
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

// First fit, the largest first: each value at the lowest offset where it meets none that is needed at the same time.
void Plan::place_values() {
  std::vector<Value*> order, placed;
  for (Value& value : values_)
    if (value.result < 0) order.push_back(&value);
  std::stable_sort(order.begin(), order.end(), [](const Value* a, const Value* b) { return a->bytes > b->bytes; });
  for (Value* value : order) {
    std::vector<const Value*> meets;
    for (const Value* other : placed)
      if (other->written <= value->needed && value->written <= other->needed) meets.push_back(other);
    std::sort(meets.begin(), meets.end(), [](const Value* a, const Value* b) { return a->offset < b->offset; });
    size_t offset = 0;
    for (const Value* other : meets) {
      if (offset + value->bytes <= other->offset) break;
      offset = std::max(offset, rounded_up(other->offset + other->bytes, kLine));
    }
    value->offset = offset;
    placed.push_back(value);
    arena_bytes_ = std::max(arena_bytes_, rounded_up(offset + value->bytes, kLine));
  }
}

void Plan::finish(const std::vector<Range>& results) {
  recording = nullptr;
  for (size_t i = 0; i < results.size(); ++i) {
    const Use use = find(results[i].data);
    if (use.value < 0 || use.offset != 0 || values_[use.value].bytes != results[i].bytes || values_[use.value].result >= 0)
      throw std::runtime_error("inference plan: result " + std::to_string(i) + " is not what a step wrote, whole and once");
    values_[use.value].result = int(i);
    values_[use.value].needed = int(steps_.size());
    result_bytes_.push_back(results[i].bytes);
  }
  join();
  place_values();
  for (size_t i = 0; i < steps_.size(); ++i)
    for (size_t k = 0; k < uses_[i].size(); ++k) {
      const Use& use = uses_[i][k];
      Place& place = steps_[i].places[k];
      place.offset = use.offset;
      if (use.value == -1) place.where = Where::image;
      if (use.value < 0) continue;
      const Value& value = values_[use.value];
      place.where = value.result >= 0 ? Where::result : Where::arena;
      place.result = value.result;
      place.offset += value.offset;
    }
  uses_.clear();
  values_.clear();
}

void Plan::run_image(const char* image, char* arena, const std::vector<char*>& results) const {
  for (const Step& step : steps_)
    std::visit(
        [&](auto params) {
          const Place* place = step.places;
          each_pointer(params, [&](auto& pointer, size_t) {
            char* at = nullptr;
            switch (place->where) {
              case Where::nowhere: break;
              case Where::image: at = const_cast<char*>(image) + place->offset; break;
              case Where::arena: at = arena + place->offset; break;
              case Where::result: at = results[place->result] + place->offset; break;
            }
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
            ++place;
          });
          start(params);
        },
        step.params);
}

void Plan::run(int64_t images, Range image, const std::vector<Range>& results) const {
  bool fits = image.bytes == images * image_.bytes && results.size() == result_bytes_.size();
  for (size_t i = 0; fits && i < results.size(); ++i) fits = results[i].bytes == images * result_bytes_[i];
  if (!fits || recording == this) throw std::runtime_error("inference plan: images or results are not like those recorded");
  const auto range = [&](int64_t begin, int64_t end) {
    auto arena = store_->acquire(arena_bytes_);
    std::vector<char*> at(results.size());
    for (int64_t i = begin; i < end; ++i) {
      for (size_t k = 0; k < results.size(); ++k)
        at[k] = static_cast<char*>(const_cast<void*>(results[k].data)) + i * result_bytes_[k];
      run_image(static_cast<const char*>(image.data) + i * image_.bytes, arena->data(), at);
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
