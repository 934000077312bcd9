// Memory that is mapped and not malloc's. What malloc keeps of large pieces that come and go grows to several times what is in use:
// glibc's takes a larger one each time that an aligned one is asked for again, and cuts it.
#pragma once
#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace effnet_fast {

constexpr size_t kLine = 64;

constexpr size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Whole pages at a multiple of 2 MB, huge ones where the system has them and they are filled.
class Memory {
 public:
  explicit Memory(size_t bytes);
  char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    size_t bytes;
    void operator()(char* p) const;
  };
  size_t bytes_;
  std::unique_ptr<char, Free> data_;
};

// Hands the memory of what is gone to what comes next: a fresh page costs more to fault in and to clear than a convolution takes to
// fill it, and many times more where the machine is virtual and has given its free memory back.
//
// It cuts all pieces from one range of addresses, each from the lowest gap that is large enough; gaps that touch are one. So what
// comes and goes in the same order finds filled pages, whatever the sizes. The pages of a gap go back to the system when nobody has
// used them for some seconds: at the next take or give_back. Where there is no such range, or no room in it, a piece is mapped by
// itself, and unmapped when it is given back. Any number of threads may use it at the same time.
class Recycler {
 public:
  Recycler();
  void* take(size_t bytes);  // throws std::bad_alloc
  void give_back(void* data) noexcept;
  void return_pages() noexcept;   // those of all gaps, now
  void lock() { mutex_.lock(); }  // around a fork: in the child nobody would unlock it
  void unlock() { mutex_.unlock(); }

 private:
  using Clock = std::chrono::steady_clock;
  using Pieces = std::map<size_t, size_t>;  // where each begins, and its bytes
  struct Page {
    bool filled = false;      // since it was last given back to the system
    Clock::time_point freed;  // when some of it was last in use
  };
  char* cut(size_t wanted);
  void return_idle() noexcept;
  void return_unused_since(Clock::time_point time) noexcept;

  std::mutex mutex_;
  char* range_ = nullptr;
  size_t usable_ = 0;  // bytes of the range, from its beginning, that may be touched
  Pieces taken_, gaps_;
  std::map<void*, Memory> apart_;
  std::vector<Page> pages_;  // huge ones, of what is usable
  Clock::time_point looked_;
};

}  // namespace effnet_fast
