"""Load the base and the models fine-tuned from it; networks that they have in common are loaded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub import hf_hub_download

from ..model.loading import INDEX, MODULAR_INDEX, has_file, load_pipeline, modular_from_pretrained
from ..model.lora import WEIGHTS_NAME, load_saved_lora
from ..replay.view import denoiser_names

__all__ = ["BASE", "Model", "holds_model", "load_models"]

BASE = "base"


@dataclass(frozen=True)
class Model:
    """One of the models that are compared.

    Args:
        name: its name in tables, file names and contact sheets.
        pipeline: models that differ by a LoRA only share one pipeline.
        adapter: name of its LoRA in the pipeline; `None` for the base and for fully fine-tuned models.
    """

    name: str
    pipeline: DiffusionPipeline | ModularPipeline
    adapter: str | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this context the pipeline is this model: its adapter is active, and no other."""
        carrying = [] if self.adapter is None else _carrying(self.pipeline, self.adapter)
        for part in carrying:
            part.set_adapter(self.adapter)
            part.enable_adapters()
        try:
            yield
        finally:
            for part in carrying:
                part.disable_adapters()


def _carrying(pipeline: DiffusionPipeline, adapter: str) -> list[Any]:
    """The pipeline's networks with layers of this adapter, which may include text encoders."""
    return [part for part in pipeline.components.values() if adapter in getattr(part, "peft_config", {})]


def load_models(
    model: str, adapters: Sequence[str], init_kwargs: dict[str, Any], component: str | None, device: torch.device
) -> list[Model]:
    """The base first, then one model for each adapter.

    Args:
        model: name or folder of the base pipeline.
        adapters: folders or Hub ids of fine-tuned models: a LoRA, or a whole pipeline, of which only the denoiser is loaded.
        init_kwargs: arguments of `load_pipeline`.
        component: name of the trained network; `None` for the first denoiser.
        device: device of all networks.

    Raises:
        ValueError: if a model cannot be loaded, or a LoRA has no layer in the denoiser.
    """
    base = _loaded("model_name_or_path", model, lambda: load_pipeline(model, init_kwargs, component))
    component = component or denoiser_names(base)[0]
    models = [Model(BASE, base)]
    for number, (adapter, name) in enumerate(zip(adapters, _names(adapters), strict=True)):
        load = partial(_tuned, base, adapter, name, f"tuned_{number}", component, init_kwargs)
        models.append(_loaded("adapter", adapter, load))
    for pipeline in (model.pipeline for model in models):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
    return models


def _loaded(option: str, name: str, load: Callable[[], Any]) -> Any:
    """Call `load`, and turn the errors of diffusers and huggingface_hub for bad names and files into one sentence."""
    try:
        return load()
    except (torch.OutOfMemoryError, ImportError):  # not caused by the file
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{option}={name!r} cannot be loaded ({reason}); pass the folder or the name of one.") from error


def holds_model(folder: str) -> bool:
    """Whether a folder contains a LoRA or a whole pipeline from training."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (WEIGHTS_NAME, INDEX, MODULAR_INDEX))


def _names(adapters: Sequence[str]) -> list[str]:
    """Short names of the models: the folder's name, with as much of its path as makes it unique."""
    paths = [Path(adapter).resolve().parts if Path(adapter).exists() else tuple(adapter.split("/")) for adapter in adapters]
    for length in range(1, max((len(path) for path in paths), default=0) + 1):
        names = ["-".join(path[-length:]) for path in paths]
        if len({*names, BASE}) == len(names) + 1:
            return names
    if adapters:
        raise ValueError("adapter names the same model twice; pass each of them once.")
    return []


def _lora_file(source: str) -> Path:
    """The LoRA file in a folder or Hub repository; in a folder a single .safetensors file may have any name."""
    if not Path(source).exists():
        return Path(hf_hub_download(source, WEIGHTS_NAME))
    others = sorted(Path(source).glob("*.safetensors"))
    return others[0] if len(others) == 1 else Path(source) / WEIGHTS_NAME


def _tuned(
    base: DiffusionPipeline | ModularPipeline, source: str, name: str, adapter: str, component: str, init_kwargs: dict[str, Any]
) -> Model:
    """Load a fine-tuned model: a LoRA into the base's pipeline, or a whole pipeline that shares the base's other networks."""
    if isinstance(base, ModularPipeline) and has_file(source, MODULAR_INDEX):
        return Model(name, modular_from_pretrained(source, {**init_kwargs, "revision": None}, like=base, component=component))
    if has_file(source, INDEX):
        denoisers = denoiser_names(base, component)
        shared = {part: network for part, network in base.components.items() if part not in denoisers}
        which_files = {"revision": None, "variant": None}  # the given ones belong to the base
        return Model(name, type(base).from_pretrained(source, **{**init_kwargs, **which_files, **shared}))
    load_saved_lora(base, component, _lora_file(source), adapter)
    carrying = _carrying(base, adapter)
    if getattr(base, component) not in carrying:
        raise ValueError(f"it has no layer in the {component}")
    for part in carrying:
        part.disable_adapters()
    return Model(name, base, adapter)
