"""A bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from tqdm.auto import tqdm

__all__ = ["progress"]

PATIENCE = 3.0  # seconds without a bar; short work shows none


@contextmanager
def progress(module: nn.Module, what: str, total: int, shown: bool) -> Iterator[None]:
    """A bar that counts the forwards of `module` within this context, and vanishes after it.

    Args:
        module: the denoiser, or what wraps it.
        what: said before the bar.
        total: forwards that are expected.
        shown: whether this process shows one at all.
    """
    with tqdm(total=total, desc=what, unit="step", leave=False, delay=PATIENCE, disable=not shown) as bar:

        def count(*_: object) -> None:  # what a hook returns replaces the output, and `update` returns something
            bar.update()

        counted = module.register_forward_hook(count)
        try:
            yield
        finally:
            counted.remove()
