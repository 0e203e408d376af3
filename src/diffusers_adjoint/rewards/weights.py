"""Published weights that are not a transformers model: one file, on the Hub or in a local folder."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["published_file", "read_weights"]


def published_file(model: str | Path, *names: str) -> Path:
    """The path of the first of these files that exists in a local folder or on the Hub (or, offline, in its cache).

    Args:
        model: local folder, local file (which is returned as it is), or Hub id.
        names: file names, the preferred one first.

    Raises:
        ValueError: if a local folder has none of them.
        huggingface_hub.errors.EntryNotFoundError, LocalEntryNotFoundError: if the Hub or its cache has none.
    """
    local = Path(model)
    if local.is_file():
        return local
    if not local.is_dir():
        return _from_hub(str(model), names)
    found = [local / name for name in names if (local / name).is_file()]
    if not found:
        raise ValueError(f"{local} holds no {' or '.join(names)}; pass the folder of the published weights, or the Hub id.")
    return found[0]


def _from_hub(model: str, names: tuple[str, ...]) -> Path:
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(model, name))
        except EntryNotFoundError:  # also raised offline if the file is not in the cache; try the next name
            continue
    return Path(hf_hub_download(model, names[-1]))


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file or in a .pt or .pth file, name → tensor; only tensors are unpickled.

    Raises:
        ValueError: if the file holds anything else, or is damaged.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise many kinds of errors
        raise ValueError(f"{file} holds more than tensors, or is damaged; pass the published file.") from error
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{file} holds more than named tensors; pass the published file.")
    return weights
