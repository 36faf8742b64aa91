"""The documentation strings of the installed Python packages, as text to learn from: found without importing them.

``load_corpus()`` gives the entries, in an order that does not change, each with its split and a candidate label.
"""

from tgt_fast.demos.corpus.corpus import PACKAGES, Corpus, load_corpus
from tgt_fast.demos.corpus.entry import Entry

__all__ = ["PACKAGES", "Corpus", "Entry", "load_corpus"]
