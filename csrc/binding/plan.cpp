// effnet_fast::plan_begin, plan_input, plan_stop, plan_end, plan_run, plan_held and plan_free: a network's kernels on the CPU,
// recorded and replayed. The schemas are in effnet_fast/inference. A plan is known by a number that the caller chooses, under which
// this file keeps it: so the caller can free it whatever becomes of the call that began it.
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

void begin(int64_t number, int64_t like) {
  check(!inference::recording, kPlan, ": this thread is recording one already");
  auto plan = std::make_shared<inference::Plan>(like ? plan_of(like)->store() : std::make_shared<inference::Store>());
  const std::lock_guard<std::mutex> lock(mutex);
  plans[number] = std::move(plan);
}

void input(int64_t number, const Tensor& t) {
  check(t.dim() > 0 && t.size(0) == 1, kPlan, ": an input has shape ", shape_text(t), ", expected [1, ...]");
  plan_of(number)->add_input(range_of(t));
}

void stop(int64_t number) { plan_of(number)->stop(); }

std::vector<int64_t> end(int64_t number, std::vector<Tensor> results) {
  const auto plan = plan_of(number);
  plan->stop();
  plan->finish(ranges_of(results));
  return {int64_t(plan->steps()), int64_t(plan->arena_bytes())};
}

void run(int64_t number, int64_t images, std::vector<Tensor> inputs, std::vector<Tensor> results) {
  plan_of(number)->run(images, ranges_of(inputs), ranges_of(results));
}

int64_t held(int64_t number) { return int64_t(plan_of(number)->store()->bytes()); }

void free_plan(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  plans.erase(number);
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) { m.impl("plan_input", TORCH_BOX(&input)); }
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CompositeExplicitAutograd, m) {
  m.impl("plan_begin", TORCH_BOX(&begin));
  m.impl("plan_stop", TORCH_BOX(&stop));
  m.impl("plan_end", TORCH_BOX(&end));
  m.impl("plan_run", TORCH_BOX(&run));
  m.impl("plan_held", TORCH_BOX(&held));
  m.impl("plan_free", TORCH_BOX(&free_plan));
}

}  // namespace
}  // namespace effnet_fast::binding
