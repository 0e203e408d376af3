"""Reward fine-tuning of diffusers pipelines with Adjoint Matching (arXiv 2409.08861), with the interface of a TRL trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names on first use: importing torch takes seconds, and `diffusers-adjoint --help` does not need it."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = import_module(".api", __name__)
    # Importing `.api` also sets its submodules, such as `core`, as attributes of this package.
    return globals()[name] if name in globals() else getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *import_module(".api", __name__).__all__])
