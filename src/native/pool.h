// Pool: a fixed set of threads that run one task together, phase by phase, with barriers in between.
//
// A step of a model is some 150 phases of tens of microseconds each, so the workers spin while work is near; between
// steps they spin for a moment and then sleep, so that an idle process burns nothing. Knows nothing of models.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dapji {

class Pool {
 public:
  // `threads` >= 1 in all: the caller of run() is worker 0, the others are started here.
  explicit Pool(unsigned threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  unsigned size() const { return size_; }

  // Whether its threads exist: a process that was forked since has none. Such a pool can neither run nor be destroyed.
  bool alive() const { return getpid() == process_; }

  // Calls task(worker) once on every worker, worker in [0, size()), and returns when all have returned. `task` must not
  // throw. One run at a time: the owner serialises.
  template <class Task>
  void run(Task task) {
    run_erased([](void* erased, unsigned worker) { (*static_cast<Task*>(erased))(worker); }, &task);
  }

  // Within a run: waits until every worker is here; what any of them wrote before is then visible to all.
  void barrier();

 private:
  using Function = void (*)(void*, unsigned);
  void run_erased(Function function, void* task);
  void work(unsigned worker);
  void join();

  const unsigned size_;
  const pid_t process_ = getpid();
  Function function_ = nullptr;
  void* task_ = nullptr;

  // Each on its own cache line: every worker polls these.
  alignas(64) std::atomic<std::uint64_t> epoch_{0};  // number of runs started (or one more, to stop)
  alignas(64) std::atomic<unsigned> arrived_{0};     // workers at the current barrier
  alignas(64) std::atomic<std::uint64_t> phase_{0};  // barriers passed
  alignas(64) std::atomic<unsigned> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace dapji
