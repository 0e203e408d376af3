"""Load reward functions and diversity features by their names on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import rewards
from ..metrics import features
from .errors import is_ours

__all__ = ["load_features", "load_rewards"]


def load_rewards(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The reward functions of these names; see `TrainArguments.reward_funcs`.

    Raises:
        ValueError: if there are no names; if a module, a file or a name in it does not exist; or if one cannot be loaded.
    """
    if not names:
        raise ValueError("reward_funcs is missing; pass PickScore, module:function or path/to/file.py:function.")
    return [_reward(name) for name in names]


def _reward(name: str) -> Any:
    with _one_sentence("reward", name):
        return _made("reward", name, _named(name, rewards, "reward"))


def load_features(
    names: Sequence[str], reward_names: Sequence[str], reward_funcs: Sequence[Any], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """Features for measuring diversity, by name; see `EvaluationArguments.diversity`.

    Args:
        names: names of features. If empty, the features of the rewards, or the pixels if these have no features.
        reward_names, reward_funcs: names and functions of the rewards that are already loaded, which are not loaded again.
        device: for features that cannot be moved after they are made.

    Raises:
        ValueError: if a module, a file or a name does not exist, or cannot be loaded.
    """
    rewards_by_name = zip(reward_names, reward_funcs, strict=True)
    loaded = {name: reward.features for name, reward in rewards_by_name if hasattr(reward, "features")}
    return {name: loaded.get(name) or _features(name, device) for name in names or loaded or ["pixels"]}


def _features(name: str, device: torch.device) -> Callable[..., Any]:
    of_rewards = [key for key in rewards.__all__ if hasattr(getattr(rewards, key), "features")]
    with _one_sentence("diversity", name):
        found = getattr(rewards, name) if name in of_rewards else _named(name, features, "diversity", of_rewards)
        made = _made("diversity", name, partial(found, device=device) if name in ("LPIPS", "DreamSim") else found)
    return getattr(made, "features", made)


def _made(option: str, name: str, found: Any) -> Any:
    """An instance if `found` is a class, else `found` itself."""
    if not isinstance(found, type | partial):
        return found
    if not _takes_nothing(found):
        raise ValueError(f"{option} {name!r} needs arguments; pass module:name of an object that is made there.")
    return found()


@contextmanager
def _one_sentence(option: str, name: str) -> Iterator[None]:
    """Turn errors of the Hub, of a weights file or of a user's file into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        if is_ours(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{option} {name!r} cannot be loaded ({reason}); fix this, or pass another one.") from error


def _takes_nothing(found: Any) -> bool:
    try:
        inspect.signature(found).bind()
    except TypeError:
        return False
    return True


def _named(name: str, module: ModuleType, option: str, others: Sequence[str] = ()) -> Any:
    """The object for a name in `module`, for module:function or for file.py:function; `others` are listed in the error, too."""
    source, colon, attribute = name.rpartition(":")
    if not colon:
        names = [key for key in module.__all__ if _is_usable(getattr(module, key))]
        if name not in names:
            known = ", ".join([*names, *others])
            raise ValueError(f"{option} {name!r} is none of {known}; pass one of them, or module:function.")
        return getattr(module, name)
    found = _module_of_file(Path(source).resolve(), source) if source.endswith(".py") else _module_of_name(source)
    if not hasattr(found, attribute):
        raise ValueError(f"{source} has no {attribute!r}; pass the name of a function that is defined there.")
    return getattr(found, attribute)


def _is_usable(value: Any) -> bool:
    """Whether a name can be used as it is: a class without required arguments, or a function of images, or images and prompts."""
    if isinstance(value, type):
        return _takes_nothing(value)
    return list(inspect.signature(value).parameters)[:2] in (["images"], ["images", "prompts"])


def _module_of_name(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # the module exists, but one that it imports does not
            raise
        raise ValueError(f"there is no module {name!r}; pass module:function or path/to/file.py:function.") from None


def _make_importable(folder: Path) -> None:
    """Add a folder to `sys.path`, as `python` does with a script's folder; a console script does not have it."""
    if (name := str(folder.resolve())) not in sys.path:
        sys.path.insert(0, name)


@cache
def _module_of_file(file: Path, written: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(str(file), file)  # the full path as a name, which no other module has
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"there is no file {written!r}; pass module:function or path/to/file.py:function.")
    _make_importable(file.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module
