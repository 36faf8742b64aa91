"""The losses of logits whose classes are spread over processes: each keeps its own, and rows' states travel."""
