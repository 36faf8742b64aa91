"""TimmLabeler: images as they are, normalised for each model; on timm's own classes where timm can be imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast import _optional
from tgt_fast.errors import ArgumentError, DependencyError, TgtError
from tgt_fast.teacher import Teacher, TimmLabeler

PIXELS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(**config: Any) -> Any:
    net = toys.seeded(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5)), 1).eval()
    net.pretrained_cfg = config
    return net


def test_the_same_pixels_give_the_same_logits_whatever_the_loader_made_of_them() -> None:
    """Pixels in 0..1 for one user, in -1..1 for another; a student with means of its own beside the teacher's."""
    expected = network()((PIXELS - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    net = network(mean=MEAN, std=STD)
    torch.testing.assert_close(TimmLabeler(net)(PIXELS), expected)
    torch.testing.assert_close(TimmLabeler(net, value_range=(-1, 1))(2 * PIXELS - 1), expected, rtol=1e-4, atol=1e-5)
    student = TimmLabeler(network(mean=(0.5,) * 3, std=(0.5,) * 3))
    teacher = Teacher(nn.Identity(), nn.Identity(), TimmLabeler(net))
    torch.testing.assert_close(teacher.label(PIXELS), expected)
    torch.testing.assert_close(student(PIXELS), network()(2 * PIXELS - 1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(student(PIXELS), expected, atol=1e-2)
    assert torch.equal(TimmLabeler(net, mean=(0.0,) * 3, std=(1.0,) * 3)(PIXELS), net(PIXELS))  # given ones win


def test_images_are_resized_with_a_gradient() -> None:
    net = network(mean=MEAN, std=STD, input_size=(3, 16, 16), interpolation="bilinear")
    x = PIXELS.clone().requires_grad_()
    logits = TimmLabeler(net, size=True)(x)
    larger = nn.functional.interpolate(PIXELS, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(logits, TimmLabeler(net)(larger))
    logits.sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert TimmLabeler(net, size=(4, 12))(PIXELS).shape == (4, 5)


def test_it_is_saved_as_its_model_and_frozen_as_a_labeler() -> None:
    judge = TimmLabeler(network(mean=MEAN, std=STD))
    assert all(key.startswith("model.") for key in judge.state_dict())
    teacher = Teacher(nn.Identity(), nn.Identity(), judge)
    assert not any(p.requires_grad for p in judge.parameters())
    assert teacher.double().label(PIXELS.double()).dtype == torch.float64


def test_what_is_not_known_is_asked_for() -> None:
    with pytest.raises(ArgumentError, match="give mean="):
        TimmLabeler(network())
    with pytest.raises(ArgumentError, match="give std="):
        TimmLabeler(network(mean=MEAN))
    with pytest.raises(ArgumentError, match="std > 0"):
        TimmLabeler(network(mean=MEAN, std=(0.0,) * 3))
    with pytest.raises(ArgumentError, match="give size="):
        TimmLabeler(network(mean=MEAN, std=STD), size=True)
    with pytest.raises(ArgumentError, match="size must be"):
        TimmLabeler(network(mean=MEAN, std=STD), size=(0, 4))


@pytest.mark.parametrize(("package", "extra"), [("timm", "timm"), ("diffusers", "diffusers"), ("transformers", "hf")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(_optional.importlib, "import_module", fails)
    calls = {
        "timm": lambda: TimmLabeler.create("resnet10t"),
        "diffusers": lambda: tgt.teacher.DiffusersTeacher.from_pretrained("folder", nn.Identity()),
        "transformers": lambda: tgt.teacher.Seq2SeqTeacher(nn.Identity(), None, nn.Identity()),
    }
    with pytest.raises(DependencyError, match=rf"needs {package}: pip install 'tgt-fast\[{extra}\]'") as caught:
        calls[package]()
    assert isinstance(caught.value, TgtError)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_models_of_timm_bring_their_own_normalisation(name: str, tmp_path: Any) -> None:
    timm = pytest.importorskip("timm")
    options: dict[str, Any] = {"num_classes": 5, "pretrained": False}
    options |= {"img_size": 32, "depth": 1} if name.startswith("vit") else {}
    judge = TimmLabeler.create(name, model_options=options).eval()
    config = timm.data.resolve_model_data_config(judge.model)
    torch.testing.assert_close(judge.mean.flatten(), torch.tensor(config["mean"]))
    torch.testing.assert_close(judge.std.flatten(), torch.tensor(config["std"]))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    normal = (x - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    torch.testing.assert_close(judge(x), judge.model(normal))
    torch.save(judge.model.state_dict(), tmp_path / "weights.pt")
    options["checkpoint_path"] = str(tmp_path / "weights.pt")
    again = TimmLabeler.create(name, model_options=options).eval()
    torch.testing.assert_close(again(x), judge(x))
    teacher = Teacher(nn.Identity(), nn.Identity(), judge)
    z = x.clone().requires_grad_()
    out: Tensor = teacher.label(z)
    out.sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
