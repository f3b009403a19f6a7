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

// Why this library can serve none of this machine's GPUs: the driver is older than the CUDA it is linked with, or it has
// no code for any of them. Empty if it can. Initialises CUDA.
std::string unavailable_reason();

// Why this library cannot serve one GPU, by the number that torch has for it. Empty if it can.
std::string unavailable_reason_on(int device);

}  // namespace todo_attn
