"""A pipeline from what a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ..replay.view import denoiser_names, require_undivided

__all__ = ["INDEX", "MODULAR_INDEX", "has_file", "load_pipeline", "modular_from_pretrained"]

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
# Of `ModularPipeline.from_pretrained`, which reads what there is; what it does not take is for the weights, which load later.
_OF_THE_INDEX = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_OF_THE_BLOCKS = ("collection", "components_manager", "workflow")


def load_pipeline(
    model: str | Path | DiffusionPipeline | ModularPipeline,
    init_kwargs: dict[str, Any] | None = None,
    component: str | None = None,
) -> DiffusionPipeline | ModularPipeline:
    """The pipeline itself, or the one of that name or in that folder; refused if it has no scheduler or no whole denoiser.

    A name of which there is a modular pipeline only gives that one, with the weights that its workflow needs.

    Args:
        component: name of the denoiser; `None` for the usual ones.
    """
    if not isinstance(model, str | Path | DiffusionPipeline | ModularPipeline):
        raise TypeError(
            f"model is a {type(model).__name__}; pass a DiffusionPipeline or ModularPipeline, or the name or folder of one."
        )
    if not isinstance(model, DiffusionPipeline | ModularPipeline):
        kwargs = init_kwargs or {}
        modular = has_file(str(model), MODULAR_INDEX, kwargs) and not has_file(str(model), INDEX, kwargs)
        model = modular_from_pretrained(str(model), kwargs) if modular else DiffusionPipeline.from_pretrained(model, **kwargs)
    require_undivided(model, component)
    return model


def modular_from_pretrained(
    name: str, init_kwargs: dict[str, Any], like: ModularPipeline | None = None, component: str | None = None
) -> ModularPipeline:
    """The modular pipeline of that name or in that folder, its weights loaded.

    Args:
        init_kwargs: of its `from_pretrained` ("workflow", …) and of its `load_components` ("dtype", …).
        like: a pipeline that it has the blocks of, and shares all networks with but those that predict, `component` among them.
    """
    of_index = {key: value for key, value in init_kwargs.items() if key in _OF_THE_INDEX}
    if like is None:
        of_blocks = {key: value for key, value in init_kwargs.items() if key in _OF_THE_BLOCKS}
        pipeline = ModularPipeline.from_pretrained(name, **of_index, **of_blocks)
    else:
        pipeline = type(like)(like.blocks, name, **of_index)
        shared = {part: network for part, network in like.components.items() if part not in denoiser_names(like, component)}
        pipeline.update_components(**shared)
    of_weights = {key: value for key, value in init_kwargs.items() if key not in ("revision", *_OF_THE_BLOCKS)}
    pipeline.load_components(**of_weights)
    return pipeline


def has_file(name: str, file: str, init_kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a folder, or a repository of the Hub, has this file; not, where the name is of neither.

    Args:
        init_kwargs: of `from_pretrained`, which say where the Hub's files lie.
    """
    if Path(name).exists():
        return (Path(name) / file).is_file()
    where = ("cache_dir", "local_files_only", "revision", "token")
    try:
        hf_hub_download(name, file, **{key: value for key, value in (init_kwargs or {}).items() if key in where})
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return False
    return True
