#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <limits>
#include <new>

namespace dapji {

std::shared_ptr<std::uint8_t> allocate_zeros(std::size_t n_bytes) {
  constexpr std::size_t huge = std::size_t{2} << 20;
  if (n_bytes > std::numeric_limits<std::size_t>::max() - huge) throw std::bad_alloc();
  const std::size_t size = n_bytes + huge;
  void* const memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  const auto start = (reinterpret_cast<std::uintptr_t>(memory) + huge - 1) / huge * huge;
  auto* const aligned = reinterpret_cast<std::uint8_t*>(start);
#if defined(__linux__)
  madvise(aligned, n_bytes / huge * huge, MADV_HUGEPAGE);  // only whole ones, to waste nothing
#endif
  return {aligned, [memory, size](std::uint8_t*) { munmap(memory, size); }};
}

}  // namespace dapji
