"""Methods that the demo can be run with beside its own: ``tgt-fast demo digits --with NAME``. A new one is an entry.

All of them see as many student examples a step as the demo's methods do, and keep what the demo's settings say.
"""

from __future__ import annotations

from typing import Final

from tgt_fast.demos.digits.loss_recipes import LOSS_RECIPES
from tgt_fast.demos.digits.recipe import Number, Recipe, plain
from tgt_fast.demos.digits.tail_recipes import TAIL_RECIPES

RECIPES: Final[dict[str, Recipe]] = {
    "plain": Recipe("distillation", "distillation", plain, number=Number("temperature", 2.0, (1.0, 2.0, 4.0))),
    **LOSS_RECIPES,
    **TAIL_RECIPES,
}
