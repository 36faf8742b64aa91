// What comes before the rows of a loss and after them, whatever the loss: the divisor of the mean, and the reduction.
#pragma once

#include "api.h"
#include "distill_row.h"

namespace tgt::cuda {

// Settles the divisor of the weights, 1 for anything but a mean; what is to be counted goes to the workspace.
Failure choose_divisor(DeviceCall& d, cudaStream_t stream);

// The loss from the weighted losses of the rows; with "none" those are the loss.
Failure reduce_rows(const DeviceCall& d, bool is_fp64, cudaStream_t stream);

}  // namespace tgt::cuda
