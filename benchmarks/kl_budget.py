r"""Does training with `target_kl` reach that KL? Digits, both rewards of the demo, budgets from a quarter of a nat to two.

    python benchmarks/kl_budget.py                  # every row that is not recorded yet, then the table
    python benchmarks/kl_budget.py --only ink       # of one reward: ink, three
    python benchmarks/kl_budget.py --budget 1       # of one budget
    python benchmarks/kl_budget.py --table          # the table alone

Each row is a run of the public trainer with the demo's settings, and goes to the end of `recorded/kl_budget.jsonl` when it is
done.

- **KL**: what `trainer.evaluate()` says of 500 memoryless paths of the trained model, `eval_kl`. Beside it what the trainer
  itself measured last, mean of 5 updates, and the KL that importance weights of the base's images give the tilt at the final λ.
- **Overshoot**: the largest mean of 5 successive updates' KL, as a share of the budget. **Settled**: the update from which on
  this mean stays within a tenth of the budget.
- **Share** of the shift that the tilt at the *final* λ asks for, for ODE samples and memoryless ones, as in `work_digits.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))

import work_digits
from rows import Row, missing, read, record
from work_digits import BASE_SEED, COMMON, demo

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer
from diffusers_adjoint.metrics import markdown_table, tilt_estimate

RECORDED = Path(__file__).parent / "recorded" / "kl_budget.jsonl"
PATHS, BASE_IMAGES = 500, 24_000


@dataclass(frozen=True)
class Setting:
    """A run: the demo's reward, `target_kl`, updates, learning rate (`None`: the demo's) and its schedule, seed, and images for
    the shares."""

    reward: str
    target_kl: float
    updates: int = 100
    learning_rate: float | None = None
    schedule: str = "constant"
    seed: int = 0
    samples: int = 1000


def settings() -> list[Setting]:
    """Those of the demo, but for λ; "three" with its falling learning rate, without which it is not near the tilt yet."""
    ink = [Setting("ink", kl) for kl in (1.0, 0.25, 2.0)]
    three = [Setting("three", kl, schedule="linear") for kl in (1.0, 2.0, 0.25)]
    return [*ink, *three, replace(three[-1], learning_rate=2e-3)]


class Watch(TrainerCallback):
    """λ and the KL of each update."""

    def __init__(self) -> None:
        self.kls: list[float] = []
        self.scales: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        spent = self.trainer.budget.spent
        self.kls.append(spent.kls[-1])
        self.scales.append(spent.reward_scale)


def trained(setting: Setting, task: demo.Task, folder: str) -> tuple[AdjointMatchingTrainer, Watch]:
    watch = Watch()
    trainer = watch.trainer = AdjointMatchingTrainer(
        model=demo.load_pipeline(),
        reward_funcs=task.reward,
        args=AdjointMatchingConfig(
            output_dir=folder,
            target_kl=setting.target_kl,
            num_inference_steps=task.steps,
            num_loss_steps=task.loss_steps,
            num_generations=task.images,
            per_device_eval_batch_size=250,
            num_generations_eval=1,
            num_images_to_log=0,
            max_steps=setting.updates,
            learning_rate=setting.learning_rate or task.learning_rate,
            lr_scheduler_type=setting.schedule,
            seed=setting.seed,
            **COMMON,
        ),
        train_dataset=Dataset.from_dict({"prompt": [demo.OPEN_PROMPT] * setting.updates}),
        callbacks=[watch],
        peft_config=LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=demo.LINEAR_LAYERS),
    )
    trainer.train()
    return trainer, watch


def run(setting: Setting) -> dict[str, Any]:
    task = demo.make_task(setting.reward)
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = trained(setting, task, folder)
        evaluated = trainer.evaluate([{"prompt": demo.OPEN_PROMPT}] * PATHS)
    means = torch.tensor(watch.kls).unfold(0, 5, 1).mean(1) / setting.target_kl
    outside = ((means - 1).abs() > 0.1).nonzero().flatten().tolist()
    base = {sampler: rewards[:BASE_IMAGES] for sampler, rewards in work_digits.base_rewards(BASE_IMAGES)[task.name].items()}
    scale = trainer.reward_scale
    return {
        "kl": evaluated["eval_kl"],
        "kl_of_training": float(means[-1] * setting.target_kl),
        "kl_by_weights": weighed(scale, base["memoryless"]),
        "overshoot": float(means.max()),
        "settled": outside[-1] + 6 if outside else 5,
        "first_scale": watch.scales[0],
        "scale": scale,
        "shares": {sampler: share(trainer, task, sampler, before, setting.samples) for sampler, before in base.items()},
        "kls": [round(kl, 4) for kl in watch.kls],
        "scales": [round(value, 4) for value in watch.scales],
    }


def weighed(scale: float, rewards: Tensor) -> dict[str, float]:
    """The KL of the tilt at λ = `scale`, its error, and effective images."""
    found = tilt_estimate(scale * rewards, rewards)
    effective = found.effective_sample_size * found.num_samples
    return {"kl": found.kl_target, "error": found.kl_target_standard_error, "effective": effective}


def share(trainer: AdjointMatchingTrainer, task: demo.Task, sampler: str, before: Tensor, count: int) -> dict[str, float]:
    """(after − before)/(target − before) at the final λ, from the same start noise."""
    images = demo.draw(trainer.pipeline, sampler, count, BASE_SEED, "fine-tuned")
    moved = (task.reward(images, []) - before[:count]).double()
    weights = (trainer.reward_scale * before.double()).softmax(0)
    shift = float(weights @ before.double() - before.double().mean())
    of_the_target = float(work_digits.shift_error(before.double(), weights)) / shift
    return {
        "share": float(moved.mean()) / shift,
        "error": float(moved.std()) / count**0.5 / shift,
        "error_of_target": of_the_target,
    }


def table(rows: Sequence[Row]) -> str:
    header = [
        "reward",
        "`target_kl`",
        "learning rate",
        "KL",
        "KL of training",
        "KL by weights",
        "overshoot",
        "settled",
        "λ, first → final",
    ]
    cells = [[*header, "share, ODE", "share, memoryless"]]
    for row in sorted(rows, key=lambda row: (row["setting"]["reward"], row["setting"]["target_kl"])):
        setting, found = row["setting"], row["found"]
        weights, shares = found["kl_by_weights"], [found["shares"][sampler] for sampler in ("ODE", "memoryless")]
        cells.append(
            [
                setting["reward"],
                f"{setting['target_kl']:g}",
                f"{setting['learning_rate'] or demo.make_task(setting['reward']).learning_rate:g}",
                f"{found['kl']:.3g}",
                f"{found['kl_of_training']:.3g}",
                f"{weights['kl']:.2f} ± {weights['error']:.2f}" if weights["effective"] >= 100 else "not estimable",
                f"{found['overshoot']:.2f}",
                str(found["settled"]) if found["settled"] <= setting["updates"] else "–",
                f"{found['first_scale']:.3g} → {found['scale']:.3g}",
                *(f"{one['share']:.2f} ± {(one['error'] ** 2 + one['error_of_target'] ** 2) ** 0.5:.2f}" for one in shares),
            ]
        )
    return markdown_table(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a budget of KL ends; the rows are kept.")
    parser.add_argument("--only", choices=["ink", "three"], help="this reward alone")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--budget", type=float, help="this budget alone")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small tensors: more threads are slower
    wanted = [s for s in settings() if options.only in (None, s.reward) and options.budget in (None, s.target_kl)]
    for setting in tqdm([] if options.table else missing(wanted, read(RECORDED)), unit="run"):
        record(setting, run, RECORDED)
    print(table(read(RECORDED)))


if __name__ == "__main__":
    main()
