"""Draws the pictures of the documentation: python tools/draw.py. They are committed under docs/img."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "tgt_fast", "svg.fonttype": "none", "font.size": 10}
from matplotlib import pyplot as plt  # noqa: E402

IMG = Path(__file__).parent.parent / "docs" / "img"
BLUE, ORANGE, GREEN, GREY = "#3f51b5", "#e65100", "#2e7d32", "#9e9e9e"


def save(name: str) -> None:
    plt.tight_layout()
    plt.savefig(IMG / f"{name}.svg", metadata={"Date": None})
    plt.close()


def exploration() -> None:
    """A plane of latents, its data, and where each mode goes from one example."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 160)
    data = np.stack([1.5 * np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.12, (160, 2))
    start = np.array([-1.05, -0.7])
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 6), sharex=True, sharey=True)
    axes = list(axes.flat)
    grid_x, grid_y = np.meshgrid(np.linspace(-2.6, 2.6, 80), np.linspace(-2, 2, 80))
    field = 1.4 - np.hypot(grid_x + 0.1, 1.3 * (grid_y - 0.55))  # disagreement, highest near (-0.1, 0.55)
    for axis, title in zip(axes, ("prior", "random", "gradient", "persistent"), strict=True):
        axis.set_title(title)
        axis.scatter(*data.T, s=5, color=GREY, alpha=0.6, linewidths=0)
        axis.set(xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2, 2), aspect="equal")
    axes[0].scatter(*rng.normal(0, 0.8, (2, 24)), s=16, color=BLUE)
    axes[1].scatter(*(start[:, None] + rng.normal(0, 0.28, (2, 14))), s=16, color=BLUE)
    for axis in axes[2:]:
        axis.contour(grid_x, grid_y, field, levels=6, colors=ORANGE, linewidths=0.6, alpha=0.7)

    def climb(point: np.ndarray, steps: int, size: float) -> np.ndarray:
        path = [point]
        for _ in range(steps):
            slope = np.array([-0.1, 0.55]) - path[-1]
            path.append(path[-1] + size * slope / np.linalg.norm(slope) + rng.normal(0, 0.03, 2))
        return np.array(path)

    path = climb(start + np.array([0.1, -0.08]), 3, 0.22)
    axes[2].plot(*path.T, "-o", color=BLUE, ms=4, lw=1.2)
    axes[2].add_patch(plt.Circle(start, 0.75, fill=False, color=GREEN, ls="--"))
    axes[2].annotate("radius", start + np.array([0.25, -0.95]), color=GREEN, fontsize=8)
    path = climb(start, 6, 0.17)
    axes[3].plot(*path.T, ":", color=BLUE, lw=1)
    axes[3].scatter(*path.T, s=16, color=[plt.cm.Blues(0.3 + 0.11 * k) for k in range(len(path))])
    for k in (1, 3, 6):
        axes[3].annotate(f"visit {k}", path[k] + np.array([0.12, -0.12]), fontsize=8, color=BLUE)
    for axis in axes[1:]:
        axis.scatter(*start, marker="*", s=110, color="black", zorder=3)
    axes[1].annotate("Enc(x)", start + np.array([-1.1, -0.75]), fontsize=9)
    figure.supxlabel("grey: encodings of the data; orange: where student and labeler disagree", fontsize=9)
    save("exploration")


def divergences() -> None:
    """Two classes: the teacher gives the first 0.7."""
    p, q = 0.7, np.linspace(0.005, 0.995, 400)

    def kl(a: np.ndarray | float, b: np.ndarray) -> np.ndarray:
        return a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))

    middle = (p + q) / 2
    curves = {
        "forward_kl": kl(p, q),
        "reverse_kl": q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)),
        "jsd": kl(p, middle) / 2 + (q * np.log(q / middle) + (1 - q) * np.log((1 - q) / (1 - middle))) / 2,
        "tvd": np.abs(p - q),
    }
    plt.figure(figsize=(6.4, 3.4))
    for (name, value), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=True):
        plt.plot(q, value, style, label=name, lw=1.8)
    plt.axvline(p, color=GREY, lw=0.8)
    plt.annotate("the teacher: 0.7", (p, 1.85), xytext=(p - 0.02, 1.85), ha="right", color="#616161")
    plt.ylim(0, 2)
    plt.xlabel("the student's probability of the class")
    plt.ylabel("divergence, nats")
    plt.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 0.9))
    save("divergences")


def records() -> None:
    """A distribution of 24 classes, cut at four."""
    rng = np.random.default_rng(3)
    mass = np.sort(rng.dirichlet(np.full(24, 0.35)))[::-1]
    rest = mass[4:].sum()
    shown = {
        "the teacher": (mass, [BLUE] * 4 + [GREY] * 20),
        'tail="bucket"': (np.append(mass[:4], rest), [BLUE] * 4 + [ORANGE]),
        'tail="renormalize"': (mass[:4] / mass[:4].sum(), [BLUE] * 4),
        'tail="uniform"': (np.append(mass[:4], np.full(20, rest / 20)), [BLUE] * 4 + [ORANGE] * 20),
    }
    _, axes = plt.subplots(2, 2, figsize=(7.4, 4.2), sharey=True)
    axes = list(axes.flat)
    for axis, (title, (height, colours)) in zip(axes, shown.items(), strict=True):
        axis.bar(range(len(height)), height, color=colours)
        axis.set_title(title)
        axis.set(xticks=[], xlim=(-1, 24.5))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability")
    line = {"arrowstyle": "-", "color": ORANGE}
    axes[1].annotate("all the others", (4, rest), xytext=(8, rest - 0.06), color=ORANGE, arrowprops=line)
    save("records")


def noise() -> None:
    """Rows of noise by id, in two batches."""
    rng = np.random.default_rng(1)
    rows = {name: rng.normal(size=12) for name in (10, 11, 12, 13)}
    batches = (("one batch", (10, 11, 12, 13)), ("another order", (13, 10, 12, 11)), ("process 1 of 2", (11, 13)))
    _, axes = plt.subplots(1, 3, figsize=(7.4, 1.9))
    for axis, (title, ids) in zip(axes, batches, strict=True):
        axis.imshow([rows[name] for name in ids], cmap="coolwarm", vmin=-2.5, vmax=2.5, aspect="auto")
        axis.set_yticks(range(len(ids)), [f"id {name}" for name in ids])
        axis.set(xticks=[], title=title)
    save("noise")


if __name__ == "__main__":
    IMG.mkdir(exist_ok=True)
    for draw in (exploration, divergences, records, noise):
        draw()
