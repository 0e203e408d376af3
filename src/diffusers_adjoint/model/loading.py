"""Load a pipeline by name or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ..replay.view import denoiser_names, require_undivided

__all__ = ["INDEX", "MODULAR_INDEX", "has_file", "load_pipeline", "modular_from_pretrained"]

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
# Arguments of `ModularPipeline.from_pretrained`; all others are for `load_components`, which loads the weights.
_OF_THE_INDEX = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_OF_THE_BLOCKS = ("collection", "components_manager", "workflow")


def load_pipeline(
    model: str | Path | DiffusionPipeline | ModularPipeline,
    init_kwargs: dict[str, Any] | None = None,
    component: str | None = None,
) -> DiffusionPipeline | ModularPipeline:
    """Return a pipeline as it is, or load the one with this name or in this folder.

    If there is only a modular pipeline of that name, it is loaded with the weights that its workflow needs.

    Args:
        model: pipeline, Hub id or local folder.
        init_kwargs: arguments of `from_pretrained`, and of a modular pipeline's `load_components`.
        component: name of the denoiser; `None` for the usual ones.

    Raises:
        TypeError: if `model` is of another type.
        ValueError: if the pipeline has no scheduler or no whole denoiser.
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
    """Load a modular pipeline with its weights.

    Args:
        name: Hub id or local folder.
        init_kwargs: arguments of its `from_pretrained` ("workflow", …) and `load_components` ("dtype", …).
        like: a pipeline with the same blocks; all its networks but the denoisers are shared.
        component: name of a further denoiser.
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
    """Whether a local folder or Hub repository has this file; `False` if there is no such folder or repository.

    Args:
        name: local folder or Hub id.
        file: name of the file.
        init_kwargs: arguments of `from_pretrained`, such as `revision` and `cache_dir`.
    """
    if Path(name).exists():
        return (Path(name) / file).is_file()
    where = ("cache_dir", "local_files_only", "revision", "token")
    try:
        hf_hub_download(name, file, **{key: value for key, value in (init_kwargs or {}).items() if key in where})
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return False
    return True
