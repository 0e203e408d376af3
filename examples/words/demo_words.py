"""Fine-tune a pipeline that draws words on what a text recogniser reads, and ask a recogniser that was never trained on.

    make words

or, in one process, `python examples/words/demo_words.py`, which takes twice as long.

Everything is offline and real: a CogView4Pipeline trained from scratch to spell about half of its words right
(`train_speller.py`), the reward log p(word) of PP-OCRv4, the public trainer, LoRA. PP-OCRv6 judges, and Tesseract where it is
installed. Half of the words are held out: no prompt of training names them.

Writes to `--output`: trained.png and held_out.png (base above fine-tuned, same seeds), report.md, the LoRA.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import CogView4Pipeline
from drawn import (
    SIZE,
    STEPS,
    Drawn,
    compare,
    draw_and_judge,
    find_shift,
    font_shares,
    load_pipeline,
    percent,
)
from peft import LoraConfig
from recognisers import recogniser
from sheets import save_pairs
from spelling import spelling
from torch import Tensor
from word_pictures import FONTS, HELD_OUT_WORDS, TUNED_WORDS, prompt

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer
from diffusers_adjoint.metrics import TiltReport, markdown_table

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


def make_trainer(
    pipeline: CogView4Pipeline,
    settings: Settings,
    folder: Path,
    trainer_class: type[AdjointMatchingTrainer] = AdjointMatchingTrainer,
    **options: object,
) -> AdjointMatchingTrainer:
    """The public trainer on the words of `TUNED_WORDS`; `options` are fields of its config."""
    images = settings.images // PartialState(cpu=True).num_processes  # of this process, an update
    batch = min(MICRO_BATCH, images)
    given = {
        "output_dir": str(folder),
        "reward_scale": settings.reward_scale,
        "num_inference_steps": settings.steps,
        "num_loss_steps": settings.loss_steps,
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
        "logging_steps": 1,
        "save_strategy": "no",
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


GROUPS = {"trained": TUNED_WORDS, "held out": HELD_OUT_WORDS}
BASE_IMAGES = {"memoryless": 320, "ODE": 32}  # of each word: the tilt needs 100 effective ones, and weighs down about 60 %
TUNED_IMAGES = {"memoryless": 160, "ODE": 32}


def draw_all(pipeline: CogView4Pipeline, words: int, label: str, per_word: dict[str, int]) -> dict[tuple[str, str], Drawn]:
    """(group, sampler) → images of the group's first words, and what is said of them. Each process draws a part of the groups."""
    state, drawn = PartialState(cpu=True), []
    with state.split_between_processes(list(GROUPS)) as names:
        for name in names:
            for sampler in STEPS:
                shown = f"{label}, {name} words" if state.is_main_process else ""
                found = draw_and_judge(pipeline, GROUPS[name][:words], per_word[sampler], sampler, SEED, shown)
                drawn.append(((name, sampler), found))
    return dict(gather_object(drawn))


def sentences(reports: dict[tuple[str, str], TiltReport], fonts: dict[str, Tensor], words: int) -> list[str]:
    """What came out, in words."""
    trained, held_out = (reports[name, "memoryless"] for name in GROUPS)
    ode = reports["trained", "ODE"]

    def shares(report: TiltReport, statistic: str) -> str:
        shift = find_shift(report, statistic)
        return f"{percent(shift.before)} before and {percent(shift.after)} after"

    reward, judge = (find_shift(trained, name) for name in ("log p, v4 (reward), nats", "log p, v6 (judge), nats"))
    gap = find_shift(trained, "log p v4 − v6 a letter, nats")
    gone = ["not estimable" if shift.fraction is None else percent(shift.fraction) for shift in (reward, judge)]
    moved = [(fonts[name] - fonts["target"]).abs().sum().item() / 2 for name in ("base", "tuned")]
    return [
        f"PP-OCRv4, the reward, reads the word asked for in this share of the images of {words} trained words: "
        f"{shares(trained, 'exact, v4')} (memoryless; with the ODE {shares(ode, 'exact, v4')}).",
        f"PP-OCRv6, which no training has seen: {shares(trained, 'exact, v6')} (ODE: {shares(ode, 'exact, v6')}).",
        f"On {words} words that no prompt of training names: {shares(held_out, 'exact, v4')} by v4, and "
        f"{shares(held_out, 'exact, v6')} by v6.",
        f"Of the way from the base to the exact target p_base·exp(λr), the reward has gone {gone[0]} and the judge "
        f"{gone[1]}; the fonts are {moved[1]:.2f} from the target's shares, the base was {moved[0]:.2f}.",
        f"log p of v4 minus v6 a letter, which rises when a reward is hacked: {gap.before} before, {gap.after} after, "
        f"{gap.target} in the target.",
    ]


def format_report(report: TiltReport) -> str:
    """With the target's columns where there are images enough to know it."""
    if report.shifts[0].target.estimable:
        return report.format()
    rows = [[shift.statistic, str(shift.before), str(shift.after)] for shift in report.shifts]
    return markdown_table([["statistic", "before", "after"], *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/words"), help="folder for picture, report and LoRA")
    parser.add_argument("--updates", type=int, default=Settings.updates, help="fewer for a trial run")
    parser.add_argument("--words", type=int, default=8, help="of either group, to measure")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recogniser("v4"), recogniser("v6")  # says now what is missing
    settings = Settings(updates=arguments.updates, seed=arguments.seed)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)

    pipeline = load_pipeline()
    base = draw_all(pipeline, arguments.words, "base", BASE_IMAGES)
    start = time.perf_counter()
    trainer = make_trainer(pipeline, settings, folder)
    trainer.train()
    trainer.save_model()
    minutes = (time.perf_counter() - start) / 60
    tuned = draw_all(pipeline, arguments.words, "fine-tuned", TUNED_IMAGES)
    if trainer.is_world_process_zero():
        tell(folder, base, tuned, settings, minutes)


def tell(
    folder: Path, base: dict[tuple[str, str], Drawn], tuned: dict[tuple[str, str], Drawn], settings: Settings, minutes: float
) -> None:
    """Writes report and picture, and prints the five sentences."""
    reports = {key: compare(base[key], tuned[key], settings.reward_scale, key[1]) for key in base}
    fonts = font_shares(base["trained", "memoryless"], tuned["trained", "memoryless"], settings.reward_scale)
    said = sentences(reports, fonts, len(base["trained", "ODE"].words))
    tables = [f"## {name} words, {sampler}\n\n{format_report(report)}" for (name, sampler), report in reports.items()]
    rows = [["font", *fonts], *([name, *(f"{fonts[key][i]:.3f}" for key in fonts)] for i, name in enumerate(FONTS))]
    tables.append(f"## fonts, trained words, memoryless\n\n{markdown_table(rows)}")
    (folder / "report.md").write_text("\n\n".join([*said, *tables]) + "\n", encoding="utf-8")
    save_sheets(folder, base, tuned)
    print("\n\n".join(tables))
    print(
        f"\nFine-tuning took {minutes:.1f} minutes, λ = {settings.reward_scale:g}. Pictures, report and LoRA are in {folder}/\n"
    )
    print("\n".join(f"{i}. {sentence}" for i, sentence in enumerate(said, 1)))


def save_sheets(folder: Path, base: dict[tuple[str, str], Drawn], tuned: dict[tuple[str, str], Drawn], per_word: int = 2) -> None:
    """`trained.png` and `held_out.png`: the first images of each word by the ODE, as a user draws them."""
    for name in GROUPS:
        before, after = base[name, "ODE"], tuned[name, "ODE"]
        chosen = [w * before.per_word + i for w in range(len(before.words)) for i in range(per_word)]
        words = [before.asked()[i] for i in chosen]
        readings = {
            "v4": tuple([drawn.judged.read_v4[i] for i in chosen] for drawn in (before, after)),
            "v6": tuple([drawn.judged.read_v6[i] for i in chosen] for drawn in (before, after)),
        }
        save_pairs(folder / f"{name.replace(' ', '_')}.png", words, before.images[chosen], after.images[chosen], readings)


if __name__ == "__main__":
    main()
