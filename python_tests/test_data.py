"""Lists of image files, shots, and ids of samples that have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ran
from torch.utils.data import DataLoader, WeightedRandomSampler

import tgt_fast as tgt
from tgt_fast.data import keys
from tgt_fast.errors import ArgumentError

LINES = "train/n01/a b.JPEG 0\ntrain/n02/c.JPEG 1\n\ntrain/n01/a b.JPEG 0\ntrain/n03/d.JPEG 2\n"
TESTS = {
    "folders": "val/n01/V_1.JPEG 0\nval/n03/V_2.JPEG 2\n",
    "flat": "val/V_1.JPEG 0\nval/V_2.JPEG 2\n",
}


def touched(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def listed(root: Path, text: str, name: str = "list.txt") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return root / name


def name_of(path: Path) -> str:
    return path.read_text()


def test_a_list_is_read_line_by_line(tmp_path: Path) -> None:
    touched(tmp_path, "train/n01/a b.JPEG", "train/n02/c.JPEG", "train/n03/d.JPEG")
    data = tgt.data.SplitFile(listed(tmp_path, LINES), tmp_path, load=name_of, transform=str.upper)
    assert [data[i] for i in range(len(data))] == [
        (0, "TRAIN/N01/A B.JPEG", 0), (1, "TRAIN/N02/C.JPEG", 1), (2, "TRAIN/N01/A B.JPEG", 0),
        (3, "TRAIN/N03/D.JPEG", 2),
    ]  # fmt: skip
    assert data[-1][0] == 3
    assert data.class_counts.tolist() == [2, 1, 1]
    assert data.balanced_weights().tolist() == [0.5, 1.0, 0.5, 1.0]
    assert [group.tolist() for group in data.shots(many=1, few=1)] == [[0], [1, 2], []]
    with pytest.raises(IndexError):
        data[4]
    twice = tgt.data.SplitFile(
        [listed(tmp_path, LINES)] * 2, tmp_path, load=name_of, transform=str.lower, num_classes=7
    )
    assert (len(twice), twice[5][0], twice.num_classes, len(twice.class_counts)) == (8, 5, 7, 7)


@pytest.mark.parametrize("on_disk", ["folders", "flat"])
@pytest.mark.parametrize("in_list", ["folders", "flat"])
def test_both_lists_fit_both_ways_of_unpacking(tmp_path: Path, in_list: str, on_disk: str) -> None:
    names = [line.rpartition(" ")[0] for line in TESTS[on_disk].splitlines()]
    touched(tmp_path, *names)
    data = tgt.data.SplitFile(listed(tmp_path, TESTS[in_list]), tmp_path, load=name_of, transform=lambda x: x)
    assert [data[0][1:], data[1][1:]] == [(names[0], 0), (names[1], 2)]


def test_several_lists_have_the_classes_of_all(tmp_path: Path) -> None:
    touched(tmp_path, "train/n01/a b.JPEG", "train/n02/c.JPEG", "train/n03/d.JPEG", "val/V_1.JPEG", "val/V_2.JPEG")
    train = listed(tmp_path, "train/n02/c.JPEG 1\n", "train.txt")
    made = tgt.data.SplitFile.several(
        {"train": train, "both": [train, listed(tmp_path, TESTS["flat"], "test.txt")]}, tmp_path, load=name_of
    )
    assert made["train"].class_counts.tolist() == [0, 1, 0]
    assert made["both"].class_counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.png 0\nb.png\n", r"line 2: expected 'path label', got 'b.png'"),
        ("a.png -1\n", "line 1"),
        ("a.png one\n", "line 1"),
        (" 3\n", "line 1"),
        ("nowhere/b.png 0\n", "neither .* nor in a folder beneath"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, match: str) -> None:
    touched(tmp_path, "a.png")
    with pytest.raises(ArgumentError, match=match):
        tgt.data.SplitFile(listed(tmp_path, text), tmp_path)


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    touched(tmp_path, "a.png")
    good = listed(tmp_path, "a.png 3\n")
    calls: list[tuple[Any, str]] = [
        (lambda: tgt.data.SplitFile(tmp_path / "none.txt", tmp_path), "cannot read the list"),
        (lambda: tgt.data.SplitFile(good, tmp_path, num_classes=3), "labels up to 3"),
        (lambda: tgt.data.SplitFile(good, tmp_path, load="PIL"), "load must be a function"),  # type: ignore[arg-type]
        (lambda: tgt.data.SplitFile(3, tmp_path), "lists must be a file or several"),  # type: ignore[arg-type]
        (lambda: tgt.data.shots([1.5, 2.0]), "must be counts"),  # type: ignore[list-item]
        (lambda: tgt.data.shots([3, -1]), ">= 0"),
        (lambda: tgt.data.shots([3], many=10, few=20), "at most many=10"),
        (lambda: tgt.data.key_to_id("a", 3), "key must be a string"),  # type: ignore[arg-type]
    ]
    for call, match in calls:
        with pytest.raises(ArgumentError, match=match):
            call()


def test_shots_are_of_the_training_counts() -> None:
    found = tgt.data.shots(torch.tensor([101, 100, 20, 19, 0, 5000]))
    assert [group.tolist() for group in found] == [[0, 5], [1, 2], [3, 4]]


def test_images_in_workers_drawn_class_by_class(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    lines = []
    for label, count in enumerate((6, 2, 1)):
        for place in range(count):
            name = f"n{label}/{place}.png"
            (tmp_path / f"n{label}").mkdir(exist_ok=True)
            image.new("RGB", (4, 3), (label * 100, 0, 255)).save(tmp_path / name)
            lines.append(f"{name} {label}\n")
    data = tgt.data.SplitFile(listed(tmp_path, "".join(lines)), tmp_path)
    generator = torch.Generator().manual_seed(0)
    sampler = WeightedRandomSampler(data.balanced_weights(), 300, generator=generator)
    drawn = torch.zeros(3)
    for ids, x, y in DataLoader(data, batch_size=50, sampler=sampler, num_workers=1):
        assert x.shape == (50, 3, 3, 4)
        torch.testing.assert_close(x[:, 0, 0, 0] * 255, y.float() * 100)
        assert torch.equal(data.labels[ids], y)
        drawn += torch.bincount(y, minlength=3)
    assert bool(((drawn - 100).abs() < 30).all())


def test_ids_of_keys_are_the_same_everywhere() -> None:
    known = {("shard-000000.tar", "0001"): 196825416107478, ("a", "bc"): 0, ("ab", "c"): 0, ("", "é"): 0}
    made = {name: tgt.data.key_to_id(*name) for name in known}
    assert made[("shard-000000.tar", "0001")] == known[("shard-000000.tar", "0001")]
    assert len(set(made.values())) == len(made)
    assert all(0 <= number < 1 << 48 for number in made.values())
    code = f"from tgt_fast.data.keys import key_to_id; print([key_to_id(*n) for n in {list(known)!r}])"
    assert ran(code).stdout.strip() == str(list(made.values()))
    assert tgt.data.key_to_id("a", "bc") == made[("a", "bc")]  # again, which is no collision


def test_collisions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = keys._hashed
    monkeypatch.setattr(keys, "_hashed", lambda url, key: (honest(url, key)[0] & 3, honest(url, key)[1]))
    monkeypatch.setattr(keys, "_seen", {})
    names = [("shard.tar", str(number)) for number in range(5)]
    with pytest.raises(ArgumentError, match=r"both have the id \d"):
        tgt.data.check_keys(names)
    with pytest.raises(ArgumentError, match=r"has the id \d of another sample"):
        [tgt.data.key_to_id(*name) for name in names]
    assert [tgt.data.key_to_id(*name, check=False) for name in names] != []
    monkeypatch.setattr(keys, "_hashed", honest)
    assert tgt.data.check_keys(names * 2) == 5
