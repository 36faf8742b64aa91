"""A long-tailed set of image files: ``python examples/long_tail_images.py [ROOT TRAIN.txt TEST.txt]``.

Lists of ``path label`` lines, read by workers; classes drawn alike, mixup, and a teacher and a student with
normalisations of their own; accuracy by many-, medium- and few-shot classes. Without arguments it draws a few hundred
images itself. The networks are tiny; put those of timm or torchvision in their place.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler

import tgt_fast as tgt
from tgt_fast.train import accuracy

SIZE = 16
COUNTS = (120, 60, 30, 12, 6)  # of the images that are drawn here


class Normalised:
    """Images of values in 0..1 as a network was trained on them."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) / self.std.to(x)


def resized(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.resize((SIZE, SIZE)), dtype=np.float32)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def mixup(batch: list[tuple[int, Tensor, int]], classes: int, alpha: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, images mixed with those of the batch in another order, and the shares of the classes in them, [B, C]."""
    ids, images, labels = zip(*batch, strict=True)
    x, y = torch.stack(images), F.one_hot(torch.tensor(labels), classes).float()
    share = float(np.random.default_rng(sum(ids)).beta(alpha, alpha))
    return torch.tensor(ids), torch.lerp(x.flip(0), x, share), torch.lerp(y.flip(0), y, share)


class Mixed:
    """Collates a batch in a worker."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, batch: list[tuple[int, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
        return mixup(batch, self.classes)


def network(classes: int) -> nn.Module:
    convolutions = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes))


def main(root: Path, train_list: Path, test_list: Path, steps: int = 60, workers: int = 2) -> dict[str, float]:
    torch.manual_seed(0)
    lists = {"train": train_list, "test": test_list}
    data = tgt.data.SplitFile.several(lists, root, transform=resized)
    train, test, classes = data["train"], data["test"], data["train"].num_classes

    encoder = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Tanh())
    decoder = nn.Sequential(nn.ConvTranspose2d(8, 3, 4, stride=4), nn.Sigmoid())
    teacher = tgt.Teacher(
        encoder,
        decoder,
        network(classes),
        labeler_transform=Normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        student_transform=Normalised((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )
    student = network(classes)

    drawn = WeightedRandomSampler(train.balanced_weights(), len(train))
    loader = DataLoader(train, 32, sampler=drawn, num_workers=workers, collate_fn=Mixed(classes))
    loss = tgt.DistillationLoss(temperature=2.0, soft_weight=0.1, hard_weight=1.0)  # this teacher has learned nothing
    tgt.fit(
        student,
        tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, sigma=0.2, units="absolute"), loss=loss),
        loader,
        steps=steps,
        optimizer=torch.optim.AdamW(student.parameters(), lr=3e-3),
        columns=(0, 1, 2),  # y is shares of the classes, not labels
        progress=False,
    )

    student.eval()
    with torch.no_grad():
        batches = [(student(teacher.student_view(x)), y) for _, x, y in DataLoader(test, 64, num_workers=workers)]
    logits, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    groups = {"all": None, **train.shots(many=50, few=10)._asdict()}  # the benchmarks' own bounds are 100 and 20
    return {name: accuracy(logits, y, classes=group) for name, group in groups.items()}


def drawn_images(root: Path) -> tuple[Path, Path]:
    """Noise in a colour of the class, and its lists."""
    generator = np.random.default_rng(0)
    lists = {"train": COUNTS, "test": (20,) * len(COUNTS)}
    for split, counts in lists.items():
        lines = []
        for label, count in enumerate(counts):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for place in range(count):
                colour = [40 + 40 * label, 220 - 40 * label, 128]
                pixels = np.clip(generator.normal(colour, 40, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{place}.png")
                lines.append(f"{split}/class {label}/{place}.png {label}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root / "train.txt", root / "test.txt"


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(main(*map(Path, sys.argv[1:])))
    else:
        with tempfile.TemporaryDirectory() as made:
            print(main(Path(made), *drawn_images(Path(made))))
