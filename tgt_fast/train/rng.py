"""The states of the process-wide random number generators, under the name that training uses."""

from tgt_fast._rng import get_rng_state, isolated_rng, set_rng_state

__all__ = ["get_rng_state", "isolated_rng", "set_rng_state"]
