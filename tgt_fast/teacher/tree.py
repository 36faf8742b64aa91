"""Batches that are not one tensor: a pytree (dict, list, tuple, dataclass) whose tensors share the leading
dimension.

A leaf that is not a tensor, or is a 0-d tensor, belongs to the whole batch and is passed through as it is. A mapping
that PyTorch's pytrees do not know, such as a tokenizer's ``BatchEncoding``, is read as a dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tgt_fast.errors import ArgumentError, ShapeError

T = TypeVar("T")


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def plain(tree: Any) -> Any:
    """The same tree with a dict for every mapping that PyTorch's pytrees take for a leaf."""
    if isinstance(tree, Tensor):
        return tree
    return pytree.tree_map(
        lambda leaf: {key: plain(value) for key, value in leaf.items()} if isinstance(leaf, Mapping) else leaf, tree
    )


def map_batched(fn: Callable[[Tensor], Tensor], tree: T) -> T:
    """The same tree with ``fn`` applied to every tensor that has a batch dimension."""
    if isinstance(tree, Tensor):  # the usual case, without the walk
        return fn(tree) if tree.ndim > 0 else tree  # type: ignore[return-value]
    mapped: T = pytree.tree_map(lambda leaf: fn(leaf) if _is_batched(leaf) else leaf, plain(tree))
    return mapped


def batched_leaves(tree: Any) -> list[Tensor]:
    """Every tensor of the tree that has a batch dimension."""
    if isinstance(tree, Tensor):
        return [tree] if tree.ndim > 0 else []
    return [leaf for leaf in pytree.tree_leaves(plain(tree)) if _is_batched(leaf)]


def batch_size(tree: Any, what: str = "inputs") -> int:
    """The leading size that all tensors of the tree share.

    Raises:
        ArgumentError: there is no tensor with a batch dimension.
        ShapeError: two tensors disagree about it.
    """
    leaves = batched_leaves(tree)
    if not leaves:
        raise ArgumentError(
            f"{what}: no tensor with a batch dimension in a {type(tree).__name__}; "
            "give a tensor, or a dict, list or tuple of tensors"
        )
    size = leaves[0].shape[0]
    if any(leaf.shape[0] != size for leaf in leaves):  # no set: hashing a size would fix it for a compiler
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise ShapeError(f"{what}: the leading (batch) sizes differ within one batch: {shapes}")
    return size


def first_device(tree: Any) -> torch.device:
    """The device of the batch, which is that of its first tensor."""
    leaves = batched_leaves(tree)
    return leaves[0].device if leaves else torch.device("cpu")


def requires_grad(tree: Any) -> bool:
    return any(leaf.requires_grad for leaf in batched_leaves(tree))


def take(tree: T, rows: Tensor) -> T:
    """The examples ``rows`` (int64 [n]) of a batch, in that order."""
    return map_batched(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), tree)


def concat(trees: Sequence[T]) -> T:
    """Batches one after the other; whole-batch leaves come from the first.

    Raises:
        ShapeError: the trees differ in structure, or their tensors in anything but the batch size.
    """
    if not isinstance(trees, Sequence) or not trees:
        raise ShapeError(f"batches to be put together must be a list of one at least, got {trees!r}")
    if len(trees) == 1:
        return trees[0]
    flat = [pytree.tree_flatten(plain(tree)) for tree in trees]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        raise ShapeError("batches of different structure cannot be put together: " + str([str(s) for _, s in flat]))
    joined = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        if not _is_batched(column[0]):
            joined.append(column[0])
            continue
        if len({leaf.shape[1:] for leaf in column}) > 1:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in column)
            raise ShapeError(f"batches whose examples differ in shape cannot be put together: {shapes}")
        joined.append(torch.cat(column))
    whole: T = pytree.tree_unflatten(joined, spec)
    return whole


def chunks(tree: T, size: int | None) -> list[T]:
    """The batch in pieces of at most ``size`` examples; None, or a batch that fits, is one piece."""
    n = batch_size(tree)
    if size is None or n <= size:
        return [tree]
    return [map_batched(lambda leaf, a=start: leaf[a : a + size], tree) for start in range(0, n, size)]  # type: ignore[misc]


def detach(tree: T) -> T:
    return map_batched(Tensor.detach, tree)
