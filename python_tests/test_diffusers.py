"""DiffusersTeacher: scale and shift there and back, precision, slicing, gradients."""

from __future__ import annotations

import os
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import toys
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.teacher import DiffusersTeacher

pytestmark = pytest.mark.usefixtures("one_thread")
PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SCALES = (
    {"scaling_factor": 0.5},
    {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 1.0, 2.0, 3.0]},
)


def autoencoder(**options: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, **blocks, **options}
    return toys.seeded(lambda: AutoencoderKL(**config), 0).eval()


def labeler() -> nn.Module:
    return toys.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)), 1)


@pytest.mark.parametrize("scales", SCALES, ids=["scale", "shift", "mean and std"])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
@torch.no_grad()
def test_latents_are_scaled_and_come_back_as_the_autoencoders_own(scales: dict[str, Any], value_range: Any) -> None:
    """Forgotten on either way the round trip fails; on both, the latents do."""
    vae = autoencoder(**scales)
    teacher = DiffusersTeacher(vae, labeler(), value_range=value_range, clamp=False)
    low, high = value_range
    mode = vae.encode(2 * PIXELS - 1).latent_dist.mode()
    mean, std = (
        torch.tensor(scales.get(n, [d])).reshape(1, -1, 1, 1) for n, d in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    z = teacher.encode(low + (high - low) * PIXELS).z
    torch.testing.assert_close(z, (mode - mean - scales.get("shift_factor", 0.0)) * scales["scaling_factor"] / std)
    assert not torch.allclose(z, mode, atol=1e-2)
    expected = low + (high - low) * (vae.decode(mode).sample + 1) / 2
    torch.testing.assert_close(teacher.decode(z), expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_made_from_a_saved_folder(tmp_path: Any) -> None:
    vae = autoencoder(**SCALES[1])
    vae.save_pretrained(tmp_path / "model" / "vae")
    loaded = DiffusersTeacher.from_pretrained(
        tmp_path / "model", labeler(), model_options={"subfolder": "vae"}, max_batch=2
    )
    a, b = (
        tgt.LatentSampler(teacher, sigma=0.5, units="absolute", seed=2)(PIXELS)
        for teacher in (DiffusersTeacher(vae, labeler()), loaded)
    )
    torch.testing.assert_close(a.x, b.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.teacher_logits, b.teacher_logits, rtol=1e-4, atol=1e-4)


def test_images_are_clamped_but_not_where_a_gradient_passes() -> None:
    teacher, free = (DiffusersTeacher(autoencoder(**SCALES[0]), labeler(), clamp=clamp) for clamp in (True, False))
    z = 8 * teacher.encode(PIXELS).z
    outside = free.decode(z)
    assert (outside < 0).any()
    assert torch.equal(teacher.decode(z), outside.clamp(0, 1))
    assert torch.equal(teacher.decode(z, relaxed=True), outside)


@pytest.mark.parametrize("slicing", [False, True])
def test_gradient_exploration_climbs_through_the_decoder(slicing: bool) -> None:
    teacher = DiffusersTeacher(autoencoder(**SCALES[1]), labeler(), slicing=slicing)
    student = toys.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)), 2)
    up = tgt.LatentSampler(teacher, "gradient", sigma=0.0, step_size=0.5, units="absolute", record_disagreement=True)
    synth = up(PIXELS, student=student)
    assert up.last_disagreement[1] > up.last_disagreement[0]
    torch.testing.assert_close(
        (synth.latents.z - teacher.encode(PIXELS).z).flatten(1).norm(dim=1), torch.full((3,), 0.5)
    )
    whole = DiffusersTeacher(autoencoder(**SCALES[1]), labeler())
    torch.testing.assert_close(whole.decode(synth.latents), synth.x, rtol=1e-4, atol=1e-5)


class Sees(nn.Module):
    """A labeler that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return x.float().flatten(1)[:, :5]


@torch.no_grad()
def test_a_half_precision_autoencoder_that_overflows_runs_in_float32() -> None:
    """force_upcast in its config, as Stable Diffusion's have it; also when a parent is moved to float16 later."""
    exact = DiffusersTeacher(autoencoder().half().float(), labeler())  # of weights that were rounded to float16, too
    parent = nn.ModuleDict({"teacher": DiffusersTeacher(autoencoder(force_upcast=True), judge := Sees())}).half()
    teacher = parent["teacher"]
    made = tgt.LatentSampler(teacher, sigma=0.0, units="absolute")(PIXELS.half())
    assert made.latents.z.dtype == made.x.dtype == judge.seen[0] == torch.float32
    torch.testing.assert_close(made.latents.z, exact.encode(PIXELS.half().float()).z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.encode(PIXELS.half()).z, made.latents.z)
    kept = DiffusersTeacher(autoencoder(force_upcast=True), labeler(), upcast=False).to(torch.bfloat16)
    assert kept.encode(PIXELS).z.dtype == torch.bfloat16  # whatever dtype the images are of


def test_what_is_no_range_or_no_autoencoder_is_refused() -> None:
    with pytest.raises(ArgumentError, match="value_range must ascend"):
        DiffusersTeacher(autoencoder(), labeler(), value_range=(1.0, -1.0))
    with pytest.raises(ArgumentError, match="two numbers"):
        DiffusersTeacher(autoencoder(), labeler(), value_range=(0.0,))  # type: ignore[arg-type]
    bare = nn.Linear(2, 2)
    bare.config = object()  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="scaling_factor"):
        DiffusersTeacher(bare, labeler())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_images_of_integers_are_refused_with_what_to_do(dtype: torch.dtype) -> None:
    pixels = (PIXELS * 255).to(dtype)
    with pytest.raises(DTypeError, match=r"got torch\.\w+; of uint8 make x\.float\(\) / 255 where"):
        tgt.LatentSampler(DiffusersTeacher(autoencoder(), labeler()), units="absolute")(pixels)
    teacher = DiffusersTeacher(autoencoder(), labeler(), value_range=(-1.0, 1.0))
    with pytest.raises(DTypeError, match=r"x\.float\(\) \* \(2 / 255\) \+ \(-1\)"):
        teacher.encode(pixels)
    eight = (PIXELS * 255).to(torch.uint8)
    torch.testing.assert_close(teacher.encode(eight.float() * (2 / 255) + (-1)).z, teacher.encode(eight / 127.5 - 1).z)


def test_images_of_another_range_warn() -> None:
    teacher = DiffusersTeacher(autoencoder(), labeler())
    for wrong in (PIXELS * 255, (PIXELS - 0.45) / 0.22):
        with pytest.warns(UserWarning, match=r"images have values from .* value_range says \(0\.0, 1\.0\)"):
            teacher.encode(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.encode(PIXELS * 1.2 - 0.1)  # what interpolation overshoots
        DiffusersTeacher(autoencoder(), labeler(), value_range=(0.0, 255.0)).encode(PIXELS * 255)


@pytest.mark.parametrize(
    ("sides", "factor", "back"), [((17, 16), 2, (16, 16)), ((8, 31), 2, (8, 30)), ((18, 24), 4, (16, 24))]
)
def test_images_that_would_come_back_in_another_size_are_refused(
    sides: tuple[int, int], factor: int, back: tuple[int, int]
) -> None:
    levels = factor.bit_length()
    options = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    vae = autoencoder(**options)
    teacher = DiffusersTeacher(vae, labeler())
    images = torch.rand(2, 3, *sides)
    with torch.no_grad():  # which is what the autoencoder itself does, in silence
        assert vae.decode(vae.encode(images).latent_dist.mode()).sample.shape[-2:] == back
    message = rf"{sides[0]} x {sides[1]} would come back as {back[0]} x {back[1]}.*multiples of {factor}"
    with pytest.raises(ShapeError, match=message) as refused:
        teacher.encode(images)
    padding = tuple(map(int, str(refused.value).split("pad(x, (")[1].split(")")[0].split(", ")))
    padded = torch.nn.functional.pad(images, padding)
    assert teacher.decode(teacher.encode(padded)).shape == padded.shape
