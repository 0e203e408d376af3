"""Reward fine-tuning of diffusers pipelines with Adjoint Matching (arXiv 2409.08861), in the shape of a TRL trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is public at its first use: torch and the hosts take seconds, and `diffusers-adjoint --help` needs neither."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = import_module(".api", __name__)
    return globals()[name] if name in globals() else getattr(api, name)  # a room that this import has put here, or a name of it


def __dir__() -> list[str]:
    return sorted([*globals(), *import_module(".api", __name__).__all__])
