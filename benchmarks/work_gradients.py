r"""The variance of the gradient at a fixed model, for several ways to draw S of n loss steps.

With g_k the gradient of step k's loss over a batch, Σ_{k drawn} g_k/π_k estimates Σ_k g_k, π_k the probability that k is drawn.
Its variance over batches and draws is E‖Σ g_k/π_k‖² − ‖E Σ g_k‖²: of every batch only the products g_k·g_l are needed, and the
mean over draws is exact, over all subsets. Ways to draw:

- "uniform": S distinct steps, all alike;
- "loss": S distinct ones with π_k ∝ √(mean loss of step k), cut at 1, of largest entropy;
- "loss, repeated": S independent draws with p_k ∝ √(mean loss of step k);
- "gradient": as "loss" with √E‖g_k‖², which no rule can know beforehand: what is to be had at all;
- "all": n steps, what is left when nothing is drawn.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from work_digits import CountedTrainer, demo, make_trainer

from diffusers_adjoint.core.matching import LossSteps, noisy_steps, regression_loss
from diffusers_adjoint.objectives import Targets

FIRST_BATCH = 1000  # number of the update whose random numbers the first batch takes: none of training


def run(setting: Any) -> dict[str, Any]:
    """Variances at the model that the setting's updates make, over `samples` batches."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(replace(setting, updates=max(setting.updates, 1)), demo.make_task("ink"), folder)
        if setting.updates:
            trainer.train()
    found = [step_gradients(trainer, setting.batch, FIRST_BATCH + i) for i in range(setting.samples)]
    products, sums, losses = (torch.stack(parts) for parts in zip(*found, strict=True))
    return {
        "steps": products.shape[1],
        "losses": losses.mean(0).tolist(),
        "norms": products.diagonal(dim1=1, dim2=2).mean(0).sqrt().tolist(),
        "variances": variances(products, sums, losses.mean(0), setting.loss_steps),
    }


def step_gradients(trainer: CountedTrainer, batch: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one batch: g_k·g_l, (n, n), Σ_k g_k, (P,), and the mean loss of each step, (n,); float64."""
    trainer.state.global_step = number
    columns = {"prompt": [demo.OPEN_PROMPT] * batch}
    chain = trainer.prepare_chain({"columns": columns, "first_image": 0, "share": 1.0, "ends_update": True})
    every = noisy_steps(trainer.method.scales(chain))
    targets: Targets = trainer.method.targets(chain, LossSteps(tuple(every), (1.0,) * len(every)), trainer.scorer(chain))
    weights = [p for p in trainer.denoiser.network.parameters() if p.requires_grad]
    gradients, losses = [], []
    for i, k in enumerate(every):
        moved = chain.mean(k, targets.states[i])
        loss = regression_loss(moved, targets.base_means[i], targets.shifts[i], targets.scales[i]).mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double())
        losses.append(loss.detach().double())
    stacked = torch.stack(gradients)
    return stacked @ stacked.T, stacked.sum(0), torch.stack(losses)


def variances(products: Tensor, sums: Tensor, losses: Tensor, draws: int) -> dict[str, float]:
    """Variance of the estimate of Σ g_k by each way to draw; products (R, n, n), sums (R, P), losses (n,)."""
    batches, second = len(sums), products.mean(0)
    whole = float(second.sum())
    # The square of a mean, without the part that its own noise adds.
    squared = float((sums.sum(0).square().sum() - sums.square().sum()) / (batches * (batches - 1)))
    norms = second.diagonal()
    p = losses.sqrt() / losses.sqrt().sum()
    moments = {
        "uniform": distinct(second, torch.ones_like(losses), draws),
        "loss": distinct(second, losses.sqrt(), draws),
        "loss, repeated": float((norms / p).sum()) / draws + (draws - 1) / draws * whole,
        "gradient": distinct(second, norms.sqrt(), draws),
        "all": whole,
    }
    return {name: moment - squared for name, moment in moments.items()}


def distinct(second: Tensor, sizes: Tensor, draws: int) -> float:
    """E‖Σ g_k/π_k‖² over sets of `draws` steps with π_k ∝ sizes, cut at 1."""
    wanted = inclusion(sizes, draws)
    joint = joint_inclusion(wanted, draws)
    single = joint.diagonal()
    return float((second * joint / (single[:, None] * single)).sum())


def inclusion(sizes: Tensor, draws: int) -> Tensor:
    """π_k ∝ sizes, but 1 where that is more; (n,), sum `draws`."""
    found = torch.zeros_like(sizes)
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        left = draws - int(certain.sum())
        found = torch.where(certain, 1.0, left * sizes / sizes[~certain].sum())
        if not (found > 1).any():
            return found
        certain |= found >= 1


def joint_inclusion(wanted: Tensor, draws: int) -> Tensor:
    """π_kl of the law of largest entropy on sets of `draws` steps with π_kk = wanted, (n, n)."""
    steps = range(len(wanted))
    sure = {k for k in steps if wanted[k] == 1}
    sets = [chosen for chosen in combinations(steps, draws) if sure <= set(chosen)]
    members = torch.tensor([[k in chosen for k in steps] for chosen in sets], dtype=torch.float64)
    odds = torch.zeros_like(wanted)  # log weight of a step: the probability of a set is ∝ the product of its steps' weights
    for _ in range(1000):
        law = (members @ odds).softmax(0)
        odds += wanted.log() - (law @ members).log()
    return torch.einsum("s,sk,sl->kl", (members @ odds).softmax(0), members, members)
