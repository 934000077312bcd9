#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace effnet_fast {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kPage = kLine;  // every overrun shows
#else
constexpr size_t kPage = 64 << 10, kHugePage = 2 << 20;  // the system's page or several
#endif
constexpr size_t kPatience = 4096;  // takes that a piece waits for: some steps of the deepest network
constexpr std::chrono::seconds kLongest{5};

size_t whole_pages(size_t bytes) { return rounded_up(std::max<size_t>(bytes, 1), kPage); }

}  // namespace

#ifdef __SANITIZE_ADDRESS__
Memory::Memory(size_t bytes) : bytes_(whole_pages(bytes)), data_(nullptr, {bytes_}) {
  data_.reset(static_cast<char*>(std::aligned_alloc(kPage, bytes_)));
  if (!data_) throw std::bad_alloc();
}

void Memory::Free::operator()(char* p) const { std::free(p); }
#else
Memory::Memory(size_t bytes) : bytes_(whole_pages(bytes)), data_(nullptr, {bytes_}) {
  const size_t mapped = bytes_ + kHugePage;
  void* const at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(at);
  const size_t before = rounded_up(reinterpret_cast<uintptr_t>(at), kHugePage) - reinterpret_cast<uintptr_t>(at);
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + bytes_, kHugePage - before);
  madvise(begin + before, bytes_, MADV_HUGEPAGE);
  data_.reset(begin + before);
}

void Memory::Free::operator()(char* p) const { munmap(p, bytes); }
#endif

void Recycler::drop_oldest() {
  waiting_bytes_ -= waiting_.front().memory.bytes();
  pieces_.erase(waiting_.front().memory.data());
  waiting_.pop_front();
}

void Recycler::drop_old() {
  const auto now = std::chrono::steady_clock::now();
  while (!waiting_.empty() && (waiting_.front().since + kPatience < takes_ || waiting_.front().at + kLongest < now)) drop_oldest();
}

Memory Recycler::fresh(size_t bytes) {
  while (!waiting_.empty() && taken_bytes_ + waiting_bytes_ + bytes > most_bytes_) drop_oldest();
  try {
    return Memory(bytes);
  } catch (const std::bad_alloc&) {
    while (!waiting_.empty()) drop_oldest();
    return Memory(bytes);
  }
}

void* Recycler::take(size_t bytes) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const size_t wanted = whole_pages(bytes);
  // The one that was given back last: some of it may still be in a cache.
  const auto found = std::find_if(waiting_.rbegin(), waiting_.rend(), [&](const Piece& p) { return p.memory.bytes() == wanted; });
  if (found != waiting_.rend()) {
    waiting_bytes_ -= wanted;
    taken_.splice(taken_.end(), waiting_, std::prev(found.base()));
  } else {
    Pieces made;
    made.push_back({fresh(wanted), 0, {}});
    pieces_.emplace(made.front().memory.data(), made.begin());
    taken_.splice(taken_.end(), made);
  }
  taken_bytes_ += wanted;
  most_bytes_ = std::max(most_bytes_, taken_bytes_);
  ++takes_;
  drop_old();
  return taken_.back().memory.data();
}

void Recycler::give_back(void* data) noexcept {
  const std::lock_guard<std::mutex> guard(mutex_);
  const Pieces::iterator piece = pieces_.at(data);
  taken_bytes_ -= piece->memory.bytes();
  waiting_bytes_ += piece->memory.bytes();
  piece->since = takes_;
  piece->at = std::chrono::steady_clock::now();
  waiting_.splice(waiting_.end(), taken_, piece);
  drop_old();
}

}  // namespace effnet_fast
