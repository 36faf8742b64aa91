"""Synthetic examples in bulk: made once, by any number of processes, kept in a folder, and trained from ever after."""

from tgt_fast.synthesis.dataset import SyntheticDataset
from tgt_fast.synthesis.filters import Filters
from tgt_fast.synthesis.replay import StoredReplay
from tgt_fast.synthesis.run import synthesize
from tgt_fast.synthesis.summary import Dropped, SynthesisSummary

__all__ = ["Dropped", "Filters", "StoredReplay", "SynthesisSummary", "SyntheticDataset", "synthesize"]
