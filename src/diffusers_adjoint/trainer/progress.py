"""A progress bar for the phases of an update that take long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from tqdm.auto import tqdm

__all__ = ["progress"]

PATIENCE = 3.0  # seconds before a bar appears; shorter work shows none


@contextmanager
def progress(module: nn.Module, what: str, total: int, shown: bool) -> Iterator[None]:
    """A progress bar that counts forward calls of `module` within this context, and disappears after it.

    Args:
        module: the denoiser, or its wrapper.
        what: text before the bar.
        total: expected number of calls.
        shown: whether this process shows bars.
    """
    with tqdm(total=total, desc=what, unit="step", leave=False, delay=PATIENCE, disable=not shown) as bar:

        def count(*_: object) -> None:  # not `bar.update` itself: what a forward hook returns replaces the module's output
            bar.update()

        counted = module.register_forward_hook(count)
        try:
            yield
        finally:
            counted.remove()
