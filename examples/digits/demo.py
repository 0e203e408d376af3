"""Fine-tune a pipeline that draws handwritten digits on a reward, and show that its samples follow p_base·exp(λr).

    make demo                      # reward "ink": mean brightness, λ = 40
    make demo REWARD=three         # reward: log-probability of a three under a small classifier, λ = 1

Everything is offline and real: a StableDiffusion3Pipeline trained on scikit-learn's digits (`train_base.py`), the public
trainer, LoRA. Text is cut to one T5 token (`max_sequence_length=1`) in every call here, training, before, after and referee
alike: the default of 256 tokens gives as good digits at a dozen times the work.

Then the LoRA goes through `diffusers-adjoint evaluate`, on prompts that it was not trained on. Five sentences at the end say
what came out.

Writes to `--output`: before.png, after.png (same seeds), reward_curve.png, classes.png, tilt_report.md, the LoRA and evaluation/.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from data import OPEN_PROMPT, WORDS, read_digits
from datasets import Dataset
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from peft import LoraConfig
from pictures import save_class_shares, save_grid, save_reward_curve
from rewards import ink, three
from telling import TrainingBar, five_sentences, training_table
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, cli, memoryless_scheduler, path_kl
from diffusers_adjoint.metrics import TiltReport, pairwise_diversity, sample_mean, saturated_share, tilt_gap, tilt_shift
from diffusers_adjoint.model.denoiser import PipelineDenoiser
from diffusers_adjoint.model.paths import sample_trajectory
from diffusers_adjoint.replay import PipelineReplay

diffusers.utils.logging.set_verbosity_error()  # else each call prints a line about a prompt that was cut to one token

torch.set_num_threads(1)  # on tensors this small, a second thread can make it five times slower on a shared machine

HERE = Path(__file__).parent
CALL = {"guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "pt"}
STEPS = {"ODE": 20, "memoryless": 10}
BATCH = 250  # images in one call of the pipeline
# For each sampler. The target is estimated from the base's images, and has the larger error.
BASE_IMAGES, TUNED_IMAGES = 5000, 2000
LINEAR_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LINEAR_LAYERS += ["ff.net.0.proj", "ff.net.2", "proj_out"]


@dataclass(frozen=True)
class Task:
    """A reward and the settings that fine-tune the digits on it in a minute or two."""

    name: str
    reward: Callable[..., Tensor]
    reward_scale: float  # λ, nats per unit of reward
    steps: int  # K of the paths of training
    loss_steps: int  # S, steps of each path that carry the loss
    images: int  # images in a rollout
    updates: int
    rank: int
    learning_rate: float


def edges(images: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring pixels: a statistic that is not the reward."""
    down, right = images.diff(dim=2).abs().mean((1, 2, 3)), images.diff(dim=3).abs().mean((1, 2, 3))
    return down + right


def make_task(name: str) -> Task:
    if name == "ink":
        return Task("ink", ink, reward_scale=40.0, steps=7, loss_steps=4, images=64, updates=62, rank=8, learning_rate=3e-3)
    if name == "three":
        return Task("three", three, reward_scale=1.0, steps=10, loss_steps=5, images=96, updates=120, rank=16, learning_rate=6e-3)
    raise ValueError(f"REWARD={name!r} is unknown; pass 'ink' or 'three'.")


def load_pipeline() -> StableDiffusion3Pipeline:
    pipeline = DiffusionPipeline.from_pretrained(HERE / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusion3Pipeline, sampler: str, count: int, seed: int, label: str) -> Tensor:
    """`count` images of the open prompt by the pipeline's ordinary call, (count, 3, 32, 32) in [0, 1]."""
    if sampler == "memoryless":
        parts = pipeline.components | {"scheduler": memoryless_scheduler(pipeline.scheduler)}
        pipeline = type(pipeline)(**parts)
        pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in tqdm(range(0, count, BATCH), desc=f"{label}, {sampler}", unit_scale=BATCH, unit=" images"):
        generator = torch.Generator().manual_seed(seed + first)
        if sampler == "memoryless":
            pipeline.scheduler.set_generator(generator)  # this pipeline does not pass its generator on to the scheduler
        prompts = [OPEN_PROMPT] * min(BATCH, count - first)
        images.append(pipeline(prompts, num_inference_steps=STEPS[sampler], generator=generator, **CALL).images)
    return torch.cat(images)


def fine_tune(
    pipeline: StableDiffusion3Pipeline, task: Task, folder: Path, seed: int, pairing: str = "score"
) -> AdjointMatchingTrainer:
    """Fine-tune with the public trainer, on one prompt."""
    args = AdjointMatchingConfig(
        output_dir=str(folder),
        reward_scale=task.reward_scale,
        num_inference_steps=task.steps,
        num_loss_steps=task.loss_steps,
        num_generations=task.images,
        loss_kwargs={"pairing": pairing},
        pipeline_kwargs={"max_sequence_length": 1},
        per_device_train_batch_size=1,
        max_steps=task.updates,
        learning_rate=task.learning_rate,
        adam_beta2=0.99,
        max_grad_norm=0.0,  # no clipping: the loss is well behaved, and clipping slows the first updates
        lr_scheduler_type="linear",
        warmup_steps=5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # replaced by our own bar
        seed=seed,
        use_cpu=True,  # 2 MB of weights: a GPU would be no faster
    )
    trainer = AdjointMatchingTrainer(
        model=pipeline,
        reward_funcs=task.reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [OPEN_PROMPT] * task.updates}),
        callbacks=[TrainingBar()],
        peft_config=LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=LINEAR_LAYERS),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer


def measure_path_kl(trainer: AdjointMatchingTrainer, count: int, seed: int) -> Tensor:
    """KL(paths of the tuned model ‖ paths of the base), one value a path, nats; on the paths of memoryless images."""
    pipeline, steps = trainer.pipeline, STEPS["memoryless"]
    chain = memoryless_scheduler(pipeline.scheduler)
    replay = PipelineReplay(pipeline, chain, steps, pipeline_kwargs={"max_sequence_length": 1})
    denoiser = PipelineDenoiser(replay, trainer.denoiser.base_adapters)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    start, conditioning = replay.prepare({"prompt": [OPEN_PROMPT] * count}, generators)
    trajectory = sample_trajectory(denoiser, start, conditioning, generators)

    def base_mean(k: int, x: Tensor) -> Tensor:
        with denoiser.base():
            return denoiser(x, k, conditioning)

    return path_kl(lambda k, x: denoiser(x, k, conditioning), base_mean, trajectory)


@dataclass(frozen=True)
class Result:
    """The measurements of the demo."""

    report: TiltReport
    shares: dict[str, Tensor]  # digit classes read by the referee: before, target, after; each (10,), ODE
    rewards: list[float]  # mean reward of each update's rollouts
    seconds: float  # of fine-tuning


def run(task: Task, folder: Path, seed: int = 0, pairing: str = "score", base: dict[str, Tensor] | None = None) -> Result:
    """Sample the base, fine-tune, sample again with the same seeds, compare with the exact tilt."""
    pipeline = load_pipeline()
    base = base or draw_both(pipeline, BASE_IMAGES, "base")
    start = time.perf_counter()
    trainer = fine_tune(pipeline, task, folder, seed, pairing)
    seconds = time.perf_counter() - start
    print(f"\n{training_table(trainer.state.log_history)}")
    tuned = draw_both(pipeline, TUNED_IMAGES, "fine-tuned")

    rewards = {key: (task.reward(base[key], []), task.reward(tuned[key], [])) for key in STEPS}
    log_weights = {key: task.reward_scale * rewards[key][0] for key in STEPS}
    shifts = [tilt_shift(f"reward ({task.name})", key, *rewards[key], log_weights[key]) for key in STEPS]
    shifts += [tilt_shift("edges", key, edges(base[key]), edges(tuned[key]), log_weights[key]) for key in STEPS]
    gap = tilt_gap(
        log_weights["memoryless"],
        task.reward_scale * rewards["memoryless"][1],
        measure_path_kl(trainer, 500, seed=10_000),
    )
    before, after = base["ODE"], tuned["ODE"]
    other = {
        "diversity (mean squared pixel distance)": (diversity(before), diversity(after)),
        "share of saturated pixels": (sample_mean(saturated_share(before)), sample_mean(saturated_share(after))),
    }
    shares = {
        "before": class_shares(before),
        "target": class_shares(before, log_weights["ODE"].softmax(0)),
        "after": class_shares(after),
    }
    save_grid(before[:60], folder / "before.png")
    save_grid(after[:60], folder / "after.png")
    curve = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return Result(TiltReport(shifts, gap, other), shares, curve, seconds)


def draw_both(pipeline: StableDiffusion3Pipeline, count: int, label: str) -> dict[str, Tensor]:
    """Images of both samplers from fixed seeds, so that tuned and base images correspond one to one."""
    return {sampler: draw(pipeline, sampler, count, seed=20_000, label=label) for sampler in STEPS}


def diversity(images: Tensor) -> object:
    small = torch.nn.functional.avg_pool2d(images[:, :1], 4)
    return pairwise_diversity(small.flatten(1)[None])


def class_shares(images: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of each digit, read by the referee, optionally under importance weights."""
    weights = torch.full((len(images),), 1 / len(images)) if weights is None else weights
    return torch.bincount(read_digits(images), weights=weights.double(), minlength=10)


def check_saved_lora(folder: Path) -> str:
    """Load the LoRA into a fresh pipeline, as a user would, and sample."""
    fresh = load_pipeline()

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return fresh([OPEN_PROMPT] * 16, num_inference_steps=10, generator=generator, **CALL).images

    base = images()
    fresh.load_lora_weights(folder)
    tuned = images()
    if torch.equal(base, tuned):
        raise RuntimeError(f"the LoRA in {folder} changes nothing in a fresh pipeline.")
    return f"LoRA loaded into a fresh pipeline: mean brightness {base.mean():.4f} → {tuned.mean():.4f} over 16 images."


def evaluate(task: Task, folder: Path) -> None:
    """The command `diffusers-adjoint evaluate`, on the ten prompts that name a digit; prints its table, draws contact sheets."""
    rewards = [f"{HERE}/rewards.py:{name}" for name in dict.fromkeys([task.name, "ink", "as_asked"])]
    options = {
        "model_name_or_path": HERE / "pipeline",
        "adapter": folder,
        "dataset_name": HERE / "prompts.txt",
        "reward_funcs": rewards,
        "num_inference_steps": [10, 40],
        "sampler": ["ode", "sde"],
        "guidance_scale": [1, 4],
        "num_generations_eval": 10,
        "pipeline_kwargs": '{"max_sequence_length": 1}',
        "output_dir": folder / "evaluation",
        "overwrite_output_dir": True,
        "sheet_prompts": 4,
        "sheet_samples": 8,
    }
    words = [[f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in options.items()]
    if cli.main(["evaluate", *sum(words, [])]):
        raise RuntimeError("diffusers-adjoint evaluate ended with an error.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default=os.environ.get("REWARD", "ink"), help="ink or three")
    parser.add_argument("--output", type=Path, default=Path("out/digits"), help="folder for pictures, report and LoRA")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    task = make_task(arguments.reward)
    folder = arguments.output / task.name
    folder.mkdir(parents=True, exist_ok=True)

    result = run(task, folder, arguments.seed)
    target = next(shift.target.mean for shift in result.report.shifts if shift.sampler == "memoryless")
    save_reward_curve(result.rewards, target, folder / "reward_curve.png", task.name)
    save_class_shares(result.shares, folder / "classes.png")
    shares = "\n".join(f"{name:>7} " + " ".join(f"{share:.3f}" for share in row) for name, row in result.shares.items())
    text = f"{result.report.format()}\n\nclasses {' '.join(f'{word:>5}' for word in WORDS)}\n{shares}\n"
    (folder / "tilt_report.md").write_text(text, encoding="utf-8")
    print(f"\nTilt report, reward {task.name!r}, λ = {task.reward_scale:g}; fine-tuning took {result.seconds:.0f} s\n\n{text}")
    print(check_saved_lora(folder))
    evaluate(task, folder)
    print("\n" + "\n".join(five_sentences(task.name, result.report, result.shares)))
    print(f"\n{folder / 'classes.png'} shows the digits that the referee read, {folder / 'before.png'} and after.png the images.")
    print(f"Report and LoRA are in {folder}/, sheets of the evaluation in {folder / 'evaluation' / 'sheets'}/")


if __name__ == "__main__":
    main()
