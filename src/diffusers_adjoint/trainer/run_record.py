"""`run.json` of a checkpoint: which run wrote it, with which network and settings, and what its files must be.

It may be uploaded: it holds no token and no path.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..config import AdjointMatchingConfig

__all__ = ["RECORD_NAME", "RunFacts", "RunRecord", "adapter_facts", "facts_to_go_on", "rehashed", "settings_of", "versions"]

logger = logging.get_logger(__name__)

RECORD_NAME = "run.json"
# Fields of ours that change nothing of what is trained.
WITHOUT_EFFECT = {"logging_steps", "save_steps", "per_device_eval_batch_size", "remove_unused_columns", "metric_for_best_model"}
WITHOUT_EFFECT |= {"model_init_kwargs", "offload_text_encoders", "num_generations_eval", "num_images_to_log"}
WITHOUT_EFFECT |= {"save_on_interrupt", "per_device_train_batch_size", "probe_base", "adjoint_pairing", "sampling_integrator"}
WITHOUT_EFFECT |= {"reward_workers", "dry_run"}
# Fields of the host that do.
OF_THE_HOST = ["seed", "data_seed", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"]
OF_THE_HOST += ["max_grad_norm", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16", "train_sampling_strategy"]
# Of a LoraConfig: where adapters are is told by the file's names; their start and their dropout have no effect on going on.
OF_NO_ADAPTER = {"auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights"}
OF_NO_ADAPTER |= {"lora_dropout", "peft_version", "revision", "target_modules", "task_type"}


@dataclass(frozen=True)
class RunFacts:
    """What is the same for all checkpoints of a run, in values that JSON knows."""

    run: str  # made once, carried over when the run goes on
    settings: dict[str, Any]
    adapter: dict[str, Any] | None  # of LoraConfig; None when all weights are trained
    base: str  # base_fingerprint
    versions: dict[str, str]


@dataclass(frozen=True)
class RunRecord(RunFacts):
    """The facts, the time of writing, in seconds since 1970, and the SHA-256 of each other file, by its path."""

    written: float
    files: dict[str, str]

    @classmethod
    def write(cls, folder: Path, facts: RunFacts, after: float = 0.0) -> None:
        """Into a folder in which everything else lies already, on the disk of this process.

        Args:
            after: the time that the record before this one has; clocks are set back, and differ between machines.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD_NAME)
        files = {path.relative_to(folder).as_posix(): _sha256_of(path) for path in paths}
        written = max(time.time(), after + 1e-3)
        (folder / RECORD_NAME).write_bytes(cls(**asdict(facts), written=written, files=files)._as_json())

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """`None` if there is none, as in a checkpoint of an earlier version.

        Raises:
            ValueError: if it is damaged.
        """
        if not (folder / RECORD_NAME).exists():
            return None
        try:
            content = json.loads((folder / RECORD_NAME).read_bytes())
            if content.pop("checksum") == _checksum(content):
                return cls(**content)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:  # reading garbage
            logger.debug(f"{folder / RECORD_NAME}: {error!r}")
        raise ValueError(f"{folder} is damaged, its {RECORD_NAME} is not what was written; pass another checkpoint.")

    def damaged(self, folder: Path, only: str = "") -> str | None:
        """The first file that is missing or another one than was written, of those whose path begins with `only`."""
        found = ((name, expected) for name, expected in self.files.items() if name.startswith(only))
        return next((name for name, expected in found if not _holds(folder / name, expected)), None)

    def _as_json(self) -> bytes:
        content = asdict(self)
        return json.dumps(content | {"checksum": _checksum(content)}, indent=2, sort_keys=True).encode()


def _checksum(content: Mapping[str, Any]) -> str:
    """Of run.json itself, whatever its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _holds(path: Path, expected: str) -> bool:
    try:
        return _sha256_of(path) == expected
    except OSError:  # missing, or on a bad sector
        return False


def _sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def rehashed(record: bytes, contents: Mapping[str, bytes]) -> bytes:
    """A run.json for a copy of its checkpoint in which these files have other contents."""
    values = json.loads(record)
    values.pop("checksum")
    changed = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return RunRecord(**values | {"files": values["files"] | changed})._as_json()


def settings_of(args: AdjointMatchingConfig, trainer: str, optimizer: str | None, rewards: Iterable[str]) -> dict[str, Any]:
    """Name → value of what decides the result.

    Args:
        trainer: name of its class.
        optimizer: class of the one that the user made; `None` where `optim` says which.
        rewards: names of the reward functions.
    """
    own = [name for name in AdjointMatchingConfig.__annotations__ if name not in WITHOUT_EFFECT and not name.startswith("_")]
    settings = {name: _harmless(getattr(args, name)) for name in [*own, *OF_THE_HOST]}
    settings |= {"optim": optimizer} if optimizer else {}  # which then has no effect
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings["loss_kwargs"] = _harmless(asdict(args.objective))  # type: ignore[call-overload]  # with those left out
    return settings | {"trainer": trainer, "prompts per update": batch, "rewards": list(rewards)}


def _harmless(value: Any) -> Any:
    """Numbers and single words as they are; of other text, which may be a path or a secret, a digest, enough to compare."""
    if isinstance(value, Mapping):
        return {str(key): _harmless(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_harmless(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = getattr(value, "value", value)  # of an enumeration
    if not isinstance(text, str):
        return type(value).__name__
    if re.fullmatch(r"[a-z0-9_]{0,30}", text):
        return text
    return f"text {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def adapter_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What in `LoraConfig.to_dict()` decides which network the weights make."""
    kept = {name: value for name, value in config.items() if name not in OF_NO_ADAPTER}
    return json.loads(
        json.dumps(kept, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def versions() -> dict[str, str]:
    """Of the libraries that decide a run's numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "diffusers-adjoint")}


def facts_to_go_on(checkpoint: Path, now: RunFacts) -> RunFacts:
    """Those of now, of the run that wrote the checkpoint; with a warning of what differs but may differ.

    Args:
        checkpoint: a whole one; without a record it begins a run of its own.

    Raises:
        ValueError: if it was written with another network.
    """
    then = RunRecord.read(checkpoint)
    if then is None:
        return now
    if then.base != now.base:
        raise ValueError(
            f"{checkpoint} was trained on a base with other weights or another dtype; resume with the pipeline it was trained on."
        )
    if found := _differences(then.adapter or {}, now.adapter or {}):
        raise ValueError(f"{checkpoint} has another adapter ({found}); resume with the peft_config it was trained with.")
    if found := _differences(_as_named_now(then.settings) | then.versions, _as_named_now(now.settings) | now.versions):
        logger.warning(
            f"{checkpoint} was written with other settings ({found}); training goes on with those of now, but the optimizer "
            f"with the learning rate and other numbers that it has saved."
        )
    return replace(now, run=then.run)


def _as_named_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With each option of the objective by itself: an earlier version knew fewer, and its first one stood among the settings."""
    known = {"pairing": settings["adjoint_pairing"]} if "adjoint_pairing" in settings else settings.get("loss_kwargs", {})
    return {**settings, **{f"loss_kwargs[{name!r}]": value for name, value in known.items()}, "loss_kwargs": None}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "a 1, now 2; b 3, now 4" of what both know; empty where they agree."""
    now = json.loads(json.dumps(now))
    changed = [name for name in then if name in now and then[name] != now[name]]
    return "; ".join(f"{name} {then[name]}, now {now[name]}" for name in changed)
