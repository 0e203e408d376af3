"""Transition, Trajectory and rollout: the recursion, what it keeps, what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffusers_adjoint.core.trajectory import Trajectory, rollout
from diffusers_adjoint.core.transition import Transition

STDS = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
TIMESTEPS = torch.tensor([900.0, 500.0, 100.0])


def affine(k: int, x: torch.Tensor) -> torch.Tensor:
    return (k + 2) * x + 1


def noises(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sample_has_the_transition_s_mean_and_standard_deviation():
    mean = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    samples = Transition(mean, 0.25).sample(
        torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    # 5 standard errors of 200 000 draws: .25·5/√2e5 = 2.8e-3 for the mean, 2.0e-3 for the deviation.
    torch.testing.assert_close(samples.mean(0), mean[0], atol=2.8e-3, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.full_like(mean[0], 0.25), atol=2.0e-3, rtol=0)


def test_sample_takes_a_standard_deviation_per_sample():
    std = torch.tensor([[1.0], [0.0]])
    assert torch.equal(Transition(torch.zeros(2, 3), std).sample(torch.ones(2, 3)), std.expand(2, 3))


def test_transition_and_trajectory_are_frozen():
    trajectory = Trajectory(torch.zeros(3, 1), TIMESTEPS, STDS)
    for instance, field in ((Transition(torch.zeros(1), 1.0), "std"), (trajectory, "states")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field, None)


def test_rollout_is_the_recursion_written_out():
    noise, start = noises(), torch.ones(4, 2, dtype=torch.float64)
    path = rollout(affine, start, TIMESTEPS, STDS, lambda k: noise[k], keep_last=True)
    first = 2 * start + 1 + 0.5 * noise[0]
    second = 3 * first + 1  # this step has no noise
    third = 4 * second + 1 + 2.0 * noise[2]
    # Same float64 operations in the same order: equal, bit for bit.
    assert torch.equal(path.states, torch.stack([start, first, second, third]))
    assert torch.equal(path.stds, STDS) and torch.equal(path.timesteps, TIMESTEPS) and len(path) == 3


@pytest.mark.parametrize(("keep_last", "evaluations"), [(False, [0, 1]), (True, [0, 1, 2])])
def test_rollout_evaluates_each_step_once_in_order_and_the_last_only_on_demand(keep_last, evaluations):
    means, draws = [], []

    def mean(k, x):
        means.append(k)
        return affine(k, x)

    def noise(k):
        draws.append(k)
        return torch.zeros(4, 2)

    path = rollout(mean, torch.zeros(4, 2), TIMESTEPS, STDS, noise, keep_last=keep_last)
    assert means == draws == evaluations
    assert len(path.states) == len(evaluations) + 1


def test_rollout_leaves_no_graph_even_from_a_trained_network_and_a_leaf_start():
    weight, start = torch.ones(2, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    path = rollout(lambda k, x: weight * x, start, TIMESTEPS, STDS, lambda k: torch.zeros(4, 2))
    assert not path.states.requires_grad


@pytest.mark.parametrize(
    ("states", "timesteps", "message"),
    [
        (torch.zeros(5, 2), TIMESTEPS, "3 or 4 states, but got 3 timesteps and 5 states"),
        (torch.zeros(2, 2), TIMESTEPS, "got 3 timesteps and 2 states"),
        (torch.zeros(4, 2), TIMESTEPS[:2], "needs 3 timesteps"),
        (torch.zeros(4, 2, requires_grad=True), TIMESTEPS, "states.detach()"),
    ],
)
def test_trajectory_refuses_what_does_not_fit(states, timesteps, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Trajectory(states, timesteps, STDS)
