#include "pool.h"

#include <chrono>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace dapji {
namespace {

// Polls between runs last this long before a worker sleeps: about what sampling a token takes.
constexpr auto kSpin = std::chrono::microseconds(100);
// Polls at a barrier before the processor is offered to others, who may be the ones that we wait for.
constexpr int kPolls = 1 << 12;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(unsigned threads) : size_(threads) {
  threads_.reserve(size_ - 1);
  try {
    for (unsigned worker = 1; worker < size_; ++worker) threads_.emplace_back([this, worker] { work(worker); });
  } catch (...) {  // the system refuses more threads: end those that run before the exception leaves
    join();
    throw;
  }
}

Pool::~Pool() { join(); }

void Pool::join() {
  {
    std::lock_guard lock(mutex_);
    stop_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::run_erased(Function function, void* task) {
  function_ = function;
  task_ = task;
  // Sequentially consistent, with the sleeper's increment and reload: either it sees the new epoch, or we see it.
  epoch_.fetch_add(1);
  if (sleepers_.load() > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  function(task, 0);
  barrier();
}

void Pool::work(unsigned worker) {
  for (std::uint64_t seen = 0;; ++seen) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    for (int polls = 1; epoch_.load(std::memory_order_acquire) == seen; ++polls) {
      relax();
      if (polls % 64 == 0 && std::chrono::steady_clock::now() > deadline) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
    }
    if (stop_.load(std::memory_order_relaxed)) return;
    function_(task_, worker);
    barrier();
  }
}

void Pool::barrier() {
  const std::uint64_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int polls = 0; phase_.load(std::memory_order_acquire) == phase; ++polls) {
    if (polls < kPolls) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace dapji
