"""The settings of a loss module: given at construction, changed by assignment, checked both times."""

from __future__ import annotations

from typing import Any


def setting(name: str) -> Any:
    """A property for one of the settings."""

    def get(module: Settings) -> Any:
        return module._settings[name]

    def change(module: Settings, value: Any) -> None:
        module._begin({**module._settings, name: value})

    return property(get, change, doc=f"The setting {name}; an assignment takes effect at the next call.")


class Settings:
    """The base, beside ``nn.Module``, of a module whose settings are arguments of a function.

    They are kept as they were given, in one dict, and are read at each call: an assignment such as
    ``loss.temperature = 1.0`` takes effect at the next one, and one that the checks refuse changes nothing.
    """

    _settings: dict[str, Any]

    # Those of every loss; a loss adds its own.
    divergence = setting("divergence")
    beta = setting("beta")
    temperature = setting("temperature")
    teacher_temperature = setting("teacher_temperature")
    soft_weight = setting("soft_weight")
    hard_weight = setting("hard_weight")
    label_smoothing = setting("label_smoothing")
    reduction = setting("reduction")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Raises what the function would."""
        raise NotImplementedError

    def _begin(self, settings: dict[str, Any]) -> None:
        self._check_settings(settings)
        self._settings = settings


class Adjusted(Settings):
    """Settings of a loss that may adjust its logits, see :class:`tgt_fast.kernels.adjust.Adjustments`.

    What has a number a class is a buffer of the module, by its name, which moves with it and is in no ``state_dict()``.
    """

    standardize = setting("standardize")
    decoupled = setting("decoupled")
    skew = setting("skew")
    correct_teacher = setting("correct_teacher")
