"""The evaluation: every process takes its share of the prompts, the main one writes tables and sheets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..inputs import collate_columns, first_row, without_prompt
from ..replay import PipelineReplay
from ..rewards import WeightedReward
from ..rollout import Stream, seeded_generators
from ..schedulers import memoryless_scheduler
from .arguments import DTYPES, EvaluationArguments
from .measure import Features, Setting, Settings, measure
from .models import BASE, Model, load_models
from .report import Report, make_report
from .sheets import SheetRow, contact_sheet, strip
from .store import Results, Store

__all__ = ["evaluate", "process_state"]

# The numbers do not depend on these.
FREE = ("output_dir", "overwrite_output_dir", "batch_size", "reward_scale", "reward_weights", "prompts", "num_prompts")


def evaluate(args: EvaluationArguments, reward: WeightedReward, features: dict[str, Features], dataset: Any) -> Report:
    """Sample, measure, write results.md, .json, .csv and sheets/ into `args.output_dir`; goes on where it was interrupted.

    Args:
        reward: whose functions are measured.
        features: name → features for diversity; modules among them are moved to the device.
        dataset: rows with a prompt each.

    Returns:
        The report, on every process.

    Raises:
        ValueError: for models that cannot be loaded, columns that do not fit, or an output_dir with another evaluation.
    """
    state = process_state()
    rows = _rows(dataset, args.num_prompts)
    store = Store(Path(args.output_dir), args.settings)
    if state.is_main_process:
        store.open(_options(args), args.overwrite_output_dir)
    state.wait_for_everyone()
    mine = [i for i in range(len(rows)) if i % state.num_processes == state.process_index]
    todo = [i for i in mine if not store.has(i, _text(rows[i]))]
    if todo:
        _measure_all(args, reward.to(state.device), features, rows, store, mine, todo)
    state.wait_for_everyone()
    results = [store.read(i) for i in range(len(rows))]
    weights = dict(zip(reward.names, reward.weights, strict=True))
    report = make_report(results, reward_scale=args.reward_scale, weights=weights)
    if state.is_main_process:
        _write(args, store, report, rows, results)
    state.wait_for_everyone()
    return report


def process_state() -> PartialState:
    """This process among those that a launcher started; without being told of the CPU, it would take itself for the only one."""
    return PartialState() if torch.accelerator.is_available() else PartialState(cpu=True)


def _rows(dataset: Any, count: int | None) -> list[dict[str, Any]]:
    rows = list(dataset if count is None else dataset.take(count))
    for number, row in enumerate(rows):
        if "prompt" in row and not isinstance(row["prompt"], str):
            found = type(row["prompt"]).__name__
            raise ValueError(f"row {number + 1} of the prompts has a prompt of type {found}; write a string there.")
    return rows


def _options(args: EvaluationArguments) -> dict[str, Any]:
    """What the numbers of a prompt depend on, as JSON keeps it."""
    stamps = {name: _file_stamps(Path(name)) for name in args.adapter}
    return {name: value for name, value in asdict(args).items() if name not in FREE} | {"weights": stamps}


def _text(row: dict[str, Any]) -> str:
    return str(row.get("prompt", ""))


def _file_stamps(folder: Path) -> list[list[Any]]:
    """Size and time of the weights: a model trained anew is another model."""
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _measure_all(
    args: EvaluationArguments,
    reward: WeightedReward,
    features: dict[str, Features],
    rows: list[dict[str, Any]],
    store: Store,
    mine: list[int],
    todo: list[int],
) -> None:
    """All models and settings of the prompts that are left to this process, prompt by prompt."""
    state = process_state()
    for function in features.values():
        module = getattr(function, "__self__", function)  # the module of a method `features`
        if isinstance(module, nn.Module):
            module.to(state.device)
    settings = Settings(args.samples_per_prompt, args.batch_size, args.kl_paths, args.seed, reward, features)
    init_kwargs = {"dtype": DTYPES[args.dtype], "revision": args.model_revision}
    models = load_models(args.model, args.adapter, init_kwargs, args.trained_component, state.device)
    replay_of = _replays(args, models, rows[todo[0]], reward)
    images = len(args.settings) * len(models) * settings.samples
    with tqdm(
        total=images * len(mine), initial=images * (len(mine) - len(todo)), unit="image", disable=not state.is_main_process
    ) as bar:
        for prompt in todo:
            row = collate_columns([rows[prompt]])
            results: Results = {}
            strips: dict[tuple[Setting, str], Image.Image] = {}
            for setting in args.settings:
                results[setting] = {}
                for model in models:
                    bar.set_description(f"prompt {prompt + 1}, {setting}, {model.name}")
                    measured, shown = measure(model, models[0], replay_of(model, setting), setting, settings, row, prompt)
                    results[setting][model.name] = measured
                    if prompt < args.sheet_prompts and (drawn := strip(shown[: args.sheet_samples])) is not None:
                        strips[setting, model.name] = drawn
                    bar.update(settings.samples)
            store.write(prompt, _text(rows[prompt]), results, strips)


def _replays(
    args: EvaluationArguments, models: list[Model], row: dict[str, Any], reward: WeightedReward
) -> Callable[[Model, Setting], PipelineReplay]:
    """One for each pipeline, number of steps and guidance scale; checked against a row before anything is sampled."""
    made: dict[tuple[int, int, float], PipelineReplay] = {}
    columns = collate_columns([row])
    asked = reward.require_arguments(without_prompt(columns))
    for model in models:
        for setting in args.settings:
            key = (id(model.pipeline), setting.steps, setting.guidance)
            if key in made:
                continue
            made[key] = PipelineReplay(
                model.pipeline,
                memoryless_scheduler(model.pipeline.scheduler, args.integrator),
                setting.steps,
                guidance_scale=setting.guidance,
                pipeline_kwargs=cast("dict[str, Any] | None", args.pipeline_kwargs),
                component=args.trained_component,
            )
            first_row([row], "prompts", made[key].arguments.takes_prompt)
            made[key].arguments.require_known(columns, asked)
            made[key].arguments(columns, 1)
            if model.name != BASE and args.kl_paths and "sde" in args.sampler:
                made[key].find_state(columns, seeded_generators(args.seed, 0, [0], Stream.EVALUATION_START))
    return lambda model, setting: made[id(model.pipeline), setting.steps, setting.guidance]


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
                    drawn.append(SheetRow(_text(rows[prompt]) or f"row {prompt + 1}", _caption(model, measured.rewards), shown))
        if drawn:
            folder.mkdir(exist_ok=True)
            files.append(folder / f"{setting}.png")
            contact_sheet(f"{setting}: same seeds, {BASE} above fine-tuned", drawn).save(files[-1])
    return files


def _caption(model: str, rewards: dict[str, list[float]]) -> str:
    means = {name: sum(values) / len(values) for name, values in rewards.items()}
    return f"{model}: " + ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())
