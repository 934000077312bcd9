// What reads a raw convolution result without a convolution, on the CPU: a block's last norm and activation, the squeeze, both
// their backwards, and statistics.
//
// A thread owns a run of units, kChunk pixels of an image each; a vector is W channels of one pixel. Each tensor is read or written
// once: memory binds, or SiLU's 14 instructions and division (20 with its slope) where there is one.
#include "elements.h"

namespace effnet_fast::training {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements worth a thread

enum class What { out, mean, sums, image_sums, backward, gradient, stats };

struct Task {
  const Elements* p;
  What what;
  const void* grad;
  const void* residual;
  const Gradient* of_y;
  void* out;
  double* sums;  // of the calling thread: [sums_of(what), lanes], for each image of its units where the sums are an image's
  int64_t first, last, first_image;
};

constexpr bool by_image(What what) { return what == What::mean || what == What::image_sums; }
constexpr int sums_of(What what) {
  return what == What::mean ? 1 : what == What::image_sums ? 5 : what == What::out || what == What::gradient ? 0 : 2;
}
int64_t units_of(int64_t pixels) { return (pixels + kChunk - 1) / kChunk; }

template <int W, What what> EFFNET_INLINE void run_units(const Task& t) {
  using namespace simd;
  const Elements& p = *t.p;
  const int blocks = blocks_of(p.channels, W);
  const int64_t per_image = units_of(p.pixels), lanes = int64_t(blocks) * W;
  for (int64_t unit = t.first; unit < t.last; ++unit) {
    const int64_t image = unit / per_image, start = unit % per_image * kChunk, end = std::min(p.pixels, start + kChunk);
    double* sums = t.sums + (by_image(what) ? (image - t.first_image) * sums_of(what) * lanes : 0);
    for (int block = 0; block < blocks; ++block) {
      const int channel = block_start<W>(block, p.channels);
      const auto each = [&](auto&& body) __attribute__((always_inline)) {
        for (int64_t pixel = start; pixel < end; ++pixel) body((image * p.pixels + pixel) * p.channels + channel);
      };
      const auto add = [&](int number, auto v) __attribute__((always_inline)) { add_to<W>(sums + number * lanes + block * W, v); };
      const Float<W> gate = p.read.gate ? load<W>(p.read.gate + image * p.channels + channel) : Float<W>{} + 1.f;
      if constexpr (what == What::stats) {
        Totals<W> totals;
        each([&](int64_t i) __attribute__((always_inline)) { totals.add(load_any<W>(p.read.x, i, p.dtype)); });
        add(0, totals.sum);
        add(1, totals.squares);
      } else if constexpr (what == What::gradient) {
        const GradientOf<W> gradient(*t.of_y, p.dtype, p.channels, channel, image);
        each([&](int64_t i) __attribute__((always_inline)) { store_any<W>(t.out, i, p.dtype, gradient.at(*t.of_y, i)); });
      } else {
        const Vectors<W> norm(p.read.norm, p.channels, channel);
        const Activation activation = p.read.activation;
        Float<W> made[5] = {};
        typename Wide<W>::Type exact[2] = {};  // of a block's last result, which is small
        each([&](int64_t i) __attribute__((always_inline)) {
          const Float<W> x = load_any<W>(p.read.x, i, p.dtype);
          if constexpr (what == What::out) {
            Float<W> v = activate<W>(activation, norm(x)) * gate;
            if (t.residual) v += load_any<W>(t.residual, i, p.dtype);
            store_any<W>(t.out, i, p.dtype, v);
          } else if constexpr (what == What::mean) {
            made[0] += activate<W>(activation, norm(x));
          } else {
            const Activated<W> activated = activate_with_slope<W>(activation, norm(x));
            const Float<W> grad = load_any<W>(t.grad, i, p.dtype), slope = activated.slope, centred = x - norm.mean;
            if constexpr (what == What::image_sums) {
              const Float<W> product = grad * slope;
              made[0] += grad * activated.value;
              made[1] += product;
              made[2] += slope;
              made[3] += product * centred;
              made[4] += slope * centred;
            } else {
              const Float<W> product = grad * gate * slope;
              if constexpr (what == What::sums) {
                exact[0] += widen<W>(product);
                exact[1] += widen<W>(product) * widen<W>(centred);
              } else {
                made[0] += product;
                made[1] += product * centred;

                const Float<W> v = t.residual ? product + load_any<W>(t.residual, i, p.dtype) : product;
                store_any<W>(t.out, i, p.dtype, v);
              }
            }
          }
        });
        for (int number = 0; number < sums_of(what); ++number)
          add(number, what == What::sums ? exact[number % 2] : widen<W>(made[number]));
      }
    }
  }
}

template <int W> EFFNET_INLINE void run_any(const Task& t) {
  switch (t.what) {
    case What::out: return run_units<W, What::out>(t);
    case What::mean: return run_units<W, What::mean>(t);
    case What::sums: return run_units<W, What::sums>(t);
    case What::image_sums: return run_units<W, What::image_sums>(t);
    case What::backward: return run_units<W, What::backward>(t);
    case What::gradient: return run_units<W, What::gradient>(t);
    case What::stats: return run_units<W, What::stats>(t);
  }
}

EFFNET_PER_WIDTH(run, run_any)

// Runs a task over all units; returns what the threads gathered.
Gathered run_all(Task task) {
  const Elements& p = *task.p;
  const int width = simd::width_for(p.channels), lanes = blocks_of(p.channels, width) * width;
  const int64_t per_image = units_of(p.pixels), units = p.images * per_image;
  const int64_t worth = p.images * p.pixels * p.channels / kGrain;
  return in_parts(worth, units, [&](Part& part) {
    Task t = task;
    t.first = part.first;
    t.last = part.last;
    if (by_image(t.what))
      part.set_images(t.first / per_image, (t.last - 1) / per_image, sums_of(t.what) * lanes);
    else
      part.sums.resize(sums_of(t.what) * lanes);
    t.first_image = part.first_image;
    t.sums = part.sums.data();
    run(t, width);
  });
}

}  // namespace

void norm_act_cpu(const Elements& p, const void* residual, void* out) {
  run_all(Task{&p, What::out, nullptr, residual, nullptr, out, nullptr, 0, 0, 0});
}

void norm_act_mean_cpu(const Elements& p, float* mean) {
  const Gathered made = run_all(Task{&p, What::mean, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, 0});
  add_up(made, p.images, 1, p.channels, simd::width_for(p.channels), mean, double(p.pixels));
}

void norm_act_sums_cpu(const Elements& p, const void* grad, float* sums) {
  const Gathered made = run_all(Task{&p, What::sums, grad, nullptr, nullptr, nullptr, nullptr, 0, 0, 0});
  add_up(made, 1, 2, p.channels, simd::width_for(p.channels), sums);
}

void norm_act_backward_cpu(const Elements& p, const void* grad, const void* residual, void* grad_x, float* sums) {
  const Gathered made = run_all(Task{&p, What::backward, grad, residual, nullptr, grad_x, nullptr, 0, 0, 0});
  add_up(made, 1, 2, p.channels, simd::width_for(p.channels), sums);
}

void norm_act_image_sums_cpu(const Elements& p, const void* grad, float* sums) {
  const Gathered made = run_all(Task{&p, What::image_sums, grad, nullptr, nullptr, nullptr, nullptr, 0, 0, 0});
  add_up(made, p.images, 5, p.channels, simd::width_for(p.channels), sums);
}

void norm_gradient_cpu(const Elements& p, const Gradient& of_y, void* out) {
  run_all(Task{&p, What::gradient, nullptr, nullptr, &of_y, out, nullptr, 0, 0, 0});
}

void batch_stats_cpu(const Elements& p, float* mean, float* var) {
  finish_stats(run_all(Task{&p, What::stats, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, 0}), p.images * p.pixels,
               p.channels, simd::width_for(p.channels), mean, var);
}

}  // namespace effnet_fast::training
