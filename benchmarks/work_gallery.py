"""The gallery of `examples/tilt_2d.py`: networks that have learnt their data from samples, tilted by each objective."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from network_chain import train
from torch import Tensor
from work_count import WorkCount

from diffusers_adjoint.metrics import tilt_shift
from diffusers_adjoint.objectives import objective_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import tilt_2d  # noqa: E402

CACHE = ROOT / "build" / "gallery"
"""Of the base networks and classifiers, which take a minute to learn and are the same each time."""
SEED = 0
DIVERGED = 100.0
"""Samples so far out are no samples: the data lie within 3 of the origin."""


@dataclass(frozen=True)
class Scored:
    """A reward at end points, λ = 1; as `objectives.Scored`."""

    reward: Callable[[Tensor], Tensor]
    state: Tensor

    @property
    def exponent(self) -> Tensor:
        with torch.no_grad():
            return self.reward(self.state)

    @property
    def tilt(self) -> Tensor:
        with torch.enable_grad():
            leaf = self.state.detach().requires_grad_()
            return torch.autograd.grad(self.reward(leaf).sum(), leaf)[0]

    @property
    def usable(self) -> Tensor:
        return torch.ones(len(self.state), dtype=torch.bool)


@cache
def learnt(data: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The base's velocity, float64, and the classifier, float32, of a data set."""
    path, settings = CACHE / f"{data}.pt", tilt_2d.Settings()
    torch.manual_seed(SEED)
    velocity, classifier = tilt_2d.Velocity(), tilt_2d.mlp(2, 64, 64, 1)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        given = settings.batch, SEED
        tilt_2d.fit(velocity, tilt_2d.flow_matching_loss, data, settings.base_updates, 1e-2, *given)
        tilt_2d.fit(classifier, tilt_2d.classifier_loss, data, settings.classifier_updates, 5e-3, *given)
        torch.save([velocity.state_dict(), classifier.state_dict()], path)
    for network, state in zip((velocity, classifier), torch.load(path), strict=True):
        network.load_state_dict(state)
        network.requires_grad_(False)
    return velocity.double(), classifier


def sample(velocity: torch.nn.Module, count: int, seed: int) -> Tensor:
    """Points (count, 2) of the flow, without noise."""
    with torch.no_grad():
        start = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return tilt_2d.PathSampler(tilt_2d.FLOW, lambda t: 0.0, torch.linspace(0, 1, 51)).sample(velocity, start)[-1]


def rewards(classifier: torch.nn.Module, points: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Those of the example, which are float32, on states in float64."""
    found = tilt_2d.make_rewards(classifier, points.float())
    return {name: lambda x, r=reward: r(x.float()).double() for name, reward in found.items()}


def run(setting: Any) -> dict[str, Any]:
    """Each of the three rewards: train, sample, compare with resampled points of the base."""
    base, classifier = learnt(setting.problem)
    points, other = (sample(base, setting.samples, SEED + i) for i in (1, 2))
    found, total = {}, 0
    for name, reward in rewards(classifier, points).items():
        network = copy.deepcopy(base).requires_grad_(True)
        work = WorkCount(network, base)
        with work.counting():
            objective = objective_of(setting.loss_type, setting.loss_kwargs)
            train(network, base, objective, lambda x, r=reward: Scored(r, x), setting)
        total += work.total
        tuned = sample(network, setting.samples, SEED + 3)
        if not tuned.abs().max() < DIVERGED:
            found[name] = {"share": None, "w2": None}
            continue
        exact, again = tilt_2d.resample(points, reward(points), SEED), tilt_2d.resample(other, reward(other), SEED + 1)
        share = tilt_shift("r", "ODE", reward(points), reward(tuned), reward(points)).fraction
        distances = (tilt_2d.sliced_w2(x.float(), exact.float()) for x in (tuned, again, other))
        found[name] = {
            "share": share and [share.mean, share.standard_error],
            "w2": dict(zip(("tuned", "floor", "base"), distances, strict=True)),
        }
    return {"work": total, "rewards": found}
