r"""Does a pipeline learn to spell, or to please the recogniser? The words of `examples/words`, λ from ⅛ to 4.

    python benchmarks/words.py                  # every row that is not recorded yet, then the table
    python benchmarks/words.py --scale 0.5      # of one λ
    python benchmarks/words.py --table          # the table alone

Each row is a run of the public trainer with the settings of `make words` in one process, and goes to the end of
`recorded/words.jsonl` when it is done. `method` names what trains: a row of `METHODS`.

What would refute the claim that the reward is learnt and not hacked, written before the first run: PP-OCRv6, which no training
has seen, does not rise with PP-OCRv4 (less than half as many points of exact matches); the gap of log p between the two grows
past the target's by more than .05 nats a letter; the fonts move further from the target's shares than the base's were. Beyond
λ = 1 the exact target hardly changes, so that λ = 4 only says whether the recogniser can be fooled.

- **Trained** words are in the prompts of training, **held-out** ones are not. Exact: the word asked for is what is read, with the
  memoryless sampler (10 steps), which has an exact target, or with the ODE (28 steps), as a user draws them.
- **Share** of the way from the base's mean to the target's; the target by importance weights on 320 images a word of the base.
  It is left out from λ = 1 on, because the hardest word has 74 effective images there, and 100 are needed.
- **Gap**: mean of (log p v4 − log p v6) a letter, nats; trained words.
- **Fonts**: half the summed distance of the eight shares to the target's; trained words.
- **Diversity**: mean squared distance of two images of a word, a pixel; **Vendi**: effective number of 48 images of a word.
- **KL**: of the memoryless paths to the base's. **Work**: forward 1, with a vector–Jacobian product 2, with a backward pass to
  the weights 3, for each image, in thousands.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import CogView4Pipeline
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "words")]

import drawn  # noqa: E402
from demo_words import GROUPS, Settings, make_trainer  # noqa: E402
from drawn import SIZE, STEPS, Drawn, compare, draw_and_judge, find_shift, font_shares  # noqa: E402
from judges import has_tesseract  # noqa: E402
from rows import Row, missing, read, record  # noqa: E402
from work_count import WorkCount  # noqa: E402

from diffusers_adjoint import AdjointMatchingTrainer, memoryless_scheduler  # noqa: E402
from diffusers_adjoint.baselines import RewardBackpropagationTrainer  # noqa: E402
from diffusers_adjoint.metrics import Estimate, markdown_table, pairwise_diversity, vendi_score  # noqa: E402
from diffusers_adjoint.model.denoiser import PipelineDenoiser  # noqa: E402
from diffusers_adjoint.model.paths import sampled_path_kl  # noqa: E402
from diffusers_adjoint.replay import PipelineReplay  # noqa: E402

RECORDED = Path(__file__).parent / "recorded" / "words.jsonl"
CACHE = ROOT / "build" / "words"
METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "adjoint_matching": (AdjointMatchingTrainer, {}),
    "discrete_adjoint": (RewardBackpropagationTrainer, {}),
}
"""What trains, and fields of its config. A baseline or a black-box objective is one more line."""
BASE = "base"
"""The method that trains nothing: what chance alone makes of the statistics."""
BASE_IMAGES, TUNED_IMAGES, ODE_IMAGES = 320, 48, 8  # of each word
SEED, PATH_SEED, PATHS = 30_000, 50_000, 256
NAMES = {"reward": "log p, v4 (reward), nats", "judge": "log p, v6 (judge), nats", "v4": "exact, v4", "v6": "exact, v6"}
NAMES |= {"gap": "log p v4 − v6 a letter, nats", "ink": "ink"}


@dataclass(frozen=True)
class Setting:
    """A run: what trains, λ, and its numbers."""

    method: str = "adjoint_matching"
    reward_scale: float = 0.5
    seed: int = 0
    updates: int = Settings.updates
    learning_rate: float = Settings.learning_rate


def settings() -> list[Setting]:
    """The base, one seed of each λ, three at ½."""
    scales = [Setting(reward_scale=scale) for scale in (0.5, 0.125, 0.25, 1.0, 4.0)]
    return [Setting(BASE, updates=0), scales[0], *(Setting(seed=seed) for seed in (1, 2)), *scales[1:]]


def run(setting: Setting) -> dict[str, Any]:
    pipeline = drawn.load_pipeline()
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
    """Of one group of words: mean, error, share of the shift and its error of each statistic, and what is compared by eye."""
    base, words = base_images(group), GROUPS[group]
    tuned = draw_and_judge(pipeline, words, TUNED_IMAGES, "memoryless", SEED)
    report, found = compare(base, tuned, reward_scale, "memoryless"), {}
    for name, statistic in NAMES.items():
        shift = find_shift(report, statistic)
        ends = {"before": estimate(shift.before), "after": estimate(shift.after)}
        target = {"target": [shift.target.mean, shift.target.standard_error]} if shift.target.estimable else {}
        found[name] = ends | target | ({"share": estimate(shift.fraction)} if shift.fraction else {})
    found["fonts"] = {name: shares.tolist() for name, shares in font_shares(base, tuned, reward_scale).items()}
    for name, few in {"before": first(base, TUNED_IMAGES), "after": tuned}.items():
        pixels = few.images.mean(1).flatten(1).unflatten(0, (len(words), TUNED_IMAGES))
        found[f"diversity {name}"] = estimate(pairwise_diversity(pixels / pixels.shape[-1] ** 0.5))
        found[f"vendi {name}"] = estimate(vendi_score(1 - pixels))
    ode = draw_and_judge(pipeline, words, ODE_IMAGES, "ODE", SEED)
    found["ODE"] = {name: numbers(ode.statistics()[NAMES[name]]) for name in ("v4", "v6")}
    if has_tesseract():
        found["ODE"]["tesseract"] = numbers(ode.read_by_tesseract(ODE_IMAGES))
    return found


def estimate(value: Estimate) -> list[float]:
    return [value.mean, value.standard_error]


def numbers(values: Tensor) -> list[float]:
    """Mean and its standard error, the words being given."""
    rows = values.double().reshape(-1, values.shape[-1])
    return [rows.mean().item(), (rows.var(1) / rows.shape[1]).sum().sqrt().item() / len(rows)]


def first(images: Drawn, per_word: int) -> Drawn:
    """The first images of each word, without what was said of them."""
    chosen = images.images.unflatten(0, (len(images.words), images.per_word))[:, :per_word].flatten(0, 1)
    return Drawn(images.words, per_word, chosen, images.judged)


@cache
def base_images(group: str, sampler: str = "memoryless", per_word: int = BASE_IMAGES) -> Drawn:
    """Of the base; drawn once, then read from `CACHE`."""
    path = CACHE / f"{group}-{sampler}-{per_word}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(draw_and_judge(drawn.load_pipeline(), GROUPS[group], per_word, sampler, SEED, f"base, {group}"), path)
    return torch.load(path, weights_only=False)


def path_kl(trainer: AdjointMatchingTrainer) -> Tensor:
    """KL of memoryless paths of the tuned model, (PATHS,), nats, over the trained words in turn."""
    scheduler = memoryless_scheduler(trainer.pipeline.scheduler, integrator="posterior")
    replay = PipelineReplay(trainer.pipeline, scheduler, STEPS["memoryless"], pipeline_kwargs=SIZE)
    denoiser, words = PipelineDenoiser(replay, trainer.denoiser.base_adapters), GROUPS["trained"]
    prompts = [drawn.prompt(words[i % len(words)]) for i in range(PATHS)]
    generators = [torch.Generator().manual_seed(PATH_SEED + i) for i in range(PATHS)]
    with torch.no_grad():
        start, conditioning = replay.prepare({"prompt": prompts}, generators)
        return sampled_path_kl(denoiser, start, conditioning, generators)


def font_distance(fonts: dict[str, list[float]], name: str) -> float:
    """Half the summed distance of the shares to the target's, 0 to 1."""
    return sum(abs(a - b) for a, b in zip(fonts[name], fonts["target"], strict=True)) / 2


def tables(rows: Sequence[Row]) -> str:
    """What is read, and what may go wrong beside it; trained words / held-out words."""
    rows = sorted(rows, key=lambda row: (row["setting"]["method"] != BASE, *row["setting"].values()))
    read_by = [
        ["λ", "seed", "log p, v4", "target", "share", "log p, v6, share", "v4", "v6", "v4, ODE", "v6, ODE", "Tesseract, ODE"]
    ]
    beside = [["λ", "seed", "gap: target", "after", "fonts", "diversity", "Vendi", "KL", "work"]]
    for row in rows:
        base = row["setting"]["method"] == BASE
        name = ["base", ""] if base else [f"{row['setting']['reward_scale']:g}", str(row["setting"]["seed"])]
        groups = [row["found"][group] for group in GROUPS]
        read_by.append(name + [" / ".join(cells) for cells in zip(*(reading(group, base) for group in groups), strict=True)])
        trained, (kl, _) = groups[0], row["found"]["kl"]
        gap, error = trained["gap"]["after"]
        beside.append(
            [
                *name,
                "" if base else target_of(trained["gap"], 3),
                f"{gap:.3f} ± {error:.3f}",
                f"{font_distance(trained['fonts'], 'tuned'):.2f}",
                f"{trained['diversity after'][0]:.4f}",
                f"{trained['vendi after'][0]:.1f}",
                f"{kl:.2f}",
                f"{row['found']['work'] / 1000:.0f}",
            ]
        )
    return markdown_table(read_by) + "\n\n" + markdown_table(beside)


def reading(group: dict[str, Any], base: bool) -> list[str]:
    """Cells of one group of words; the base has no target."""
    ode = group["ODE"]
    after = [f"{group['reward']['after'][0]:.2f}"]
    target = ["", "", ""] if base else [target_of(group["reward"]), share(group["reward"]), share(group["judge"])]
    exact = [group["v4"]["after"], group["v6"]["after"], ode["v4"], ode["v6"], ode.get("tesseract")]
    return after + target + [f"{100 * value[0]:.0f}" if value else "–" for value in exact]


def target_of(statistic: dict[str, Any], digits: int = 2) -> str:
    """Not known where a word has fewer than 100 effective images."""
    return f"{statistic['target'][0]:.{digits}f}" if "target" in statistic else "–"


def share(statistic: dict[str, Any]) -> str:
    return f"{statistic['share'][0]:.2f} ± {statistic['share'][1]:.2f}" if "share" in statistic else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description="Spelling by one recogniser's reward, and what others read; the rows are kept.")
    parser.add_argument("--scale", type=float, help="this λ alone")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small tensors: more threads are slower
    wanted = [setting for setting in settings() if options.scale in (None, setting.reward_scale)]
    for setting in tqdm([] if options.table else missing(wanted, read(RECORDED)), unit="run"):
        record(setting, run, RECORDED)
    print(tables(read(RECORDED)))


if __name__ == "__main__":
    main()
