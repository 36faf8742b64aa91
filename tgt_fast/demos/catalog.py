"""The demos there are: what each is about and what it needs. Imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tgt_fast.demos.text import NEEDED as TEXT_PACKAGES


@dataclass(frozen=True)
class Demo:
    """One demo: the package ``tgt_fast.demos.NAME``, with the modules run, settings, results, findings and page."""

    name: str
    summary: str  # a line
    description: str
    quick: str  # what --quick leaves out
    packages: Mapping[str, str]  # what it needs, module: the name it is installed under
    extra: str = "demo"  # brings them
    with_curve: bool = False  # takes --curve
    with_recipes: bool = False  # takes --with NAME, a recipe of the demo's module recipes
    with_cache: bool = False  # keeps what it made for the next run, unless --no-cache says otherwise


DEMOS = {
    demo.name: demo
    for demo in (
        Demo(
            "digits",
            "a small student learns scikit-learn's digits from 118 labels (needs the [demo] extra)",
            "Train a teacher and, in seven ways, a student on scikit-learn's digits; write a report.",
            "one seed and fewer steps: less than a minute",
            {"sklearn": "scikit-learn", "matplotlib": "matplotlib"},
            with_curve=True,
            with_recipes=True,
        ),
        Demo(
            "glyphs",
            "a small convolutional student learns the letters and digits of typefaces from 312 labels (needs [glyphs])",
            "Draw the letters and digits of the installed font packages, train a convolutional teacher and, in ten "
            "ways, a student that is tested on families the teacher has not seen; write a report.",
            "one seed and half of the steps: less than two minutes",
            {"PIL": "pillow", "matplotlib": "matplotlib"},
            extra="glyphs",
            with_curve=True,
        ),
        Demo(
            "lm",
            "a one-layer language model learns from a four-layer one, without logits and from a cache (needs [demo])",
            "Pretrain a teacher on the standard library's source and docstrings, distil it into a student with few and "
            "with much text, with and without a cache of the teacher's outputs; write a report.",
            "one seed and fewer steps: about a minute",
            {"matplotlib": "matplotlib"},
        ),
        Demo(
            "docstrings",
            "a small transformer learns from 500 labelled documentation strings and from texts that a BART writes "
            "(needs [text])",
            "Train a generator on the documentation strings of the installed packages, a head on a pretrained sentence "
            "encoder and, in four ways, a student that tells subpackages apart; write a report.",
            "one seed and 3,000 texts: less than two minutes",
            TEXT_PACKAGES,
            extra="text",
            with_cache=True,
        ),
        Demo(
            "retrieval",
            "a one-layer retriever learns from 200 pairs and from passages that a BART writes (needs [text])",
            "Train a generator on the documentation strings of the installed packages and, in four ways, an encoder "
            "that finds the text a summary belongs to, with a pretrained sentence encoder as the teacher; write a "
            "report.",
            "one seed and 3,000 texts: less than two minutes",
            TEXT_PACKAGES,
            extra="text",
            with_cache=True,
        ),
    )
}
