"""Data sets for training by sample id: lists of image files, and ids of samples that have names."""

from tgt_fast.data.keys import check_keys, key_to_id
from tgt_fast.data.shots import Shots, shots
from tgt_fast.data.split_file import SplitFile

__all__ = ["Shots", "SplitFile", "check_keys", "key_to_id", "shots"]
