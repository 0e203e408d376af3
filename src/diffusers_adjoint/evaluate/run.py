"""Run an evaluation: every process takes its share of the prompts, and the main process writes tables and contact sheets."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.columns import collate_columns, first_row, without_prompt
from ..data.prompts import require_prompt_strings
from ..model.randomness import Stream, seeded_generators
from ..pictures.grid import strip
from ..replay import PipelineReplay
from ..rewards import WeightedReward
from ..schedulers import memoryless_scheduler
from .arguments import EvaluationArguments
from .measure import Features, Plan, Prompt, Setting, Subject, measure
from .models import BASE, Model, load_models
from .report import Report, make_report, title_of
from .sheets import SheetRow, contact_sheet
from .store import Results, Store

__all__ = ["evaluate", "process_state"]

# Options on which the numbers do not depend.
FREE = ["output_dir", "overwrite_output_dir", "batch_size", "reward_scale", "reward_weights", "reward_workers"]
FREE += ["dataset_name", "dataset_streaming", "num_prompts", "sheet_prompts", "sheet_samples"]  # rows are compared one by one
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
HOSTS = [logging.getLogger(name) for name in ("diffusers", "transformers")]


def evaluate(args: EvaluationArguments, reward: WeightedReward, features: dict[str, Features], dataset: Any) -> Report:
    """Sample, measure, and write results.md, .json, .csv and sheets/ into `args.output_dir`.

    An evaluation that was interrupted continues with the prompts that are not finished.

    Args:
        args: the options.
        reward: the weighted reward functions.
        features: name → features for diversity; modules among them are moved to the device.
        dataset: rows with a prompt each.

    Returns:
        The report, on every process.

    Raises:
        ValueError: if a model cannot be loaded, the dataset's columns do not fit, output_dir holds another evaluation, or
            there is a reward scale but no fine-tuned model.
    """
    if args.reward_scale is not None and not args.adapter:
        raise ValueError(
            f"reward_scale={args.reward_scale:g} is for a report on a fine-tuned model, but training has left none in "
            f"output_dir={args.output_dir!r}; pass adapter."
        )
    state = process_state()
    rows = _rows(dataset, args.num_prompts)
    store = Store(Path(args.output_dir), args.settings)
    if state.is_main_process:
        store.open(options_of(args), args.overwrite_output_dir)
    state.wait_for_everyone()
    left = [i for i, row in enumerate(rows) if not store.has(i, row)]
    state.wait_for_everyone()  # before a process finishes its first prompt: all must divide the same list
    mine = left[state.process_index :: state.num_processes]
    if mine:
        with each_once(HOSTS):
            _measure_all(args, reward.to(state.device), features, rows, store, mine)
    state.wait_for_everyone()
    results = [store.read(i) for i in range(len(rows))]
    weights = dict(zip(reward.names, reward.weights, strict=True))
    report = make_report(results, reward_scale=args.reward_scale, weights=weights)
    if state.is_main_process:
        with store.writing():
            _write(args, store, report, rows, results)
    state.wait_for_everyone()
    return report


def process_state() -> PartialState:
    """This process among those that a launcher started. On the CPU, accelerate sees the others only if told to use it."""
    # A process that has finished waits for the slowest one, perhaps for hours.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


@contextmanager
def each_once(loggers: Sequence[logging.Logger]) -> Iterator[None]:
    """Within this context each message of these loggers is shown once; a warning of a cut prompt would come with each image."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_first = message not in said
        said.add(message)
        return is_first

    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def _rows(dataset: Any, count: int | None) -> list[dict[str, Any]]:
    rows = list(dataset if count is None else dataset.take(count))
    require_prompt_strings(row["prompt"] for row in rows if "prompt" in row)
    return rows


def options_of(args: EvaluationArguments) -> dict[str, Any]:
    """The options on which the numbers of a prompt depend, as JSON values."""
    named = [name.rpartition(":")[0] for name in [*args.reward_funcs, *args.diversity]]
    sources = [args.model_name_or_path, *args.adapter, *named]
    files = {name: stamps for name in sources if name and (stamps := _stamps(Path(name)))}
    return {name: value for name, value in asdict(args).items() if name not in FREE} | {"files": files}


def _stamps(path: Path) -> list[list[Any]]:
    """Size and time of a local file, or of the weights in a folder, to notice a model that was trained again."""
    weights = sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS) if path.is_dir() else []
    files = [path] if path.is_file() else weights
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _measure_all(
    args: EvaluationArguments,
    reward: WeightedReward,
    features: dict[str, Features],
    rows: list[dict[str, Any]],
    store: Store,
    mine: list[int],
) -> None:
    """Measure all models and settings on this process's prompts, prompt by prompt."""
    state = process_state()
    for function in features.values():
        module = getattr(function, "__self__", function)  # the module of a method `features`
        if isinstance(module, nn.Module):
            module.to(state.device)
    plan = Plan(args.num_generations_eval, args.batch_size, args.kl_paths, args.seed, reward, features)
    models = load_models(args.model_name_or_path, args.adapter, args.init_kwargs, args.trained_component, state.device)
    subjects = _subjects(args, models, rows[mine[0]], reward)
    count = len(subjects) * plan.samples
    with tqdm(total=count * len(mine), unit="image", disable=not state.is_main_process) as bar, logging_redirect_tqdm(HOSTS):
        for number in mine:
            shown = args.sheet_samples if number < args.sheet_prompts else 0
            prompt = Prompt(number, collate_columns([rows[number]]), shown)
            results: Results = {setting: {} for setting in args.settings}
            strips: dict[tuple[Setting, str], Image.Image] = {}
            for subject in subjects:
                setting, name = subject.setting, subject.model.name
                bar.set_description(f"prompt {number + 1}, {setting}, {name}")
                results[setting][name], images = measure(subject, prompt, plan)
                if shown and (drawn := strip(images)) is not None:
                    strips[setting, name] = drawn
                bar.update(plan.samples)
            with store.writing():
                store.write(number, rows[number], results, strips)


def _subjects(args: EvaluationArguments, models: list[Model], row: dict[str, Any], reward: WeightedReward) -> list[Subject]:
    """All models, the base first, for each setting; the first row is checked against all of them before anything is sampled."""
    # Key: pipeline, number of steps and guidance scale. Models that differ by an adapter share a replay, and so do samplers.
    made: dict[tuple[int, int, float], PipelineReplay] = {}
    columns = collate_columns([row])
    for model in models:
        for setting in args.settings:
            key = (id(model.pipeline), setting.steps, setting.guidance)
            if key in made:
                continue
            made[key] = PipelineReplay(
                model.pipeline,
                memoryless_scheduler(model.pipeline.scheduler, args.sampling_integrator),
                setting.steps,
                guidance_scale=setting.guidance,
                pipeline_kwargs=cast("dict[str, Any] | None", args.pipeline_kwargs),
                component=args.trained_component,
            )
            first_row([row], "dataset", made[key].arguments.takes_prompt)
            asked = reward.require_arguments(without_prompt(columns), with_audio=made[key].makes_audio)
            made[key].arguments.require_known(columns, asked)
            made[key].arguments(columns, 1)
            if len(models) > 1 and args.kl_paths and "sde" in args.sampler:
                made[key].find_state(columns, seeded_generators(args.seed, 0, [0], Stream.EVALUATION_START))
    return [
        Subject(model, models[0], setting, made[id(model.pipeline), setting.steps, setting.guidance])
        for setting in args.settings
        for model in models
    ]


def _write(args: EvaluationArguments, store: Store, report: Report, rows: list[dict[str, Any]], results: list[Results]) -> None:
    folder = store.folder
    pictures = _sheets(args, store, rows, results)
    text = report.markdown() + "".join(f"\n![{file.stem}](sheets/{file.name})\n" for file in pictures)
    for name, content in {"results.md": text, "results.json": report.json(), "results.csv": report.csv()}.items():
        (folder / name).write_text(content, encoding="utf-8")


def _sheets(args: EvaluationArguments, store: Store, rows: list[dict[str, Any]], results: list[Results]) -> list[Path]:
    """A contact sheet for each setting."""
    folder, files = store.folder / "sheets", []
    for setting in args.settings:
        drawn = []
        for prompt in range(min(args.sheet_prompts, len(rows))):
            for model, measured in results[prompt][setting].items():
                shown = store.read_strip(prompt, setting, model)
                if shown is not None:
                    text = rows[prompt].get("prompt") or f"row {prompt + 1}"
                    drawn.append(SheetRow(prompt, text, _caption(model, measured.rewards), shown))
        if drawn:
            folder.mkdir(exist_ok=True)
            files.append(folder / f"{setting}.png")
            contact_sheet(f"{title_of(setting)}: same seeds, {BASE} above fine-tuned", drawn).save(files[-1])
    return files


def _caption(model: str, rewards: dict[str, list[float]]) -> str:
    known = {name: [value for value in values if math.isfinite(value)] for name, values in rewards.items()}
    means = [f"{name} {sum(values) / len(values):.4g}" for name, values in known.items() if values]
    return f"{model if model == BASE else f'tuned ({model})'}: {', '.join(means)}"
