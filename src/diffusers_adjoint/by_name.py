"""Rewards and features by the names that a command line can say."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import rewards
from .metrics import features

__all__ = ["load_features", "load_rewards"]


def load_rewards(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The reward functions of these names; see `TrainArguments.reward_funcs`.

    Raises:
        ValueError: if there is none, or a module, a file or a name in it does not exist.
    """
    if not names:
        raise ValueError("reward_funcs is missing; pass PickScore, module:function or path/to/file.py:function.")
    return [_made(name, _named(name, rewards, "reward")) for name in names]


def load_features(names: Sequence[str], reward_funcs: Sequence[Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """Features for diversity, by name; see `EvaluationArguments.diversity`. A reward that is loaded already serves for its own.

    Args:
        names: none for those of the rewards, or the pixels where these have none.
        reward_funcs: the loaded ones.
        device: where those go that cannot be moved later.

    Raises:
        ValueError: if a module, a file or a name does not exist, or a reward has no features.
    """
    # A network that is there already is not loaded a second time.
    loaded = {type(reward).__name__: reward.features for reward in reward_funcs if hasattr(reward, "features")}
    return {name: loaded.get(name) or _features(name, device) for name in names or loaded or ["pixels"]}


def _features(name: str, device: torch.device) -> Callable[..., Any]:
    if hasattr(getattr(rewards, name, None), "features"):
        return _made(name, getattr(rewards, name)).features
    found = _named(name, features, "diversity")
    return found(device=device) if name in ("LPIPS", "DreamSim") else _made(name, found)


def _made(name: str, found: Any) -> Any:
    """An instance, of a class."""
    if not isinstance(found, type):
        return found
    try:
        return found()
    except TypeError as error:  # it has arguments without a default
        raise ValueError(f"{name} is not made without arguments ({error}); pass module:function with one made.") from error


def _named(name: str, module: ModuleType, option: str) -> Any:
    """What a name of `module` stands for, or module:function, or file.py:function."""
    source, colon, attribute = name.rpartition(":")
    if not colon:
        names = [key for key in module.__all__ if _is_usable(getattr(module, key))]
        if name not in names:
            raise ValueError(f"{option} {name!r} is none of {', '.join(names)}; pass one of them or module:function.")
        return getattr(module, name)
    found = _module_of_file(Path(source)) if source.endswith(".py") else _module_of_name(source)
    if not hasattr(found, attribute):
        raise ValueError(f"{source} has no {attribute!r}; pass the name of a function that is defined there.")
    return getattr(found, attribute)


def _is_usable(value: Any) -> bool:
    """Whether it measures images: a class, or a function of images, or of images and prompts."""
    if isinstance(value, type):
        return callable(getattr(value, "forward", None)) or "device" in inspect.signature(value).parameters
    return list(inspect.signature(value).parameters)[:2] in (["images"], ["images", "prompts"])


def _module_of_name(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # the module is there, but something that it imports is not
            raise
        raise ValueError(f"there is no module {name!r}; pass module:function or path/to/file.py:function.") from None


def _make_importable(folder: Path) -> None:
    """As `python` does with the folder of a script; a console script looks beside itself only."""
    if (name := str(folder.resolve())) not in sys.path:
        sys.path.insert(0, name)


@cache
def _module_of_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"there is no file {str(file)!r}; pass module:function or path/to/file.py:function.")
    _make_importable(file.parent)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
