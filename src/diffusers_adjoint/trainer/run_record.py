"""`run.json` in a checkpoint: the run that wrote it, its network and settings, and the hashes of its files.

The file may be uploaded, so it contains no token and no path.
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
# Fields of `AdjointMatchingConfig` that do not change the trained weights.
WITHOUT_EFFECT = {"logging_steps", "save_steps", "per_device_eval_batch_size", "remove_unused_columns", "metric_for_best_model"}
WITHOUT_EFFECT |= {"model_init_kwargs", "offload_text_encoders", "num_generations_eval", "num_images_to_log"}
WITHOUT_EFFECT |= {"save_on_interrupt", "per_device_train_batch_size", "probe_base", "adjoint_pairing", "sampling_integrator"}
WITHOUT_EFFECT |= {"reward_workers", "dry_run"}
# Fields of `TrainingArguments` that do.
OF_THE_HOST = ["seed", "data_seed", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"]
OF_THE_HOST += ["max_grad_norm", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16", "train_sampling_strategy"]
# Fields of `LoraConfig` that are not compared on resuming: the file's tensor names already tell where the adapters are, and their
# initialisation and dropout have no effect on a resumed run.
OF_NO_ADAPTER = {"auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights"}
OF_NO_ADAPTER |= {"lora_dropout", "peft_version", "revision", "target_modules", "task_type"}


@dataclass(frozen=True)
class RunFacts:
    """What all checkpoints of a run share, as JSON values.

    Args:
        run: random id of the run; a resumed run keeps it.
        settings: the settings that decide the result, by name.
        adapter: fields of `LoraConfig`; `None` when all weights are trained.
        base: `base_fingerprint` of the base's weights.
        versions: library → version.
    """

    run: str
    settings: dict[str, Any]
    adapter: dict[str, Any] | None
    base: str
    versions: dict[str, str]


@dataclass(frozen=True)
class RunRecord(RunFacts):
    """The content of `run.json`: `RunFacts` and two more.

    Args:
        written: time of writing, in seconds since 1970.
        files: path of every other file in the checkpoint → its SHA-256.
    """

    written: float
    files: dict[str, str]

    @classmethod
    def write(cls, folder: Path, facts: RunFacts, after: float = 0.0) -> None:
        """Write the record into a checkpoint whose other files are complete.

        Args:
            folder: of the checkpoint.
            facts: of the run.
            after: `written` of the newest checkpoint so far, in seconds since 1970. The new time is later even if the clock was
                set back, or is another machine's.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD_NAME)
        files = {path.relative_to(folder).as_posix(): _sha256_of(path) for path in paths}
        written = max(time.time(), after + 1e-3)
        (folder / RECORD_NAME).write_bytes(cls(**asdict(facts), written=written, files=files)._as_json())

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Read the record of a checkpoint; `None` if it has none, as one from an earlier version.

        Raises:
            ValueError: if the record is damaged.
        """
        if not (folder / RECORD_NAME).exists():
            return None
        try:
            content = json.loads((folder / RECORD_NAME).read_bytes())
            if content.pop("checksum") == _checksum(content):
                return cls(**content)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:  # the file can hold anything
            logger.debug(f"{folder / RECORD_NAME}: {error!r}")
        raise ValueError(f"{folder} is damaged: its {RECORD_NAME} has changed since it was written; pass another checkpoint.")

    def damaged(self, folder: Path, only: str = "") -> str | None:
        """The first file that is missing or has another hash, among those whose path begins with `only`; else `None`."""
        found = ((name, expected) for name, expected in self.files.items() if name.startswith(only))
        return next((name for name, expected in found if not _holds(folder / name, expected)), None)

    def _as_json(self) -> bytes:
        content = asdict(self)
        return json.dumps(content | {"checksum": _checksum(content)}, indent=2, sort_keys=True).encode()


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the record's values, independent of the file's layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _holds(path: Path, expected: str) -> bool:
    try:
        return _sha256_of(path) == expected
    except OSError:  # the file is missing or cannot be read
        return False


def _sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def rehashed(record: bytes, contents: Mapping[str, bytes]) -> bytes:
    """The bytes of run.json for a copy of the checkpoint in which the files in `contents` were changed."""
    values = json.loads(record)
    values.pop("checksum")
    changed = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return RunRecord(**values | {"files": values["files"] | changed})._as_json()


def settings_of(args: AdjointMatchingConfig, trainer: str, optimizer: str | None, rewards: Iterable[str]) -> dict[str, Any]:
    """The settings that decide the result, name → value.

    Args:
        args: the settings of the trainer.
        trainer: name of the trainer's class.
        optimizer: class of an optimizer that the user passed; `None` if `optim` names it.
        rewards: names of the reward functions.
    """
    own = [name for name in AdjointMatchingConfig.__annotations__ if name not in WITHOUT_EFFECT and not name.startswith("_")]
    settings = {name: _harmless(getattr(args, name)) for name in [*own, *OF_THE_HOST]}
    settings |= {"optim": optimizer} if optimizer else {}  # the option `optim` has no effect then
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings["loss_kwargs"] = _harmless(asdict(args.objective))  # type: ignore[call-overload]  # with those left out
    return settings | {"trainer": trainer, "prompts per update": batch, "rewards": list(rewards)}


def _harmless(value: Any) -> Any:
    """Numbers and single words unchanged. Other text may be a path or a secret: its hash is enough to compare it."""
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
    """The entries of `LoraConfig.to_dict()` that decide what the adapter's weights compute, as JSON values."""
    kept = {name: value for name, value in config.items() if name not in OF_NO_ADAPTER}
    return json.loads(
        json.dumps(kept, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that affect a run's numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "diffusers-adjoint")}


def facts_to_go_on(checkpoint: Path, now: RunFacts) -> RunFacts:
    """The facts of a run that resumes from the checkpoint; warns of settings that differ.

    Args:
        checkpoint: a complete one. If it has no record, a new run begins.
        now: facts of this trainer.

    Returns:
        `now` with the id of the checkpoint's run.

    Raises:
        ValueError: if the checkpoint was written with another network.
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
            f"{checkpoint} was written with other settings ({found}); training uses the new ones, but the optimizer keeps "
            f"the learning rate and the other numbers that it has saved."
        )
    return replace(now, run=then.run)


def _as_named_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with one entry for each option of the objective, so that records of earlier versions can be compared.

    Earlier versions had fewer options, and the oldest had `adjoint_pairing` as a setting of its own.
    """
    known = {"pairing": settings["adjoint_pairing"]} if "adjoint_pairing" in settings else settings.get("loss_kwargs", {})
    return {**settings, **{f"loss_kwargs[{name!r}]": value for name, value in known.items()}, "loss_kwargs": None}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Differences in the entries that both have, as "a 1, now 2; b 3, now 4"; empty if there are none."""
    now = json.loads(json.dumps(now))
    changed = [name for name in then if name in now and then[name] != now[name]]
    return "; ".join(f"{name} {then[name]}, now {now[name]}" for name in changed)
