#include "memory.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <new>
#include <utility>

namespace effnet_fast {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kPage = kLine;  // every overrun shows
#else
constexpr size_t kPage = 64 << 10;  // the system's page or several
#endif
constexpr size_t kHugePage = 2 << 20, kRange = size_t(1) << 40;
constexpr std::chrono::seconds kLongest{5}, kBetween{1};  // that a page is kept unused, and from one look for such to the next

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

// Addresses alone take no memory. Where the system counts them (RLIMIT_AS), others need them.
Recycler::Recycler() {
#ifndef __SANITIZE_ADDRESS__  // in the range no overrun would show
  rlimit limit;
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return;
  void* const at = mmap(nullptr, kRange + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return;
  madvise(at, kRange + kHugePage, MADV_HUGEPAGE);
  range_ = reinterpret_cast<char*>(rounded_up(reinterpret_cast<uintptr_t>(at), kHugePage));
  gaps_.emplace(0, kRange);
#endif
}

// Where there is room for so many bytes in the range, or null.
char* Recycler::cut(size_t wanted) {
  const auto gap = std::find_if(gaps_.begin(), gaps_.end(), [&](const auto& piece) { return piece.second >= wanted; });
  if (gap == gaps_.end()) return nullptr;
  const size_t begin = gap->first, end = begin + wanted, left = gap->second - wanted;
  if (end > usable_) {
    const size_t usable = rounded_up(end, kHugePage);
    pages_.resize(usable / kHugePage);
    if (mprotect(range_ + usable_, usable - usable_, PROT_READ | PROT_WRITE) != 0) return nullptr;
    usable_ = usable;
  }
  taken_.emplace(begin, wanted);
  auto rest = gaps_.extract(gap);
  if (left > 0) {
    rest.key() = end;
    rest.mapped() = left;
    gaps_.insert(std::move(rest));
  }
  for (size_t page = begin / kHugePage; page * kHugePage < end; ++page) pages_[page].filled = true;
  return range_ + begin;
}

void* Recycler::take(size_t bytes) {
  const std::lock_guard<std::mutex> guard(mutex_);
  return_idle();
  if (char* const piece = cut(whole_pages(bytes))) return piece;
  Memory apart(bytes);
  char* const data = apart.data();
  apart_.emplace(data, std::move(apart));
  return data;
}

void Recycler::give_back(void* data) noexcept {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (apart_.erase(data) > 0) return;
  const Clock::time_point now = Clock::now();
  auto gap = gaps_.insert(taken_.extract(static_cast<char*>(data) - range_)).position;  // allocates nothing
  for (size_t page = gap->first / kHugePage; page * kHugePage < gap->first + gap->second; ++page) pages_[page].freed = now;
  const auto next = std::next(gap);
  if (next != gaps_.end() && gap->first + gap->second == next->first) {
    gap->second += next->second;
    gaps_.erase(next);
  }
  if (gap != gaps_.begin())
    if (const auto last = std::prev(gap); last->first + last->second == gap->first) {
      last->second += gap->second;
      gaps_.erase(gap);
    }
  return_idle();
}

void Recycler::return_idle() noexcept {
  const Clock::time_point now = Clock::now();
  if (now - looked_ < kBetween) return;
  looked_ = now;
  return_unused_since(now - kLongest);
}

void Recycler::return_pages() noexcept {
  const std::lock_guard<std::mutex> guard(mutex_);
  return_unused_since(Clock::time_point::max());
}

void Recycler::return_unused_since(Clock::time_point time) noexcept {
  for (const auto& [begin, bytes] : gaps_)
    for (size_t page = rounded_up(begin, kHugePage) / kHugePage; (page + 1) * kHugePage <= std::min(begin + bytes, usable_); ++page)
      if (pages_[page].filled && pages_[page].freed < time) {
        madvise(range_ + page * kHugePage, kHugePage, MADV_DONTNEED);
        pages_[page].filled = false;
      }
}

}  // namespace effnet_fast
