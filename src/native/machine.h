// The limits of this machine, measured: what kernels are compared with.
#pragma once

#include "isa.h"

namespace dapji {

/// Bytes per second that `threads` threads together read from memory, the best of a few runs over 256 MiB. Takes about
/// half a second. Throws std::invalid_argument without threads, std::bad_alloc, std::system_error.
double read_bandwidth(Isa isa, unsigned threads);

/// Integer operations per second (a multiplication and an addition are two) of `threads` threads in the dot product of
/// `isa`, the best of many short runs. Takes about 50 ms. Throws std::invalid_argument without threads,
/// std::system_error.
double int8_peak(Isa isa, unsigned threads);

}  // namespace dapji
