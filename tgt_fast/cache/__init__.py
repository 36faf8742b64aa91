"""Teacher outputs by sample id, on disk."""

from tgt_fast.cache.cache import TeacherCache
from tgt_fast.cache.ensemble import EnsembleCache
from tgt_fast.cache.fingerprint import Fingerprint, teacher_fingerprint

__all__ = ["EnsembleCache", "Fingerprint", "TeacherCache", "teacher_fingerprint"]
