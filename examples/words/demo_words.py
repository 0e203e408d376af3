"""Fine-tune a pipeline that draws words on what a text recogniser reads, and ask a recogniser that was never trained on.

    make words

or, in one process, `python examples/words/demo_words.py`, which takes twice as long.

Everything is offline and real: a CogView4Pipeline trained from scratch to spell about half of its words right
(`train_speller.py`), the reward log p(word) of PP-OCRv4, the public trainer, LoRA. PP-OCRv6 judges, and Tesseract where it is
installed. 18 of the 39 words are held out: no prompt of training names them.

Writes to a folder in `--output` that is named by updates and seed: trained.png and held_out.png (base above fine-tuned, same
noise), report.md, the LoRA with its model card, and `samples/`, images of the training. A run that was stopped goes on from its
last checkpoint, of which there is one every ten updates.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import CogView4Pipeline
from drawn import GROUPS, SIZE, STEPS, Pictures, draw_and_judge, load_pipeline
from peft import LoraConfig
from recognisers import recogniser
from spelling import spelling
from transformers.trainer_utils import get_last_checkpoint
from word_pictures import TUNED_WORDS, prompt
from words_report import write_report

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer

LINEAR_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "patch_embed.proj", "proj_out"]
SEED = 30_000
MICRO_BATCH = 32  # images at a time; a larger one is a little faster and takes more memory


@dataclass(frozen=True)
class Settings:
    """Of one fine-tuning."""

    reward_scale: float = 1.0  # λ; with 1 the target is Bayes' posterior: p_base(image)·p(word | image)
    updates: int = 60
    images: int = 64  # an update, each of a prompt of its own
    steps: int = 6  # K
    loss_steps: int = 3  # S
    rank: int = 16
    learning_rate: float = 3e-3
    seed: int = 0


def images_of_a_process(settings: Settings) -> int:
    """In an update.

    Raises:
        ValueError: the processes cannot have as many each.
    """
    processes = PartialState(cpu=True).num_processes
    if settings.images % processes:
        raise ValueError(
            f"{processes} processes cannot share {settings.images} images equally; start another number of processes."
        )
    return settings.images // processes


def make_trainer(
    pipeline: CogView4Pipeline,
    settings: Settings,
    folder: Path,
    trainer_class: type[AdjointMatchingTrainer] = AdjointMatchingTrainer,
    **options: object,
) -> AdjointMatchingTrainer:
    """The public trainer on the words of `TUNED_WORDS`; `options` are fields of its config."""
    images = images_of_a_process(settings)
    batch = max(size for size in range(1, min(MICRO_BATCH, images) + 1) if images % size == 0)
    given = {
        "output_dir": str(folder),
        "reward_scale": settings.reward_scale,
        "num_inference_steps": settings.steps,
        "num_loss_steps": settings.loss_steps,
        "integrator": "posterior",  # of 6 steps: those of "ancestral" spell better than what is drawn later (docs/results.md)
        "num_generations": 1,
        "pipeline_kwargs": SIZE,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": images // batch,
        "max_steps": settings.updates,
        "learning_rate": settings.learning_rate,
        "adam_beta2": 0.99,
        "max_grad_norm": 0.0,  # no clipping: the loss is well behaved, and clipping slows the first updates
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "logging_steps": 10,
        "save_steps": 10,
        "save_total_limit": 1,
        "report_to": "none",
        "seed": settings.seed,
        "use_cpu": True,  # 4 MB of weights: a GPU would wait for Python
    }
    prompts = [prompt(word) for word in TUNED_WORDS]
    return trainer_class(
        model=pipeline,
        reward_funcs=spelling,
        args=AdjointMatchingConfig(**given | options),
        train_dataset=Dataset.from_dict({"prompt": prompts * -(-settings.images * settings.updates // len(prompts))}),
        peft_config=LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=LINEAR_LAYERS),
    )


BASE_IMAGES = {
    "memoryless": 320,
    "ODE": 32,
}  # of each word; of the first eight words they count as about 120 of the target, or more
TUNED_IMAGES = {"memoryless": 160, "ODE": 32}


def draw_all(pipeline: CogView4Pipeline, words: int, label: str, per_word: dict[str, int]) -> Pictures:
    """Images of each group's first words with each sampler, and what is said of them. Each process draws a part of the groups."""
    state, drawn = PartialState(cpu=True), []
    with state.split_between_processes(list(GROUPS)) as names:
        for name in names:
            for sampler in STEPS:
                shown = f"{label}, {name} words" if state.is_main_process else ""
                found = draw_and_judge(pipeline, GROUPS[name][:words], per_word[sampler], sampler, SEED, shown)
                drawn.append(((name, sampler), found))
    return dict(gather_object(drawn))


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """For argparse."""

    def read(text: str) -> int:
        if not (text.isdecimal() and lowest <= int(text) <= highest):
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {lowest} to {highest}")
        return int(text)

    return read


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/words"), help="folder for pictures, report and LoRA")
    parser.add_argument("--updates", type=whole_number(1, 10_000), default=Settings.updates, help="fewer for a trial run")
    words = min(map(len, GROUPS.values()))
    parser.add_argument("--words", type=whole_number(1, words), default=8, help="of either group, to measure")
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0)
    return parser.parse_args()


def fine_tune(pipeline: CogView4Pipeline, settings: Settings, folder: Path) -> str:
    """Trains, from the last checkpoint in the folder if there is one, and saves the LoRA; returns what was done, in words."""
    checkpoint, start = get_last_checkpoint(folder), time.perf_counter()
    trainer = make_trainer(pipeline, settings, folder)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    minutes = (time.perf_counter() - start) / 60
    done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    part = f"the updates after number {done}, where an earlier start was stopped," if done else "fine-tuning"
    run = f"λ = {settings.reward_scale:g}, {settings.updates} updates of {settings.images} images, seed {settings.seed}"
    processes = PartialState().num_processes
    return f"{run}; {part} took {minutes:.1f} minutes in {processes} process{'es' * (processes > 1)}."


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    settings = Settings(updates=arguments.updates, seed=arguments.seed)
    # A folder of its own: another run must not go on from this one's checkpoints.
    folder = arguments.output / f"{settings.updates}-updates-seed-{settings.seed}"
    try:
        recogniser("v4"), recogniser("v6"), images_of_a_process(settings)
        folder.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{error}")

    pipeline = load_pipeline()
    base = draw_all(pipeline, arguments.words, "base", BASE_IMAGES)
    title = fine_tune(pipeline, settings, folder)
    tuned = draw_all(pipeline, arguments.words, "fine-tuned", TUNED_IMAGES)
    if PartialState().is_main_process:
        write_report(folder, base, tuned, settings.reward_scale, title)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # else the next run would go on from it


if __name__ == "__main__":
    main()
