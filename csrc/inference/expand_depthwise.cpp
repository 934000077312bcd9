// The expanded image, the largest of a block, is never stored: a thread computes a few channels of some of its rows into scratch
// that stays in L2, and convolves them there.
//
// A thread owns a range of the squeeze's pieces, all channels of it, as it does in the pointwise convolutions around: what it
// reads it has mostly written itself. Where rows are few, so that those which two ranges need would be too many, a thread owns
// panels of channels of all rows. It goes through its rows panel by panel; rows that the next ones need again stay in the scratch.
// x is read once for each panel. A panel's weights, once in L1 and L2, serve all images. What it costs is that of the two kernels
// without the traffic of what is between them.
#include "expand_depthwise.h"

#include <algorithm>
#include <cstring>

#include "../common/parallel.h"
#include "../common/scratch.h"

namespace effnet_fast::inference {
namespace {

constexpr int64_t kScratch = 192 << 10;  // bytes of the expanded rows
constexpr int kLeastRows = 18;           // for each that is computed twice
constexpr int64_t kGrain = 1 << 19;      // multiply-adds worth a thread: waking a sleeping one costs about 30 us

// Some channels of the expanded image's rows [first, last), which lie in scratch.
class Rows {
 public:
  Rows(const ExpandDepthwise& p, int first_channel, int last_channel)
      : p_(p), first_channel_(first_channel), last_channel_(last_channel), pixel_((last_channel - first_channel + 15) / 16 * 16) {
    const depthwise::ForwardParams& d = p.depthwise;
    const int64_t fitting = kScratch / (row() * size_of(d.dtype));
    outputs_ = std::max(1, int(std::min<int64_t>(d.out_height, (fitting - d.kernel) / d.stride + 1)));
    const int64_t most = std::min((outputs_ - 1) * d.stride + d.kernel, d.height);
    scratch_ = reinterpret_cast<char*>(scratch<Rows>((most * row() * size_of(d.dtype) + 3) / 4));
  }

  // The depthwise convolution's output rows [first, last), which are those of a piece.
  void convolve(int first, int last, float* partial) {
    const depthwise::ForwardParams& d = p_.depthwise;
    for (int begin = first; begin < last; begin += outputs_) {
      const int end = std::min(begin + outputs_, last);
      const int from = std::clamp(begin * d.stride - d.pad_top, 0, d.height);
      expand(from, std::clamp((end - 1) * d.stride - d.pad_top + d.kernel, from, d.height));
      depthwise::ForwardParams part = d;
      part.x = at_image();
      part.x_pixel = pixel_;
      part.x_row = row();
      depthwise::band_cpu(part, {0, begin, end, first_channel_, last_channel_, partial, partial && begin > first});
    }
  }

 private:
  int64_t row() const { return pixel_ * p_.depthwise.width; }

  // Where the first channel of the image's first row would lie.
  char* at_image() const {
    const int64_t before = first_ * row() + first_channel_;
    return reinterpret_cast<char*>(reinterpret_cast<intptr_t>(scratch_) - before * size_of(p_.depthwise.dtype));
  }

  // Has the rows [first, last) ready.
  void expand(int first, int last) {
    const int64_t bytes = row() * size_of(p_.depthwise.dtype);
    const int kept = std::max(0, last_ - first);
    if (kept > 0) memmove(scratch_, scratch_ + (first - first_) * bytes, kept * bytes);
    first_ = first;
    last_ = std::max(last, first + kept);
    pointwise::Params part = p_.expand;
    part.y = at_image();
    part.y_row = pixel_;
    const int64_t width = p_.depthwise.width;
    if (first + kept < last) pointwise::part_cpu(part, {(first + kept) * width, last * width, first_channel_, last_channel_});
  }

  const ExpandDepthwise& p_;
  const int first_channel_, last_channel_;
  const int64_t pixel_;  // elements from one pixel to the next
  int outputs_;          // rows of the result that are computed at once
  int first_ = 0, last_ = 0;
  char* scratch_;
};

ExpandDepthwise at_image(ExpandDepthwise p, int64_t image) {
  depthwise::ForwardParams& d = p.depthwise;
  const int64_t inputs = int64_t(d.height) * d.width * p.expand.in_channels;
  const int64_t outputs = int64_t(d.out_height) * d.out_width * d.channels;
  p.expand.x = static_cast<const char*>(p.expand.x) + image * inputs * size_of(p.expand.dtype);
  d.y = static_cast<char*>(d.y) + image * outputs * size_of(d.dtype);
  if (d.partial) d.partial += image * d.pieces * d.channels;
  return p;
}

}  // namespace

bool can_join(const pointwise::Params& expand, const depthwise::ForwardParams& depthwise) {
  return !expand.gate && !expand.residual && expand.rows == int64_t(depthwise.height) * depthwise.width &&
         expand.out_channels == depthwise.channels && depthwise.batch == 1;
}

void expand_depthwise_cpu(const ExpandDepthwise& p) {
  const depthwise::ForwardParams& d = p.depthwise;
  const int panel = pointwise::panel_channels(), panels = std::max(1, d.channels / panel), pieces = std::max(1, d.pieces);
  const int threads = thread_count(), again = (threads - 1) * (d.kernel - d.stride);  // rows that are computed twice
  const int ranges = pieces >= threads && again * kLeastRows <= d.height ? threads : 1;
  const int64_t pixels = int64_t(d.height) * d.width, outputs = int64_t(d.out_height) * d.out_width;
  const int64_t work =
      d.batch * (pixels * p.expand.in_channels + outputs * d.kernel * d.kernel) * std::min(panel, d.channels) / ranges;
  parallel_for(int64_t(ranges) * panels, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int range = int(i / panels), k = int(i % panels);
      for (int64_t image = 0; image < d.batch; ++image) {
        const ExpandDepthwise of_image = at_image(p, image);
        float* const partial = of_image.depthwise.partial;
        Rows rows(of_image, k * panel, k + 1 == panels ? d.channels : (k + 1) * panel);
        for (int piece = range * pieces / ranges; piece < (range + 1) * pieces / ranges; ++piece)
          rows.convolve(piece * d.out_height / pieces, (piece + 1) * d.out_height / pieces,
                        d.pieces ? partial + int64_t(piece) * d.channels : nullptr);
      }
    }
  });
}

}  // namespace effnet_fast::inference
