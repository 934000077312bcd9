// effnet_fast::plan_begin, plan_end, plan_run, plan_held and plan_free: a network's kernels on the CPU, recorded and replayed. The
// schemas are in effnet_fast/inference. A plan is known by a number that the caller chooses, under which this file keeps it: so the
// caller can free it whatever becomes of the call that began it.
#include "../inference/plan.h"

#include <unordered_map>

#include "torch.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kPlan = "inference plan";

std::mutex mutex;
std::unordered_map<int64_t, std::shared_ptr<inference::Plan>> plans;

std::shared_ptr<inference::Plan> plan_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(number);
  check(found != plans.end(), kPlan, ": there is none of number ", number);
  return found->second;
}

inference::Range range_of(const Tensor& t) { return {t.const_data_ptr(), size_t(t.numel()) * t.element_size()}; }

std::vector<inference::Range> ranges_of(const std::vector<Tensor>& tensors) {
  std::vector<inference::Range> ranges;
  for (const Tensor& t : tensors) ranges.push_back(range_of(t));
  return ranges;
}

void begin(int64_t number, const Tensor& image, int64_t like) {
  check(!inference::recording, kPlan, ": this thread is recording one already");
  check(image.dim() == 4 && image.size(0) == 1, kPlan, ": image has shape ", shape_text(image), ", expected [1, C, H, W]");
  auto store = like ? plan_of(like)->store() : std::make_shared<inference::Store>();
  auto plan = std::make_shared<inference::Plan>(range_of(image), std::move(store));
  const std::lock_guard<std::mutex> lock(mutex);
  plans[number] = std::move(plan);
}

std::vector<int64_t> end(int64_t number, std::vector<Tensor> results) {
  const auto plan = plan_of(number);
  check(inference::recording == plan.get(), kPlan, ": this thread does not record that one");
  plan->finish(ranges_of(results));
  return {int64_t(plan->steps()), int64_t(plan->arena_bytes()), int64_t(plan->packed_bytes())};
}

void run(int64_t number, const Tensor& images, std::vector<Tensor> results) {
  plan_of(number)->run(images.size(0), range_of(images), ranges_of(results));
}

int64_t held(int64_t number) { return int64_t(plan_of(number)->store()->bytes()); }

void free_plan(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  plans.erase(number);
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("plan_begin", TORCH_BOX(&begin));
  m.impl("plan_end", TORCH_BOX(&end));
  m.impl("plan_run", TORCH_BOX(&run));
}
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CompositeExplicitAutograd, m) {
  m.impl("plan_held", TORCH_BOX(&held));
  m.impl("plan_free", TORCH_BOX(&free_plan));
}

}  // namespace
}  // namespace effnet_fast::binding
