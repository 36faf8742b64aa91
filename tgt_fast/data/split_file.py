"""Lists of image files with their labels, as long-tail benchmarks publish them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tgt_fast._optional import optional
from tgt_fast.data.shots import Shots, shots
from tgt_fast.errors import ArgumentError

_OP: Final = "SplitFile"
Lists: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"


class SplitFile(Dataset[tuple[int, Any, int]]):
    r"""The images of a list of ``path label`` lines, or of several, one after the other.

    A line is split at its last space, so that paths may hold spaces; empty lines are left out, repeated ones stay. An
    item is ``(id, x, y)``, with the place in the list for an id, which is what :func:`tgt_fast.fit` takes.

    Images may lie as the list says (``val/n01440764/ILSVRC2012_val_00000293.JPEG``), in one folder where the list names
    folders of classes, or in folders of classes where the list names none (``val/ILSVRC2012_val_00000293.JPEG``): both
    lists of ImageNet-LT's test images fit both ways of unpacking them.

    Args:
        lists: the file, or files.
        root: the folder that the paths start from.
        transform: image -> x; by default a float32 tensor [3, H, W] of values in 0..1.
        load: path -> image; by default PIL's, as RGB.
        num_classes: by default the largest label + 1. Lists of one data set should have one number: see
            :meth:`several`.

    Attributes:
        paths, labels: of the images, ``labels`` int64 (N,).
        class_counts: images of each class, int64 (C,).

    Raises:
        ArgumentError: a list that cannot be read, a line without a label, a label beyond ``num_classes``, or a first
            image that is nowhere to be found.

    >>> import tempfile, pathlib, tgt_fast as tgt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = pathlib.Path(folder, "a b.png"), pathlib.Path(folder, "train.txt")
    ...     _ = made[0].write_bytes(b""), made[1].write_text("a b.png 2\na b.png 0\n")
    ...     data = tgt.data.SplitFile(made[1], folder, load=lambda path: path.name, transform=str.upper)
    ...     data[0], data.class_counts.tolist()
    ((0, 'A B.PNG', 2), [1, 0, 1])
    """

    def __init__(
        self,
        lists: Lists,
        root: str | os.PathLike[str] = ".",
        *,
        transform: Callable[[Any], Any] | None = None,
        load: Callable[[Path], Any] | None = None,
        num_classes: int | None = None,
    ) -> None:
        for name, function in (("transform", transform), ("load", load)):
            if function is not None and not callable(function):
                raise ArgumentError(f"{_OP}: {name} must be a function, got {function!r:.200}")
        self.root = Path(root)
        self.transform, self.load = transform, load
        labels: list[int] = []
        paths: list[str] = []
        for file in _files(lists):
            found = list(_lines(file))
            paths += _as_they_lie(self.root, [path for path, _ in found], file)
            labels += [label for _, label in found]
        self.paths = np.array(paths, dtype=np.str_)  # one block, which forked workers share
        self.labels = torch.tensor(labels, dtype=torch.int64, device="cpu")
        most = int(self.labels.max()) + 1 if labels else 0
        if num_classes is not None and (isinstance(num_classes, bool) or num_classes < most):
            raise ArgumentError(f"{_OP}: the lists have labels up to {most - 1}, but num_classes={num_classes!r}")
        self.num_classes = most if num_classes is None else num_classes

    @classmethod
    def several(
        cls, lists: Mapping[str, Lists], root: str | os.PathLike[str] = ".", **options: Any
    ) -> dict[str, SplitFile]:
        """A data set a list, of several such as ``{"train": ..., "test": ...}``, with the classes of all."""
        made = {name: cls(files, root, **options) for name, files in lists.items()}
        classes = max((one.num_classes for one in made.values()), default=0)
        for one in made.values():
            one.num_classes = classes
        return made

    @property
    def class_counts(self) -> Tensor:
        return torch.bincount(self.labels, minlength=self.num_classes)

    def shots(self, *, many: int = 100, few: int = 20) -> Shots:
        """:func:`tgt_fast.data.shots` by this list, which is to be the training one."""
        return shots(self.class_counts, many=many, few=few)

    def balanced_weights(self) -> Tensor:
        """Weights of the images, float64 (N,), with which ``WeightedRandomSampler`` draws each class alike."""
        return self.class_counts.clamp_min(1).double().reciprocal()[self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Any, int]:
        index = range(len(self))[index]
        path = self.root / str(self.paths[index])
        image = (_rgb if self.load is None else self.load)(path)
        return index, (_as_tensor if self.transform is None else self.transform)(image), int(self.labels[index])


def _files(lists: Any) -> list[Path]:
    given = [lists] if isinstance(lists, (str, os.PathLike)) else lists
    if not isinstance(given, Iterable):
        raise ArgumentError(f"{_OP}: lists must be a file or several, got {lists!r:.200}")
    return [Path(file) for file in given]


def _lines(file: Path) -> Iterable[tuple[str, int]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{_OP}: cannot read the list {file}: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path.strip() or not label.isascii() or not label.isdigit():
            raise ArgumentError(f"{_OP}: {file}, line {number}: expected 'path label', got {line!r:.200}")
        yield path.rstrip(), int(label)


def _as_they_lie(root: Path, paths: list[str], file: Path) -> list[str]:
    """The paths of a list, as its images are found; the first one tells."""
    if not paths or (root / paths[0]).exists():
        return paths
    first = Path(paths[0])
    flat = first.parent.parent / first.name
    if (root / flat).exists():  # the list has folders of classes, the disk has none
        return [str(Path(path).parent.parent / Path(path).name) for path in paths]
    places: dict[Path, dict[str, str]] = {}  # of the names in the folders beneath a folder
    found: list[str] = []
    for path in paths:
        folder, name = Path(path).parent, Path(path).name
        if folder not in places:
            places[folder] = _beneath(root, folder)
        if name not in places[folder]:
            raise ArgumentError(
                f"{_OP}: {file} lists {path!r}, which is neither {root / path} nor {root / flat} nor in a folder "
                f"beneath {root / folder}"
            )
        found.append(places[folder][name])
    return found


def _beneath(root: Path, folder: Path) -> dict[str, str]:
    if not (root / folder).is_dir():
        return {}
    inner = sorted(entry.name for entry in os.scandir(root / folder) if entry.is_dir())
    return {name: str(folder / one / name) for one in inner for name in os.listdir(root / folder / one)}


def _rgb(path: Path) -> Any:
    image = optional("PIL.Image", "timm", _OP)
    with image.open(path) as opened:
        return opened.convert("RGB")


def _as_tensor(image: Any) -> Tensor:
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ArgumentError(f"{_OP}: give transform= for images that are no 8-bit RGB, got {type(image).__name__}")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.float32) / 255
