"""DiffusersTeacher: an AutoencoderKL of diffusers as the generator of images."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast._optional import optional
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.teacher.teacher import Prior, Teacher
from tgt_fast.teacher.value_range import Range, checked_images, checked_range, moved

_OP: Final = "DiffusersTeacher"
_ITS_RANGE: Final = (-1.0, 1.0)  # the values that these autoencoders are trained on


class DiffusersTeacher(Teacher):
    r"""A teacher of images, whose latents are those that a diffusion model works on::

        z = (mode(q(z | x)) - shift) * scaling          x~ = Dec(z~ / scaling + shift)

    with ``scaling_factor`` and ``shift_factor`` of the autoencoder's config; where it names ``latents_mean`` and
    ``latents_std``, ``z = (mode - mean) * scaling / std``. Either way z has about unit variance. The posterior's mode,
    not a sample: exploration adds its own noise.

    Args:
        vae: an ``AutoencoderKL`` of diffusers, or a module that encodes and decodes like it and has its config.
        labeler: images [B, c, h, w] -> logits [B, C], such as a :class:`TimmLabeler`.
        value_range: black and white of the images, on both sides: (0, 1) or (-1, 1).
        clamp: keep decoded images within the range; not those that a gradient is taken through.
        slicing: encode and decode image by image, which takes less memory (a setting of ``vae``).
        upcast: run a float16 autoencoder in float32; None: if its config says ``force_upcast``, as it does where
            float16 overflows. It then stays float32. bfloat16 is left alone. Autocast is switched off with it.
        prior, labeler_transform, student_transform, max_batch: of :class:`tgt_fast.Teacher`.

    Images are floating point, of any such dtype; they come back, like the latents, in the autoencoder's. Their sides
    are multiples of the factor by which the autoencoder shrinks them. Not yet run on a GPU.

    Raises:
        ArgumentError: a range that is none, or an autoencoder without a ``scaling_factor``.
        DTypeError, ShapeError: from ``encode``: images of integers (uint8), or of sides that would not come back.

    >>> import torch, tgt_fast as tgt
    >>> from diffusers import AutoencoderKL
    >>> blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    >>> vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    >>> labeler = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5))
    >>> teacher = tgt.teacher.DiffusersTeacher(vae, labeler)
    >>> synth = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")(torch.rand(2, 3, 16, 16))
    >>> synth.latents.z.shape, synth.x.shape, synth.teacher_logits.shape
    (torch.Size([2, 4, 8, 8]), torch.Size([2, 3, 16, 16]), torch.Size([2, 5]))
    """

    def __init__(
        self,
        vae: nn.Module,
        labeler: Callable[..., Any],
        *,
        value_range: Range = (0.0, 1.0),
        clamp: bool = True,
        slicing: bool = False,
        upcast: bool | None = None,
        prior: Prior = None,
        labeler_transform: Callable[..., Any] | None = None,
        student_transform: Callable[..., Any] | None = None,
        max_batch: int | None = None,
    ) -> None:
        images = _Autoencoder(vae, checked_range(_OP, value_range), clamp, upcast)
        if slicing:
            vae.enable_slicing()  # type: ignore[operator]
        super().__init__(
            images.encode,
            images.decode,
            labeler,
            prior=prior,
            labeler_transform=labeler_transform,
            student_transform=student_transform,
            max_batch=max_batch,
            modules=(vae,),
        )

    @classmethod
    def from_pretrained(
        cls,
        vae: str | os.PathLike[str],
        labeler: Callable[..., Any],
        *,
        model_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> DiffusersTeacher:
        """The teacher from a folder or name that ``AutoencoderKL.from_pretrained`` takes.

        Args:
            model_options: for it, such as ``{"subfolder": "vae", "torch_dtype": torch.float16}``.
            options: of :class:`DiffusersTeacher`.

        Raises:
            DependencyError: diffusers is not installed. Its own errors are passed on.
        """
        diffusers = optional("diffusers", "diffusers", _OP)
        return cls(diffusers.AutoencoderKL.from_pretrained(vae, **(model_options or {})), labeler, **options)


class _Autoencoder:
    """Images <-> scaled latents."""

    def __init__(self, vae: nn.Module, value_range: Range, clamp: bool, upcast: bool | None) -> None:
        self.vae, self.value_range, self.clamp = vae, value_range, clamp
        config: Any = vae.config
        scaling = getattr(config, "scaling_factor", None)
        if scaling is None:
            raise ArgumentError(f"{_OP}: the config of {type(vae).__name__} names no scaling_factor")
        self.scaling = float(scaling)
        self.upcast = bool(getattr(config, "force_upcast", False)) if upcast is None else upcast
        means, deviations = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if means is None or deviations is None:
            means, deviations = (getattr(config, "shift_factor", None) or 0.0,), (1.0,)
        self._means = torch.tensor(means, dtype=torch.float64, device="cpu").reshape(1, -1, 1, 1)
        self._factors = self.scaling / torch.tensor(deviations, dtype=torch.float64, device="cpu").reshape(1, -1, 1, 1)

    def encode(self, x: Tensor) -> Tensor:
        checked_images(_OP, x, self.value_range, slack=0.5)
        self._check_size(x)
        with self._precision(x):
            posterior = self.vae.encode(moved(self._cast(x), self.value_range, _ITS_RANGE)).latent_dist  # type: ignore[operator]
            z: Tensor = posterior.mode()
            return (z - self._means.to(z)) * self._factors.to(z)

    def decode(self, z: Tensor, relaxed: bool = False) -> Tensor:
        with self._precision(z):
            z = self._cast(z)
            x: Tensor = self.vae.decode(z / self._factors.to(z) + self._means.to(z)).sample  # type: ignore[operator]
            x = moved(x, _ITS_RANGE, self.value_range)
        return x if relaxed or not self.clamp else x.clamp(*self.value_range)

    def _check_size(self, x: Tensor) -> None:
        """That images come back as large as they are: each level of the autoencoder halves them, and rounds down."""
        levels = getattr(self.vae.config, "block_out_channels", None)
        if levels is None or x.ndim != 4:
            return
        factor = 2 ** (len(levels) - 1)
        sides = tuple(x.shape[-2:])
        made = tuple(side // factor * factor for side in sides)
        if made != sides:
            right, below = (-side % factor for side in reversed(sides))
            raise ShapeError(
                f"{_OP}: images of {sides[0]} x {sides[1]} would come back as {made[0]} x {made[1]}: this autoencoder "
                f"needs sides that are multiples of {factor}; resize them where the loader makes them, or pad them, "
                f"torch.nn.functional.pad(x, (0, {right}, 0, {below}))"
            )

    def _cast(self, x: Tensor) -> Tensor:
        # At each call: whoever moves the teacher's parent to float16 moves the autoencoder, too.
        if self.upcast and self._dtype == torch.float16:
            self.vae.float()
        return x.to(self._dtype)

    def _precision(self, x: Tensor) -> torch.autocast:
        keep = torch.is_autocast_enabled(x.device.type) and not self.upcast
        return torch.autocast(x.device.type, enabled=keep)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype
