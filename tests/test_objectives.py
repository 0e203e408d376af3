"""The paper's four objectives on a bent (non-affine) float64 chain, against autograd through the chain and each other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from adjoints import full_from_end, lean_from_end
from torch import Tensor

from diffusers_adjoint.core.adjoint import EndPoint, end_point, full_adjoint
from diffusers_adjoint.core.control_cost import continuous_adjoint, continuous_adjoint_loss, discrete_adjoint
from diffusers_adjoint.core.matching import LossSteps, matching_loss, regression_loss, step_kl
from diffusers_adjoint.core.trajectory import Trajectory, rollout
from diffusers_adjoint.objectives import AdjointMatching, BasicAdjointMatching

STEPS, BATCH, DIM, QUIET = 6, 3, 2, 2
TIMESTEPS = torch.linspace(1000, 100, STEPS)
NUMBERS = torch.linspace(0.3, 0.5, STEPS, dtype=torch.float64).index_fill(0, torch.tensor([QUIET]), 0.0)
DIAGONAL = NUMBERS[:, None] * torch.tensor([1.0, 1.7], dtype=torch.float64)  # QUIET has no noise in either component
EVERY = [AdjointMatching(), BasicAdjointMatching(), continuous_adjoint, discrete_adjoint]
# The same float64 Jacobians, multiplied in another order.
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS, NOISE, START = draw(STEPS, DIM, DIM, seed=1), draw(STEPS, BATCH, DIM, seed=2), draw(BATCH, DIM, seed=3)


def base_mean(k: int, x: Tensor) -> Tensor:
    return 0.9 * x + 0.5 * torch.tanh(x @ WEIGHTS[k])


class Controlled(torch.nn.Module):
    """The base, and a control with parameters; the base alone where there is no noise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Parameter(draw(STEPS, DIM, DIM, seed=4))
        self.outer = torch.nn.Parameter(0.3 * draw(STEPS, DIM, DIM, seed=5))

    def forward(self, k: int, x: Tensor) -> Tensor:
        return base_mean(k, x) + (torch.sin(x @ self.inner[k]) @ self.outer[k] if k != QUIET else 0.0)

    def gradients(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parameters()]
        self.zero_grad()
        return grads


def terminal_cost(x: Tensor) -> Tensor:
    return 0.1 * x.pow(4).sum(-1) - torch.sin(x).sum(-1)


def running_cost(k: int, x: Tensor) -> Tensor:
    return 0.2 * (k + 1) * torch.cos(x).sum(-1)


def slope_of(cost, x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(cost(leaf).sum(), leaf)[0]


def running_slope(k: int, x: Tensor) -> Tensor:
    return slope_of(lambda at: running_cost(k, at), x)


def terminal_slope(x: Tensor) -> Tensor:
    return slope_of(terminal_cost, x)


def path_of(model: Controlled, stds: Tensor) -> Trajectory:
    return rollout(model, START, TIMESTEPS, stds, lambda k: NOISE[k], keep_last=True)


def cost_to_go(model, x: Tensor, first: int, stds: Tensor, *, noisy_end: bool) -> Tensor:
    """Σ ½‖√Δ u‖² + f + g from step `first` on, with the path's noise, in plain autograd, (B,)."""
    cost = torch.zeros(len(x), dtype=torch.float64)
    for k in range(first, STEPS):
        mean, base = model(k, x), base_mean(k, x)
        if k != QUIET:
            cost = cost + 0.5 * ((mean - base) / stds[k]).square().sum(-1)
        cost = cost + running_cost(k, x)
        x = mean + (stds[k] * NOISE[k] if noisy_end or k < STEPS - 1 else 0.0)
    return cost + terminal_cost(x)


@pytest.mark.parametrize("noisy_end", [True, False])
@pytest.mark.parametrize("stds", [NUMBERS, DIAGONAL], ids=["scalar", "diagonal"])
def test_the_full_adjoint_is_the_slope_of_the_cost_to_go(stds, noisy_end):
    model = Controlled()
    path = path_of(model, stds)
    if noisy_end:
        full = full_adjoint(model, base_mean, path, terminal_slope(path.states[-1]), running_cost_grad=running_slope)
    else:
        full = full_from_end(model, base_mean, path, terminal_slope, running_cost_grad=running_slope)
    for k in range(STEPS):
        slope = slope_of(lambda x, k=k: cost_to_go(model, x, k, stds, noisy_end=noisy_end), path.states[k])
        torch.testing.assert_close(full.adjoints[k], slope, **EXACT)
    assert torch.equal(full.base_means, torch.stack([base_mean(k, path.states[k]) for k in range(STEPS)]))


def test_at_the_base_the_full_adjoint_is_the_lean_one():
    path = path_of(base_mean, NUMBERS)
    full = full_from_end(base_mean, base_mean, path, terminal_slope)
    assert torch.equal(full.adjoints, lean_from_end(base_mean, path, terminal_slope).adjoints)


@pytest.mark.parametrize("lowest", range(STEPS + 1))
@pytest.mark.parametrize("kind", ["tensor", "end point"])
def test_the_full_adjoint_evaluates_both_networks_once_a_step(kind, lowest):
    model, evaluated = Controlled(), []
    path = path_of(model, NUMBERS)
    end = terminal_slope(model(STEPS - 1, path.states[-2]))
    whole = full_adjoint(model, base_mean, path, end)
    watch = lambda name, f: lambda k, x: evaluated.append((name, k)) or f(k, x)  # noqa: E731
    watched = watch("model", model), watch("base", base_mean)
    if kind == "tensor":
        full = full_adjoint(*watched, path, end, lowest)
    else:
        full = full_from_end(*watched, path, terminal_slope, lowest)
    means_from = min(max(lowest - 1, 0), STEPS - 1)
    assert [k for name, k in evaluated if name == "base"] == list(range(STEPS - 1, means_from - 1, -1))
    # The mean of the last step is where the reward is asked.
    assert [k for name, k in evaluated if name == "model"] == list(range(STEPS - 1, min(lowest, STEPS - 1) - 1, -1))
    assert torch.equal(full.adjoints[lowest:], whole.adjoints[lowest:]) and full.adjoints[:lowest].isnan().all()
    assert torch.equal(full.base_means[means_from:], whole.base_means[means_from:])


class OnePath:
    """The chain of a model on one given path, as objectives see it."""

    running_cost_grad = staticmethod(running_slope)
    predicts_scores = False

    def __init__(self, model: Controlled, path: Trajectory, noisy_end: bool) -> None:
        self.mean, self.base_mean, self.path, self.noisy_end = model, base_mean, path, noisy_end

    def base(self):
        return contextlib.nullcontext()

    def rollout(self) -> Trajectory:
        return self.path

    def end_point(self, path: Trajectory, of: str) -> EndPoint:
        if self.noisy_end:
            return EndPoint(path.states[-1])
        return end_point(path, self.base_mean, self.mean if of == "model" else None)


@dataclass(frozen=True)
class Scored:
    tilt: Tensor


def gradient_of(objective, model: Controlled, path: Trajectory, *, noisy_end: bool) -> list[Tensor]:
    """Of the sum over all steps and the batch."""
    if objective is discrete_adjoint:
        end = terminal_slope(path.states[-1]) if noisy_end else terminal_slope
        discrete_adjoint(model, base_mean, path, end, running_cost=running_cost, weigh=torch.sum)
    elif objective is continuous_adjoint:
        end = terminal_slope(path.states[-1] if noisy_end else model(STEPS - 1, path.states[STEPS - 1]).detach())
        continuous_adjoint(model, base_mean, path, end, running_cost=running_cost)
        return [BATCH * grad for grad in model.gradients()]  # of a mean
    else:
        steps = [k for k in range(STEPS) if k != QUIET]
        chain, all_of_them = OnePath(model, path, noisy_end), LossSteps(tuple(steps), (1.0,) * len(steps))
        targets = objective.targets(chain, all_of_them, lambda x: Scored(-terminal_slope(x)))
        points = zip(steps, targets.states, targets.base_means, targets.shifts, targets.scales, strict=True)
        for k, x, base, shift, scale in points:
            regression_loss(model(k, x), base, shift, scale).sum().backward()
    return model.gradients()


@pytest.mark.parametrize("noisy_end", [True, False])
@pytest.mark.parametrize("stds", [NUMBERS, DIAGONAL], ids=["scalar", "diagonal"])
def test_three_objectives_have_the_gradient_of_the_chain_s_cost(stds, noisy_end):
    """Prop. 2 with the ½, on the grid: basic Adjoint Matching = continuous adjoint = back-propagation through the chain."""
    model = Controlled()
    cost_to_go(model, START, 0, stds, noisy_end=noisy_end).sum().backward()
    expected, path = model.gradients(), path_of(model, stds)
    for objective in EVERY:
        for grad, plain in zip(gradient_of(objective, model, path, noisy_end=noisy_end), expected, strict=True):
            assert plain.abs().max() > 0.1
            if objective == AdjointMatching():  # lean: another gradient, away from the optimum and from the base
                assert (grad - plain).abs().max() > 0.01
            else:
                torch.testing.assert_close(grad, plain, **EXACT)


def test_at_the_base_all_four_gradients_are_one():
    """u = 0 costs nothing, so lean and full adjoint agree there."""
    model = Controlled()
    torch.nn.init.zeros_(model.outer)
    path = path_of(model, NUMBERS)
    first, *others = (gradient_of(objective, model, path, noisy_end=True) for objective in EVERY)
    assert first[1].abs().max() > 0.1
    for gradients in others:
        torch.testing.assert_close(gradients, first, **EXACT)


def test_the_continuous_loss_is_the_matching_loss_but_for_a_constant():
    mean, base, adjoint, std = draw(5, 3, seed=0), draw(5, 3, seed=1), draw(5, 3, seed=2), 0.3
    constant = 0.5 * (std * adjoint).square().sum(1)
    torch.testing.assert_close(
        continuous_adjoint_loss(mean, base, std, adjoint), matching_loss(mean, base, std, adjoint) - constant, **EXACT
    )
    base, adjoint = base.requires_grad_(), adjoint.requires_grad_()
    assert not continuous_adjoint_loss(mean, base, std, adjoint).requires_grad
    with pytest.raises(ValueError, match="they must agree"):
        continuous_adjoint_loss(mean, base, std, adjoint[:1])


def test_a_step_without_noise_teaches_nothing_and_carries_the_state():
    """Its mean may depend on the parameters all the same, as that of a last step without noise does."""

    class Everywhere(Controlled):
        def forward(self, k: int, x: Tensor) -> Tensor:
            return base_mean(k, x) + torch.sin(x @ self.inner[k]) @ self.outer[k]

    model = Everywhere()
    path = path_of(model, NUMBERS)
    basic, discrete = (
        gradient_of(objective, model, path, noisy_end=True) for objective in (BasicAdjointMatching(), discrete_adjoint)
    )
    for grad, expected in zip(discrete, basic, strict=True):
        assert torch.equal(grad[QUIET], torch.zeros_like(grad[QUIET]))
        torch.testing.assert_close(grad, expected, **EXACT)


@pytest.mark.parametrize("first", [1, 3])
def test_back_propagation_ends_at_the_first_step_with_a_control(first):
    model, evaluated = Controlled(), []
    path = path_of(model, NUMBERS)
    whole = gradient_of(discrete_adjoint, model, path, noisy_end=True)
    watch = lambda k, x: evaluated.append((k, x.requires_grad)) or model(k, x)  # noqa: E731
    steps = [k for k in range(first, STEPS) if k != QUIET]
    discrete_adjoint(
        watch, base_mean, path, terminal_slope(path.states[-1]), steps=steps, running_cost=running_cost, weigh=torch.sum
    )
    assert evaluated == [(k, k > first) for k in reversed(range(first, STEPS))]
    for grad, of_all in zip(model.gradients(), whole, strict=True):
        torch.testing.assert_close(grad[first:], of_all[first:], **EXACT)
        assert not grad[:first].any()


def test_back_propagation_reports_the_cost_it_differentiates():
    model = Controlled()
    path = path_of(model, NUMBERS)
    found = discrete_adjoint(model, base_mean, path, terminal_slope, running_cost=running_cost)
    noisy = [k for k in range(STEPS) if k != QUIET]
    kl = sum(step_kl(model(k, path.states[k]), base_mean(k, path.states[k]), NUMBERS[k]) for k in noisy)
    end = model(STEPS - 1, path.states[-2])
    first_order = (terminal_slope(end) * end).sum(-1)
    running = sum(running_cost(k, path.states[k]) for k in range(STEPS))
    torch.testing.assert_close(found.kl, kl.detach(), **EXACT)
    torch.testing.assert_close(found.loss, (kl + running + first_order).mean().detach(), **EXACT)


def test_back_propagation_evaluates_each_step_once_and_hands_its_passes_to_the_caller():
    model, seen = Controlled(), []
    path = path_of(model, NUMBERS)
    expected = gradient_of(discrete_adjoint, model, path, noisy_end=False)
    keep = torch.tensor([True, False, True])

    @contextlib.contextmanager
    def around(k: int):
        seen.append(("enter", k))
        yield
        seen.append(("leave", k))

    def watched(k: int, x: Tensor) -> Tensor:
        seen.append(("mean", k))
        return model(k, x)

    def backward(loss: Tensor) -> None:
        seen.append(("backward", None))
        loss.backward()

    discrete_adjoint(
        watched,
        base_mean,
        path,
        terminal_slope,
        running_cost=running_cost,
        weigh=lambda costs: torch.where(keep, costs, 0.0).sum(),
        backward=backward,
        around=around,
    )
    each = [[("enter", k), ("mean", k), ("backward", None), ("leave", k)] for k in reversed(range(STEPS))]
    each[STEPS - 1 - QUIET] = [("mean", QUIET)]  # nothing is learnt there
    assert seen == sum(each, [])
    kept = Trajectory(path.states[:, keep], path.timesteps, path.stds)
    for partial, of_kept, whole in zip(
        model.gradients(), gradient_of(discrete_adjoint, model, kept, noisy_end=False), expected, strict=True
    ):
        torch.testing.assert_close(partial, of_kept, **EXACT)
        assert (partial - whole).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": lambda k, x: x[:1]}, r"mean returned shape \(1, 2\) for states of shape \(3, 2\); return one mean per state"),
        ({"base_mean": lambda k, x: x[:1]}, r"base_mean returned shape \(1, 2\)"),
        ({"mean": lambda k, x: Controlled()(k, x.detach())}, "does not depend on x through autograd"),
        ({"terminal": torch.zeros(BATCH)}, "the terminal adjoint has shape"),
        ({"lowest": STEPS + 1}, "lowest=7 is outside the grid"),
    ],
)
def test_the_full_adjoint_refuses_what_it_cannot_use(change, message):
    model = Controlled()
    path, end = path_of(model, NUMBERS), draw(BATCH, DIM, seed=5)
    arguments = {"mean": model, "base_mean": base_mean, "trajectory": path, "terminal": end}
    with pytest.raises(ValueError, match=message):
        full_adjoint(**arguments | change)
