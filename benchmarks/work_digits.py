"""The digits demo's pipeline through the public trainer, and how much of the tilt's shift its samples show."""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from work_count import WorkCount
from work_kept import Kept

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, memoryless_scheduler
from diffusers_adjoint.model.denoiser import PipelineDenoiser
from diffusers_adjoint.model.paths import sampled_path_kl
from diffusers_adjoint.replay import PipelineReplay

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "digits"))

import demo  # noqa: E402

BASE_SEED, PATH_SEED, PATHS = 20_000, 10_000, 500
BASE_TIMES = 12  # base samples for each tuned one: the referee's error is that of all rows
CHUNK = 2000  # a multiple of the demo's batch, so that the seeds go on
ONE_TOKEN = {"max_sequence_length": 1}
COMMON = {
    "pipeline_kwargs": ONE_TOKEN,
    "per_device_train_batch_size": 1,
    "adam_beta2": 0.99,
    "max_grad_norm": 0.0,
    "warmup_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "probe_base": False,
    "use_cpu": True,
}
"""Settings of every run on the digits."""
CACHE = ROOT / "build" / "work"
"""Of the rewards of base samples, which take minutes to draw and are the same each time."""


class CountedTrainer(AdjointMatchingTrainer):
    """The public trainer; `work` counts what its updates evaluate."""

    work: WorkCount

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        with self.work.counting():
            return super().training_step(*arguments, **options)


def run(setting: Any) -> dict[str, Any]:
    """Train, sample, compare with the tilt of the base."""
    task = demo.make_task(setting.problem.removeprefix("digits-"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setting, task, folder)
        if setting.per_rollout > 1:
            trainer.method = Kept(trainer.method, setting.per_rollout)
        trainer.train()
    capped = [line["capped"] for line in trainer.state.log_history if "capped" in line]
    return {
        "work": trainer.work.total,
        "capped": mean(capped) if capped else None,  # share of the shifts that the cap has shortened
        **measure(trainer, task, setting.samples),
    }


def make_trainer(setting: Any, task: demo.Task, folder: str) -> CountedTrainer:
    """As the demo's `fine_tune`, with the setting's numbers."""
    trainer = CountedTrainer(
        model=demo.load_pipeline(),
        reward_funcs=task.reward,
        args=AdjointMatchingConfig(
            output_dir=folder,
            reward_scale=task.reward_scale,
            num_inference_steps=setting.steps,
            num_loss_steps=setting.loss_steps,
            num_generations=setting.batch,
            loss_type=setting.loss_type,
            loss_kwargs=setting.loss_kwargs,
            max_steps=setting.updates,
            learning_rate=setting.learning_rate,
            lr_scheduler_type="linear",
            logging_steps=1,
            seed=setting.seed,
            **COMMON,
        ),
        train_dataset=Dataset.from_dict({"prompt": [demo.OPEN_PROMPT] * setting.updates}),
        peft_config=LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=demo.LINEAR_LAYERS),
    )
    trainer.work = WorkCount(trainer.denoiser.network)
    return trainer


def measure(trainer: CountedTrainer, task: demo.Task, count: int) -> dict[str, Any]:
    """Share of the shift by both samplers, and the distance to the tilt in nats by the memoryless one.

    The referee's numbers are the same for all rows: the relative error of target − before, and log Z.
    """
    base, found, referee = base_rewards(BASE_TIMES * count)[task.name], {}, {}
    for sampler, before in base.items():
        images = demo.draw(trainer.pipeline, sampler, count, BASE_SEED, "fine-tuned")
        moved = task.reward(images, []) - before[:count]
        weights = (task.reward_scale * before.double()).softmax(0)
        shift = weights @ before.double() - before.double().mean()
        share, error = moved.double().mean() / shift, moved.double().std() / count**0.5 / shift
        found[sampler] = {
            "share": float(share),
            "error": float(error),
            "before": float(before.mean()),
            "moved": float(moved.mean()),
        }
        referee[sampler] = {"shift": float(shift), "error": float(shift_error(before.double(), weights) / shift)}
    exponent = task.reward_scale * (found["memoryless"]["before"] + found["memoryless"]["moved"])
    kl, log_z = path_kl(trainer), log_normalizer(task.reward_scale * base["memoryless"].double())
    gap = {"gap": log_z[0] - (exponent - float(kl.mean())), "error": float(kl.std()) / PATHS**0.5}
    return {
        "samplers": found,
        "nats": {**gap, "kl": float(kl.mean()), "log_z": log_z[0], "log_z_error": log_z[1]},
        "referee": referee,
    }


def shift_error(values: Tensor, weights: Tensor) -> Tensor:
    """Standard error of Σ w_i f_i − mean f, self-normalised weights of one sample, (N,) each; by the delta method."""
    target, before = weights @ values, values.mean()
    return (weights * (values - target) - (values - before) / len(values)).norm()


def log_normalizer(exponents: Tensor) -> tuple[float, float]:
    """log mean e^{λr} of base samples, (N,), and its standard error, nats."""
    weights = (exponents - exponents.max()).exp()
    value = exponents.max() + weights.mean().log()
    return float(value), float(weights.std() / len(weights) ** 0.5 / weights.mean())


def path_kl(trainer: CountedTrainer) -> Tensor:
    """KL of `PATHS` memoryless paths of the tuned model, (PATHS,), nats, on the chain that samples, whichever trained."""
    replay = PipelineReplay(
        trainer.pipeline,
        memoryless_scheduler(trainer.pipeline.scheduler, integrator="posterior"),
        demo.STEPS["memoryless"],
        pipeline_kwargs=ONE_TOKEN,
    )
    denoiser = PipelineDenoiser(replay, trainer.denoiser.base_adapters)
    generators = [torch.Generator().manual_seed(PATH_SEED + i) for i in range(PATHS)]
    with torch.no_grad():
        start, conditioning = replay.prepare({"prompt": [demo.OPEN_PROMPT] * PATHS}, generators)
        return sampled_path_kl(denoiser, start, conditioning, generators)


@cache
def base_rewards(count: int) -> dict[str, dict[str, Tensor]]:
    """Reward → sampler → rewards of `count` samples of the base, (count,); drawn once, then read from `CACHE`."""
    path = CACHE / f"base-{count}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(draw_base(count), path)
    return torch.load(path)


def draw_base(count: int) -> dict[str, dict[str, Tensor]]:
    pipeline, tasks = demo.load_pipeline(), [demo.make_task(name) for name in ("ink", "three")]
    drawn = {task.name: {sampler: [] for sampler in demo.STEPS} for task in tasks}
    for sampler in demo.STEPS:
        for first in range(0, count, CHUNK):
            with torch.no_grad():
                images = demo.draw(pipeline, sampler, min(CHUNK, count - first), BASE_SEED + first, "base")
                for task in tasks:
                    drawn[task.name][sampler].append(task.reward(images, []))
    return {name: {sampler: torch.cat(parts) for sampler, parts in found.items()} for name, found in drawn.items()}
