r"""Does a pipeline learn to spell, or to please the recogniser? The words of `examples/words`, λ from ⅛ to 4.

    python benchmarks/words.py                              # every row that is not recorded yet, then the tables
    python benchmarks/words.py --scale 0.5                  # of one λ
    python benchmarks/words.py --method discrete_adjoint    # of one method
    python benchmarks/words.py --table                      # the tables alone

Each row is a run of the public trainer with the settings of `make words` in one process, except for the fields in `METHODS`, and
goes to the end of `recorded/words.jsonl` when it is done.

What would refute the claim that the reward is learnt and not hacked, written before the first run: PP-OCRv6, which no training
has seen, does not rise with PP-OCRv4 (less than half as many points of right readings); the gap of log p between the two grows
past the target's by more than .05 nats a letter; the fonts move further from the target's shares than the base's were. Beyond
λ = 1 the exact target hardly changes, so that λ = 4 only says whether the recogniser can be fooled. (Added on 2026-12-01: it
does change. The KL of the target grows by half from λ = 1 to 4, so that λ = 4 is compared with its own target.)

- **Trained** words are in the prompts of training, **held-out** ones are not. Right: the word asked for is what is read, with the
  memoryless sampler (10 steps), which has an exact target, or with the ODE (28 steps), as a user draws them.
- **Share** of the way from the base's mean to the target's, both by 512 images a word of the base. The fine-tuned model has 48
  images a word with the noise of the first 48 of the base, and its mean is the base's plus the mean difference of these pairs.
  Targets are in brackets, and have no share, where a word has fewer than 100 effective images.
- **Gap**: mean of (log p v4 − log p v6) a letter, nats; trained words.
- **Fonts**: half the summed distance of the eight shares to the target's; the base's and the fine-tuned model's; trained words.
- **Diversity**: mean squared distance of two images of a word, a pixel; **Vendi**: effective number of 48 images of a word.
- **KL**: of the target, and of the memoryless paths, to the base's; trained words. **Work**: forward 1, with a vector–Jacobian
  product 2, with a backward pass to the weights 3, for each image, in thousands.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers import CogView4Pipeline
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "words")]

from demo_words import Settings, make_trainer  # noqa: E402
from drawn import (  # noqa: E402
    GAP,
    GROUPS,
    INK,
    JUDGE,
    PIPELINE,
    REWARD,
    RIGHT_V4,
    RIGHT_V6,
    SIZE,
    STEPS,
    Drawn,
    compare,
    draw_and_judge,
    effective_images,
    find_shift,
    font_distance,
    font_shares,
    load_pipeline,
)
from judges import has_tesseract, read_by_tesseract  # noqa: E402
from recognisers import recogniser, weights_file  # noqa: E402
from rows import Row, missing, read, record  # noqa: E402
from word_pictures import prompt  # noqa: E402
from work_count import WorkCount  # noqa: E402

from diffusers_adjoint import AdjointMatchingTrainer, memoryless_scheduler  # noqa: E402
from diffusers_adjoint.baselines import RewardBackpropagationTrainer  # noqa: E402
from diffusers_adjoint.metrics import Estimate, TiltEstimate, TiltReport, markdown_table, pairwise_diversity, vendi_score  # noqa: E402
from diffusers_adjoint.metrics.tilt import MIN_EFFECTIVE_SAMPLES  # noqa: E402
from diffusers_adjoint.model.denoiser import PipelineDenoiser  # noqa: E402
from diffusers_adjoint.model.paths import sampled_path_kl  # noqa: E402
from diffusers_adjoint.replay import PipelineReplay  # noqa: E402

RECORDED = Path(__file__).parent / "recorded" / "words.jsonl"
CACHE = ROOT / "build" / "words"
JUDGED_BY = ("drawn", "judges", "recognisers", "onnx_network", "word_pictures")
METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "adjoint_matching": (AdjointMatchingTrainer, {"integrator": None}),
    "adjoint_matching_posterior": (AdjointMatchingTrainer, {}),
    "adjoint_matching_next": (AdjointMatchingTrainer, {"loss_kwargs": {"pairing": "next"}}),
    "discrete_adjoint": (RewardBackpropagationTrainer, {"num_loss_steps": None}),
}
"""What trains, and fields of its config beside those of `make words`: Adjoint Matching with its default integrator, "ancestral";
as in `make words`, with "posterior"; with the other pairing; and a baseline. Another baseline or objective is one more line."""
BASE = "base"
"""The method that trains nothing."""
BASE_IMAGES, TUNED_IMAGES, ODE_IMAGES = 512, 48, 8  # of each word
SEED, PATH_SEED, PATHS = 30_000, 50_000, 256
NAMES = {"reward": REWARD, "judge": JUDGE, "v4": RIGHT_V4, "v6": RIGHT_V6, "gap": GAP, "ink": INK}


@dataclass(frozen=True)
class Setting:
    """A run: what trains, λ, and its numbers."""

    method: str = "adjoint_matching"
    reward_scale: float = 0.5
    seed: int = 0
    updates: int = Settings.updates
    learning_rate: float = Settings.learning_rate


def settings() -> list[Setting]:
    """The base; Adjoint Matching at each λ, three seeds at ½; the same with "posterior" at ½, 1 and 4; the others at ½."""
    default = [Setting(reward_scale=scale) for scale in (0.125, 0.25, 1.0, 4.0)]
    posterior = [Setting("adjoint_matching_posterior", reward_scale=scale) for scale in (1.0, 4.0)]
    seeds = [Setting(method, seed=seed) for seed in range(3) for method in ("adjoint_matching", "adjoint_matching_posterior")]
    others = [Setting(method) for method in ("adjoint_matching_next", "discrete_adjoint")]
    return [Setting(BASE, updates=0), *seeds, *posterior, *default, *others]


def run(setting: Setting) -> dict[str, Any]:
    pipeline = load_pipeline()
    found: dict[str, Any] = {"work": 0, "kl": [0.0, 0.0]} if setting.method == BASE else trained(pipeline, setting)
    for group in GROUPS:
        found[group] = measured(pipeline, group, setting.reward_scale)
    return found


def trained(pipeline: CogView4Pipeline, setting: Setting) -> dict[str, Any]:
    """Trains the pipeline; work and path KL."""
    trainer_class, options = METHODS[setting.method]
    chosen = Settings(
        reward_scale=setting.reward_scale, seed=setting.seed, updates=setting.updates, learning_rate=setting.learning_rate
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(pipeline, chosen, Path(folder), trainer_class, disable_tqdm=True, **options)
        work = WorkCount(trainer.denoiser.network)
        with work.counting():
            trainer.train()
    return {"work": work.total, "kl": numbers(path_kl(trainer))}


def measured(pipeline: CogView4Pipeline, group: str, reward_scale: float) -> dict[str, Any]:
    """Of one group of words: the statistics, the fonts, diversity, and what is read in images by the ODE."""
    base, words = base_images(group), GROUPS[group]
    tuned = draw_and_judge(pipeline, words, TUNED_IMAGES, "memoryless", SEED)
    report = compare(base, tuned, reward_scale, "memoryless")
    found = shifts(report) | of_target(report.shifts[0].target)
    found["fonts"] = {name: shares.tolist() for name, shares in font_shares(base, tuned, reward_scale).items()}
    pixels = tuned.by_word(tuned.images.mean(1)).flatten(2)
    found["diversity"] = estimate(pairwise_diversity(pixels / pixels.shape[-1] ** 0.5))
    found["vendi"] = estimate(vendi_score(1 - pixels))
    ode = draw_and_judge(pipeline, words, ODE_IMAGES, "ODE", SEED)
    found["ODE"] = {name: numbers(ode.statistics()[NAMES[name]]) for name in ("v4", "v6")}
    if has_tesseract():
        found["ODE"]["tesseract"] = numbers(ode.read_by_tesseract(ODE_IMAGES))
    return found


def shifts(report: TiltReport) -> dict[str, Any]:
    """Mean and error of each statistic before, after and in the target; of its rise, and of the share of the way where known."""
    found = {}
    for name, statistic in NAMES.items():
        shift = find_shift(report, statistic)
        found[name] = {when: estimate(getattr(shift, when)) for when in ("before", "after", "rise")}
        found[name]["target"] = [shift.target.mean, shift.target.standard_error]
        if shift.fraction:
            found[name]["share"] = estimate(shift.fraction)
    return found


def of_target(target: TiltEstimate) -> dict[str, Any]:
    """KL of the target to the base, nats, and how many images the estimates of it are worth."""
    return {"target_kl": [target.kl_target, target.kl_target_standard_error], "effective": effective_images(target)}


def estimate(value: Estimate) -> list[float]:
    return [value.mean, value.standard_error]


def numbers(values: Tensor) -> list[float]:
    """Mean and its standard error, the words being given."""
    rows = values.double().reshape(-1, values.shape[-1])
    return [rows.mean().item(), (rows.var(1) / rows.shape[1]).sum().sqrt().item() / len(rows)]


@cache
def base_images(group: str) -> Drawn:
    """Of the base, memoryless; drawn once, then read from `CACHE`, as long as weights, recognisers and numbers are the same."""
    files = [*sorted(PIPELINE.rglob("*.safetensors")), *map(weights_file, ("v4", "v6"))]
    files += [ROOT / "examples" / "words" / f"{name}.py" for name in JUDGED_BY]
    content = b"".join(file.read_bytes() for file in files) + repr((GROUPS, BASE_IMAGES, SEED, STEPS)).encode()
    path = CACHE / f"{group}-{sha256(content).hexdigest()[:16]}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        images = draw_and_judge(load_pipeline(), GROUPS[group], BASE_IMAGES, "memoryless", SEED, f"base, {group}")
        torch.save(images, unfinished)
        unfinished.replace(path)
    return torch.load(path, weights_only=False)


def path_kl(trainer: AdjointMatchingTrainer) -> Tensor:
    """KL of memoryless paths of the tuned model, (PATHS,), nats, over the trained words in turn."""
    scheduler = memoryless_scheduler(trainer.pipeline.scheduler, integrator="posterior")
    replay = PipelineReplay(trainer.pipeline, scheduler, STEPS["memoryless"], pipeline_kwargs=SIZE)
    denoiser, words = PipelineDenoiser(replay, trainer.denoiser.base_adapters), GROUPS["trained"]
    prompts = [prompt(words[i % len(words)]) for i in range(PATHS)]
    generators = [torch.Generator().manual_seed(PATH_SEED + i) for i in range(PATHS)]
    with torch.no_grad():
        start, conditioning = replay.prepare({"prompt": prompts}, generators)
        return sampled_path_kl(denoiser, start, conditioning, generators)


def tables(rows: Sequence[Row]) -> str:
    """What is read, and what may go wrong beside it; trained words / held-out words."""
    rows = sorted(rows, key=lambda row: (row["setting"]["method"] != BASE, *row["setting"].values()))
    read_by = [["method", "λ", "seed", "log p, v4", "target", "share", "log p, v6, share", "v4", "v6"]]
    read_by[0] += ["v4, ODE", "v6, ODE", "Tesseract, ODE"]
    beside = [["method", "λ", "seed", "gap: target", "after", "fonts: base", "after", "ink: target", "after"]]
    beside[0] += ["diversity", "Vendi", "KL: target", "spent", "work"]
    for row in rows:
        method, scale, seed = (row["setting"][name] for name in ("method", "reward_scale", "seed"))
        name = [method, "", ""] if method == BASE else [method.replace("_", " "), f"{scale:g}", str(seed)]
        groups = [row["found"][group] for group in GROUPS]
        cells = [reading(group, method == BASE) for group in groups]
        read_by.append(name + [" / ".join(pair) for pair in zip(*cells, strict=True)])
        beside.append(name + side_effects(groups[0], method == BASE))
        beside[-1] += [f"{row['found']['kl'][0]:.2f}", f"{row['found']['work'] / 1000:.0f}"]
    return markdown_table(read_by) + "\n\n" + markdown_table(beside)


def reading(group: dict[str, Any], base: bool) -> list[str]:
    """Cells of one group of words; the base has no target."""
    ode, when = group["ODE"], "before" if base else "after"
    target = (
        ["", "", ""] if base else [of_few(group, group["reward"]["target"][0]), share(group["reward"]), share(group["judge"])]
    )
    right = [group["v4"][when], group["v6"][when], ode["v4"], ode["v6"], ode.get("tesseract")]
    return [f"{group['reward'][when][0]:.2f}", *target, *(f"{100 * value[0]:.0f}" if value else "–" for value in right)]


def side_effects(group: dict[str, Any], base: bool) -> list[str]:
    """Cells of one group of words."""
    when = "before" if base else "after"
    gap, error = group["gap"][when]
    shares = {name: torch.tensor(values) for name, values in group["fonts"].items()}
    distances = [font_distance(shares, name) for name in ("base", "tuned")]
    wanted = [of_few(group, group["gap"]["target"][0], 3), *(of_few(group, distance) for distance in distances)]
    wanted += [of_few(group, group["ink"]["target"][0], 4), of_few(group, group["target_kl"][0])]
    target_gap, fonts_before, fonts_after, target_ink, target_kl = [""] * 5 if base else wanted
    cells = [target_gap, f"{gap:.3f} ± {error:.3f}", fonts_before, fonts_after, target_ink, f"{group['ink'][when][0]:.4f}"]
    return [*cells, f"{group['diversity'][0]:.4f}", f"{group['vendi'][0]:.1f}", target_kl]


def of_few(group: dict[str, Any], value: float, digits: int = 2) -> str:
    """In brackets where a word has too few effective images for a reliable estimate."""
    return f"{value:.{digits}f}" if group["effective"] >= MIN_EFFECTIVE_SAMPLES else f"({value:.{digits}f})"


def share(statistic: dict[str, Any]) -> str:
    return f"{statistic['share'][0]:.2f} ± {statistic['share'][1]:.2f}" if "share" in statistic else "–"


def record_missing(scale: float | None, method: str | None) -> None:
    """Asks first whether Tesseract works where it is installed: a row is written after its last measurement only."""
    if has_tesseract():
        read_by_tesseract(torch.ones(3, 16, 48))
    wanted = [setting for setting in settings() if scale in (None, setting.reward_scale) and method in (None, setting.method)]
    for setting in tqdm(missing(wanted, read(RECORDED)), unit="run"):
        record(setting, run, RECORDED)


def main() -> None:
    parser = argparse.ArgumentParser(description="Spelling by one recogniser's reward, and what others read; the rows are kept.")
    parser.add_argument(
        "--scale", type=float, choices=sorted({setting.reward_scale for setting in settings()}), help="this λ alone"
    )
    parser.add_argument("--method", choices=METHODS, help="this method alone")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small tensors: more threads are slower
    if not options.table:
        try:
            recogniser("v4"), recogniser("v6")
        except (ImportError, OSError) as error:
            sys.exit(f"{error}")
        record_missing(options.scale, options.method)
    print(tables(read(RECORDED)))


if __name__ == "__main__":
    main()
