"""The frozen teacher, the latents that it works on, and adapters for models of other libraries."""

from tgt_fast.teacher.alignment import TokenMap, align_vocabularies
from tgt_fast.teacher.consumer import TextClassifier
from tgt_fast.teacher.diffusers_teacher import DiffusersTeacher
from tgt_fast.teacher.ensemble import TeacherEnsemble
from tgt_fast.teacher.generation import Generation
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.latents import Latents
from tgt_fast.teacher.seq2seq import Seq2SeqTeacher
from tgt_fast.teacher.teacher import Teacher
from tgt_fast.teacher.timm_labeler import TimmLabeler

__all__ = [
    "DiffusersTeacher",
    "Generation",
    "Key",
    "Latents",
    "Seq2SeqTeacher",
    "Teacher",
    "TeacherEnsemble",
    "TextClassifier",
    "TimmLabeler",
    "TokenMap",
    "align_vocabularies",
]
