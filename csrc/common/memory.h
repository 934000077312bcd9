// Memory that is mapped and not malloc's. What malloc keeps of large pieces that come and go grows to several times what is in use:
// glibc's takes a larger one each time that an aligned one is asked for again, and cuts it.
#pragma once
#include <chrono>
#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>

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

// Hands the memory of what is gone to what comes next and is as large: a fresh page costs more to fault in and to clear than a
// convolution takes to fill it. What waits to be taken, and what is in use, never come to more than was once in use together; what
// still waits when many others were taken, or after some seconds, goes back to the system when the next is taken or given back.
// Any number of threads may use it at the same time.
class Recycler {
 public:
  void* take(size_t bytes);
  void give_back(void* data) noexcept;
  void lock() { mutex_.lock(); }  // around a fork: in the child nobody would unlock it
  void unlock() { mutex_.unlock(); }

 private:
  struct Piece {
    Memory memory;
    size_t since;                              // takes_ when it was given back
    std::chrono::steady_clock::time_point at;  // likewise
  };
  using Pieces = std::list<Piece>;
  Memory fresh(size_t bytes);
  void drop_oldest();
  void drop_old();

  std::mutex mutex_;
  Pieces taken_, waiting_;  // those that wait longest first
  std::unordered_map<void*, Pieces::iterator> pieces_;
  size_t taken_bytes_ = 0, waiting_bytes_ = 0, most_bytes_ = 0, takes_ = 0;
};

}  // namespace effnet_fast
