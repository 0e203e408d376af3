"""What a batch of prompts fixes before the pipeline's loop starts, recorded once and replayed at every evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Conditioning", "fresh", "in_order"]


@dataclass(frozen=True)
class Conditioning:
    """Recorded by `PipelineReplay.prepare`. It belongs to one batch as a whole: rows cannot be taken out of it.

    Args:
        call_kwargs: arguments of the pipeline's `__call__`.
        encoded: what `encode_prompt` returned, call by call.
        latents: what `prepare_latents` returned, call by call; the first tensor of the first call is x_0, in the pipeline's
            dtype.
        batch_size: B.
    """

    call_kwargs: dict[str, Any]
    encoded: tuple[Any, ...]
    latents: tuple[Any, ...]
    batch_size: int

    @property
    def start(self) -> Tensor:
        """x_0 in the pipeline's dtype, shape (B, …): the first tensor that `prepare_latents` returned.

        Whatever it returned beside it (image latents, masks) is condition.
        """
        first = self.latents[0]
        return first[0] if isinstance(first, tuple) else first

    def latents_with(self, x: Tensor) -> tuple[Any, ...]:
        """`latents` with x in place of x_0, rounded to the pipeline's dtype (states are kept in float32).

        Raises:
            ValueError: if x has another shape than x_0.
        """
        if x.shape != self.start.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be that of x_0, {tuple(self.start.shape)}.")
        x = x.to(self.start.dtype)
        first = self.latents[0]
        return ((x, *first[1:]) if isinstance(first, tuple) else x, *self.latents[1:])


def fresh(value: Any) -> Any:
    """The same leaves in new tuples, lists and dicts: pipelines exist that write into the lists they are given."""
    if isinstance(value, dict):
        return {key: fresh(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(fresh(item) for item in value)
    return value


def in_order(name: str, returns: tuple[Any, ...]) -> Callable[..., Any]:
    """A function that ignores its arguments and gives the recorded `returns` one after the other.

    Raises:
        ValueError: (when called) if nothing is left to give.
    """
    remaining = iter(returns)

    def replayed(*args: Any, **kwargs: Any) -> Any:
        for value in remaining:
            return fresh(value)
        raise ValueError(
            f"the pipeline calls {name} more than the {len(returns)} times recorded by prepare(); pass a conditioning that was "
            f"prepared with the same arguments."
        )

    return replayed
