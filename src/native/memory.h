// Memory for what is large and streamed: weights and the KV cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace dapji {

/// Zeros, aligned to a huge page and made of such where the system has them: they save the TLB misses of a decode step
/// that streams the whole model. Untouched pages cost address space only. Throws std::bad_alloc.
std::shared_ptr<std::uint8_t> allocate_zeros(std::size_t n_bytes);

}  // namespace dapji
