#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace dapji {
namespace {

// Many short runs, of which the best counts: a run that another process interrupts says nothing of the machine.
constexpr int kReads = 9, kPeaks = 60;

template <class Work>
double seconds(Pool& pool, Work work) {
  const auto start = std::chrono::steady_clock::now();
  pool.run(work);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Free {
  void operator()(std::uint8_t* memory) const { std::free(memory); }
};

}  // namespace

double read_bandwidth(Isa isa, unsigned threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  const std::size_t share = (std::size_t{256} << 20) / threads / 512 * 512, bytes = share * threads;
  constexpr std::size_t huge = std::size_t{2} << 20;
  const std::unique_ptr<std::uint8_t, Free> memory(
      static_cast<std::uint8_t*>(std::aligned_alloc(huge, (bytes + huge - 1) / huge * huge)));
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  madvise(memory.get(), bytes, MADV_HUGEPAGE);
#endif
  std::fill_n(memory.get(), bytes, std::uint8_t{1});
  Pool pool(threads);
  std::atomic<std::int32_t> sink{0};
  double best = 0;
  for (int run = 0; run < kReads; ++run) {
    const double time = seconds(pool, [&](unsigned worker) {
      sink += kernels(isa).machine.read(memory.get() + worker * share, share);
    });
    best = std::max(best, static_cast<double>(bytes) / time);
  }
  return best;
}

double int8_peak(Isa isa, unsigned threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  const std::int64_t rounds = isa == Isa::generic ? 20'000 : 200'000;
  Pool pool(threads);
  std::atomic<std::int32_t> sink{0};
  double best = 0;
  for (int run = 0; run < kPeaks; ++run) {
    std::atomic<std::int64_t> operations{0};
    const double time = seconds(pool, [&](unsigned) {
      std::int32_t own = sink;
      operations += static_cast<std::int64_t>(kernels(isa).machine.dots(rounds, &own));
      sink += own;
    });
    best = std::max(best, static_cast<double>(operations) / time);
  }
  return best;
}

}  // namespace dapji
