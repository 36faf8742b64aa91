"""Between synthetic examples, tensors in a pytree, and the fields of rows."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.layout import Layout
from tgt_fast.cache.outputs import Settings
from tgt_fast.errors import ArgumentError
from tgt_fast.explore import Synthetic
from tgt_fast.teacher import tree

X = "x"


def fields_of(op: str, made: Synthetic, settings: Settings) -> tuple[Layout, dict[str, Tensor]]:
    """The fields of M examples, [M, ...] each, and their layout.

    Raises:
        ArgumentError: examples of which a part is no tensor with a dimension of examples.
        DTypeError: of numbers that a file cannot hold.
    """
    count = made.ids.shape[0]
    said, tensors = settings.fields(made.teacher_logits, made.latents if settings.latents else None, count)
    if settings.latents and made.latents.source is not None:
        tensors["latents_source"] = made.latents.source
    data, structure = _flat(op, made.x)
    tensors |= data
    return Layout.of(tensors, said.classes, op=op, keys=SYNTHETIC, tree=structure), tensors


def _flat(op: str, x: Any) -> tuple[dict[str, Tensor], str]:
    if isinstance(x, Tensor):
        return {X: x.detach()}, ""
    paths, spec = pytree.tree_flatten_with_path(tree.plain(x))
    found = {}
    for path, leaf in paths:
        name = ".".join([X, *(_word(part) for part in path)])
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or name in found:
            raise ArgumentError(
                f"{op}: examples are tensors, or dicts, lists and tuples of tensors [M, ...]; {name} of what the "
                f"decoder made is {type(leaf).__name__ if not isinstance(leaf, Tensor) else 'one number, or not alone'}"
            )
        found[name] = leaf.detach()
    return found, json.dumps({"leaves": list(found), "spec": pytree.treespec_dumps(spec)})


def _word(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))


def data_of(layout: Layout, tensors: dict[str, Tensor]) -> Any:
    """The inverse for x: a tensor, or a pytree of them, out of fields [n, ...]."""
    if not layout.tree:
        return tensors[X]
    found = json.loads(layout.tree)
    return pytree.tree_unflatten([tensors[name] for name in found["leaves"]], pytree.treespec_loads(found["spec"]))


def names_of_data(layout: Layout) -> tuple[str, ...]:
    return tuple(name for name in layout.fields if name == X or name.startswith(f"{X}."))
