// What comes before the rows of a loss and after them, whatever the loss: the divisor of the mean, and the reduction.
#pragma once

#include "api.h"
#include "distill_row.h"

namespace tgt::cuda {

// Sets the call's divisor from what `distill_forward` is given (api.h), or has it counted into the workspace.
Failure choose_divisor(DeviceCall& d, const double* divisor_at, double divisor, double* workspace, cudaStream_t stream);

// The loss from the weighted losses of the rows; with "none" those are the loss.
Failure reduce_rows(const DeviceCall& d, bool is_fp64, void* loss, cudaStream_t stream);

}  // namespace tgt::cuda
