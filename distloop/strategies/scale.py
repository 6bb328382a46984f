"""A loss scale that finds itself (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

from distloop.errors import NonFiniteError


class DynamicScale:
    """Halved at an overflow, doubled after ``growth_interval`` good steps in a row."""

    SMALLEST = 2.0**-24  # below this no loss scale will help

    def __init__(self, scale: float = 65536.0, growth_interval: int = 2000):
        self.scale, self.growth_interval = scale, growth_interval
        self.good_steps = 0
        self.overflowed = False  # in the last step

    def state_dict(self) -> dict[str, float]:
        """Return what decides how the scale goes on."""
        return {"loss_scale": self.scale, "good_steps": float(self.good_steps)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from :meth:`state_dict`."""
        self.scale, self.good_steps = state["loss_scale"], int(state["good_steps"])

    def adjust(self, *, overflowed: bool) -> None:
        """Take note of a step, which all ranks found overflowed or not."""
        self.overflowed = overflowed
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale /= 2.0
            if self.scale < self.SMALLEST:
                raise NonFiniteError(f"fp16 gradients overflow at any loss scale, down to {self.scale:.1e}; try bf16")
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2.0, 0
