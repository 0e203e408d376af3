"""The files that are uploaded: the card, its samples, and whole pipelines that load without this package."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor

from ..model.loading import INDEX, MODULAR_INDEX
from ..pictures.pixels import as_pictures, drawable
from ..schedulers import MemorylessScheduler
from .card import CardFacts, Sample, model_card
from .facts import medium_of, pipeline_tag_of

__all__ = ["CARD_FILES", "pipeline_files", "public_json", "save_pipeline", "write_card", "write_samples"]

CARD_FILES = ["README.md", "image_*.png", "video_*.webp"]
"""Patterns of the files that `write_card` writes. Uploads list their files, because others contain local paths or are pickles."""

FRAME_MS = 62  # 16 frames a second; a pipeline does not tell its rate
# Entries with local paths that the save methods of diffusers and transformers write into configs; loading does not need them.
_LOCAL = ("_name_or_path", "name_or_path", "special_tokens_map_file")
_BEST = "best_model_checkpoint"  # a path in the trainer's state, of which loading needs the folder's name only


def write_card(
    folder: str | Path, facts: CardFacts, images: Tensor, prompts: Sequence[str], before: Tensor | None = None
) -> None:
    """Write README.md and the samples that it shows.

    Args:
        folder: created if missing; other files in it are not changed.
        facts: from `card_facts`.
        images: samples of the tuned model, in [0, 1]: images (N, C, H, W) or videos (N, F, C, H, W); waveforms are not written.
        prompts: N prompts; the first one is that of `facts.call`.
        before: samples of the base for the same prompts and seeds, of the same shape.

    Raises:
        ValueError: if the numbers of images and prompts differ.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    samples = write_samples(folder, images, prompts, before)
    tag = pipeline_tag_of(facts.call.keys(), images)
    model_card(replace(facts, medium=medium_of(images), pipeline_tag=tag, samples=samples)).save(folder / "README.md")


def write_samples(folder: str | Path, images: Tensor, prompts: Sequence[str], before: Tensor | None = None) -> list[Sample]:
    """Write image_0.png, … or, for videos, animated video_0.webp, …, and image_0_base.png, … of the base.

    Arguments and errors as in `write_card`.
    """
    for given in [images] if before is None else [images, before]:
        if len(given) != len(prompts):
            raise ValueError(f"there are {len(given)} images for {len(prompts)} prompts; pass one prompt for each.")
    if not drawable(images):  # not images that a browser can show
        return []
    files = [_write_sample(Path(folder), f"{i}", image) for i, image in enumerate(images)]
    base = [None] * len(files) if before is None else [_write_sample(Path(folder), f"{i}_base", b) for i, b in enumerate(before)]
    return [Sample(*parts) for parts in zip(files, prompts, base, strict=True)]


def _write_sample(folder: Path, number: str, image: Tensor) -> str:
    """Write an image (C, H, W) or a video (F, C, H, W); returns the file's name."""
    video = image.ndim == 4
    file = f"video_{number}.webp" if video else f"image_{number}.png"
    first, *others = as_pictures(image if video else image[None])
    animation: dict[str, Any] = {"save_all": True, "append_images": others, "duration": FRAME_MS, "loop": 0} if video else {}
    first.save(folder / file, **animation)
    return file


def save_pipeline(folder: str | Path, pipeline: DiffusionPipeline | ModularPipeline, repo_id: str | None = None) -> None:
    """Write a whole pipeline that loads without this package, and without local paths in its files.

    Args:
        folder: created if missing.
        pipeline: the pipeline; a memoryless scheduler is saved as the class of diffusers that it is derived from.
        repo_id: Hub id that the folder will have; the index of a modular pipeline names it for each component.

    Raises:
        ValueError: if a component has adapters.
    """
    for name, part in pipeline.components.items():
        if getattr(part, "_hf_peft_config_loaded", False):  # its weights would be saved under PEFT's names, which do not load
            raise ValueError(
                f"the {name} has adapters, and a whole pipeline cannot be saved with adapters; call fuse_lora() and "
                f"unload_lora_weights() first."
            )
    saved = copy.copy(pipeline)
    if isinstance(saved, ModularPipeline):
        saved.__dict__["_internal_dict"] = copy.deepcopy(saved.__dict__["_internal_dict"])  # saving writes into it
        saved.__dict__["scheduler"] = _host_scheduler(pipeline.scheduler)
        saved.save_pretrained(str(folder), overwrite_modular_index=True)
        _name_repository(Path(folder) / MODULAR_INDEX, str(folder), repo_id)
    else:
        saved.scheduler = _host_scheduler(pipeline.scheduler)
        saved.save_pretrained(folder)
    parts = [Path(folder) / name for name in saved.components]
    for file in [Path(folder) / _index(saved), *(file for part in parts for file in part.rglob("*config.json"))]:
        file.write_bytes(public_json(file))


def _name_repository(index: Path, folder: str, repo_id: str | None) -> None:
    """Replace the folder by the Hub id in a modular pipeline's index. Without an id, loading looks for components beside it."""
    content = json.loads(index.read_text(encoding="utf-8"))
    for entry in content.values():
        if isinstance(entry, list) and entry[2] and entry[2].get("pretrained_model_name_or_path") == folder:
            entry[2]["pretrained_model_name_or_path"] = repo_id
    index.write_text(json.dumps(content), encoding="utf-8")


def public_json(file: Path) -> bytes:
    """The content of a JSON file without entries that contain local paths, as it may be uploaded."""
    content = _without_local(json.loads(file.read_text(encoding="utf-8")))
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def pipeline_files(pipeline: DiffusionPipeline | ModularPipeline) -> list[str]:
    """Patterns of the files that `save_pipeline` writes."""
    return [_index(pipeline), *(f"{name}/*" for name in pipeline.components)]


def _index(pipeline: DiffusionPipeline | ModularPipeline) -> str:
    return MODULAR_INDEX if isinstance(pipeline, ModularPipeline) else INDEX


def _host_scheduler(scheduler: Any) -> Any:
    """The scheduler as a class of diffusers: a memoryless scheduler does not load without this package."""
    if not isinstance(scheduler, MemorylessScheduler):
        return scheduler
    host = next(cls for cls in type(scheduler).__mro__ if cls.__module__.startswith("diffusers."))
    return host(**{name: scheduler.config[name] for name in inspect.signature(host).parameters})


def _without_local(config: Any) -> Any:
    if isinstance(config, dict):
        kept = {name: _without_local(value) for name, value in config.items() if name not in _LOCAL}
        if best := kept.get(_BEST):
            kept[_BEST] = Path(best).name
        return kept
    return [_without_local(value) for value in config] if isinstance(config, list) else config
