// What the CUDA compiler builds, for those who do not include CUDA's headers.
#pragma once

#include <cstdint>
#include <string>

#include "rows.h"

namespace todo_attn {

// Starts the job over all rows on a cudaStream_t of the current device and does not wait. Throws std::runtime_error
// where the launch fails. Compiled for every job of rows.h.
template <class Job>
void launch(const Job& job, int64_t batches, int64_t rows, void* stream);

// Why this library cannot serve this machine's GPUs: the driver is older than the CUDA it is linked with, or it has no
// code for one of them. Empty where it can. Initialises CUDA.
std::string unavailable_reason();

}  // namespace todo_attn
