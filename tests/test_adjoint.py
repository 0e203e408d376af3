"""The lean adjoint against autograd, finite differences and its own contract, on a bent (non-affine) float64 chain."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from adjoints import lean_from_end
from torch import Tensor

from diffusers_adjoint.core.adjoint import lean_adjoint
from diffusers_adjoint.core.trajectory import Trajectory, rollout

STEPS, BATCH, DIM = 6, 3, 2
QUIET = 2  # the step without noise
TIMESTEPS = torch.linspace(1000, 100, STEPS)
STDS = torch.full((STEPS,), 0.4, dtype=torch.float64).index_fill(0, torch.tensor([QUIET]), 0.0)
# Autograd and the adjoint multiply the same float64 Jacobians in another order: 1e-12 leaves three digits of slack.
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS, NOISE, START = draw(STEPS, DIM, DIM, seed=1), draw(STEPS, BATCH, DIM, seed=2), draw(BATCH, DIM, seed=3)
TRAINED = torch.ones(1, dtype=torch.float64, requires_grad=True)


def bent(k: int, x: Tensor) -> Tensor:
    return 0.9 * x + 0.5 * torch.tanh(x @ WEIGHTS[k])


def reward(x: Tensor) -> Tensor:
    return torch.sin(x).sum(-1) - 0.1 * x.pow(4).sum(-1)


def reward_grad(x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(reward(x).sum(), x)[0]


def terminal(end: Tensor) -> Tensor:
    return -reward_grad(end)


def base_jacobians(k: int, states: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(lambda x: bent(k, x), x) for x in states])


def base_path(*, keep_last: bool = True) -> Trajectory:
    return rollout(bent, START, TIMESTEPS, STDS, lambda k: NOISE[k], keep_last=keep_last)


def carry_to_end(x: Tensor, k: int, *, noisy_end: bool) -> Tensor:
    """x_K (or the noiseless x̂_K) from x_k under the base, with the path's noise held fixed."""
    for j in range(k, STEPS):
        x = bent(j, x)
        if noisy_end or j < STEPS - 1:
            x = x + STDS[j] * NOISE[j]
    return x


@pytest.mark.parametrize("noisy_end", [True, False])
def test_along_a_base_path_it_is_the_gradient_through_the_whole_chain(noisy_end):
    path = base_path()
    lean = lean_adjoint(bent, path, terminal(path.states[-1])) if noisy_end else lean_from_end(bent, path, terminal)
    for k in range(STEPS + 1):
        if k == STEPS and not noisy_end:
            continue  # x_K is noisy, x̂_K is not a function of it
        x = path.states[k].clone().requires_grad_()
        chain = torch.autograd.grad(-reward(carry_to_end(x, k, noisy_end=noisy_end)).sum(), x)[0]
        torch.testing.assert_close(lean.adjoints[k], chain, **EXACT)


def test_along_a_base_path_it_is_the_finite_difference_of_the_terminal_cost():
    path, width = base_path(), 1e-5
    lean = lean_from_end(bent, path, terminal)
    for k in range(STEPS):
        for axis in torch.eye(DIM, dtype=torch.float64):
            up, down = (carry_to_end(path.states[k] + sign * width * axis, k, noisy_end=False) for sign in (1, -1))
            slope = -(reward(up) - reward(down)) / (2 * width)
            # Central differences: truncation ~ width² = 1e-10, rounding ~ 1e-16/width = 1e-11, times numbers ~ 10.
            torch.testing.assert_close(lean.adjoints[k] @ axis, slope, atol=1e-8, rtol=0)


def test_along_any_other_path_it_is_the_product_of_the_base_s_jacobians_there():
    path = Trajectory(draw(STEPS, BATCH, DIM, seed=4), TIMESTEPS, STDS)  # no chain visits these states
    lean = lean_from_end(bent, path, terminal)
    expected = terminal(bent(STEPS - 1, path.states[-1]))
    for k in reversed(range(STEPS)):
        expected = torch.einsum("bi,bij->bj", expected, base_jacobians(k, path.states[k]))
        torch.testing.assert_close(lean.adjoints[k], expected, **EXACT)


def test_one_step_s_product_is_the_finite_difference_of_the_contracted_mean():
    path, cotangent, width = base_path(), draw(BATCH, DIM, seed=5), 1e-5
    stepped = lean_adjoint(bent, path, cotangent, lowest=STEPS - 1).adjoints[STEPS - 1]
    direction, x = draw(BATCH, DIM, seed=6), path.states[STEPS - 1]
    up, down = ((bent(STEPS - 1, x + sign * width * direction) * cotangent).sum(-1) for sign in (1, -1))
    # As above: 1e-10 truncation and 1e-11 rounding, times numbers of order ten.
    torch.testing.assert_close((stepped * direction).sum(-1), (up - down) / (2 * width), atol=1e-8, rtol=0)


def test_a_step_without_noise_passes_the_adjoint_through():
    lean = lean_from_end(bent, base_path(), terminal)
    expected = torch.einsum("bi,bij->bj", lean.adjoints[QUIET + 1], base_jacobians(QUIET, base_path().states[QUIET]))
    torch.testing.assert_close(lean.adjoints[QUIET], expected, **EXACT)


def test_the_running_cost_enters_as_its_gradient_at_every_step():
    def cost(k: int, x: Tensor) -> Tensor:
        return (k + 1) * torch.cos(x).sum(-1)

    def cost_grad(k: int, x: Tensor) -> Tensor:
        return -(k + 1) * torch.sin(x)

    path = base_path()
    lean = lean_from_end(bent, path, terminal, running_cost_grad=cost_grad)
    for k in range(STEPS):
        start = x = path.states[k].clone().requires_grad_()
        total = torch.zeros(BATCH, dtype=torch.float64)
        for j in range(k, STEPS):
            total = total + cost(j, x)
            x = bent(j, x) + (STDS[j] * NOISE[j] if j < STEPS - 1 else 0)
        torch.testing.assert_close(lean.adjoints[k], torch.autograd.grad((total - reward(x)).sum(), start)[0], **EXACT)


@pytest.mark.parametrize("lowest", range(STEPS + 1))
@pytest.mark.parametrize("lowest_base_mean", [None, "lowest"])
@pytest.mark.parametrize("kind", ["tensor", "end point"])
def test_it_fills_and_evaluates_exactly_what_was_asked_for(kind, lowest, lowest_base_mean):
    path, evaluated, with_graph = base_path(), [], []

    def mean(k: int, x: Tensor) -> Tensor:
        evaluated.append(k)
        with_graph.append(torch.is_grad_enabled() and x.requires_grad)
        return bent(k, x)

    full = lean_from_end(bent, path, terminal)
    last = lowest if lowest_base_mean == "lowest" else None
    if kind == "tensor":
        lean = lean_adjoint(mean, path, full.adjoints[-1], lowest, lowest_base_mean=last)
    else:
        lean = lean_from_end(mean, path, terminal, lowest, lowest_base_mean=last)

    means_from = max(lowest - 1, 0) if last is None else lowest
    if kind == "end point":
        means_from = min(means_from, STEPS - 1)  # the end point is the last step's mean
    assert evaluated == list(range(STEPS - 1, means_from - 1, -1))
    # A step below `lowest` is needed for its mean only: no graph is built for it; the end point has one in any case.
    assert with_graph == [k >= lowest or (kind == "end point" and k == STEPS - 1) for k in evaluated]
    assert torch.equal(lean.adjoints[lowest:], full.adjoints[lowest:])
    assert torch.equal(lean.base_means[means_from:], full.base_means[means_from:])
    assert lean.adjoints[:lowest].isnan().all() and lean.base_means[:means_from].isnan().all()


def test_base_means_are_the_base_s_means_at_the_states():
    path = base_path()
    expected = torch.stack([bent(k, path.states[k]) for k in range(STEPS)])
    assert torch.equal(lean_from_end(bent, path, terminal).base_means, expected)


def test_the_end_point_is_noiseless_and_detached():
    path, seen = base_path(), []

    def watch(end: Tensor) -> Tensor:
        seen.append(end)
        return terminal(end)

    lean = lean_from_end(bent, path, watch)
    assert len(seen) == 1 and not seen[0].requires_grad
    assert torch.equal(seen[0], bent(STEPS - 1, path.states[STEPS - 1]))
    assert torch.equal(lean.adjoints[-1], terminal(seen[0]))


def test_the_last_state_is_not_read():
    path = base_path()
    poisoned = Trajectory(path.states.clone().index_fill_(0, torch.tensor(STEPS), torch.nan), TIMESTEPS, STDS)
    short = Trajectory(path.states[:-1], TIMESTEPS, STDS)
    expected = lean_from_end(bent, path, terminal)
    for other in (poisoned, short):
        lean = lean_from_end(bent, other, terminal)
        assert torch.equal(lean.adjoints, expected.adjoints) and torch.equal(lean.base_means, expected.base_means)


@pytest.mark.parametrize("kind", ["tensor", "end point"])
def test_one_step_s_activations_are_alive_at_a_time(kind):
    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    alive: weakref.WeakSet[Box] = weakref.WeakSet()
    left_over, stored = [], []

    def mean(k: int, x: Tensor) -> Tensor:
        left_over.append(len(alive))
        out = bent(k, x)
        stored.append(len(alive))
        return out

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor)
        alive.add(box)
        return box

    path = base_path()
    gc.disable()  # reference counting alone must free a step: a cycle would keep activations until a collection
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            if kind == "tensor":
                lean_adjoint(mean, path, terminal(path.states[-1]))
            else:
                lean_from_end(mean, path, terminal)
    finally:
        gc.enable()
    assert min(stored) > 0, "the hooks saw no activation, so this test proves nothing"
    assert left_over == [0] * STEPS and not alive


def test_no_gradient_reaches_the_base_the_trajectory_or_the_reward():
    leaves = gain, taste, price = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    path = base_path()
    lean = lean_from_end(
        lambda k, x: gain * bent(k, x),
        path,
        lambda end: taste * terminal(end),
        running_cost_grad=lambda k, x: price * x,
    )
    assert not lean.adjoints.requires_grad and not lean.base_means.requires_grad
    assert all(leaf.grad is None for leaf in leaves) and path.states.grad is None


def test_it_works_under_no_grad_as_a_training_step_may_wrap_it():
    path = base_path()
    with torch.no_grad():
        lean = lean_from_end(bent, path, terminal)
    assert torch.equal(lean.adjoints, lean_from_end(bent, path, terminal).adjoints)


def test_it_is_linear_in_the_terminal_adjoint():
    path = base_path()
    first, second = draw(BATCH, DIM, seed=7), draw(BATCH, DIM, seed=8)
    one, two, both = (lean_adjoint(bent, path, a).adjoints for a in (first, second, 3 * first - 2 * second))
    torch.testing.assert_close(both, 3 * one - 2 * two, **EXACT)


def test_it_treats_samples_independently():
    path = base_path()
    whole = lean_from_end(bent, path, terminal).adjoints
    for i in range(BATCH):
        alone = lean_from_end(bent, Trajectory(path.states[:, i : i + 1], TIMESTEPS, STDS), terminal).adjoints
        # A matrix product over one row may round differently from the same row in a batch.
        torch.testing.assert_close(alone[:, 0], whole[:, i], **EXACT)


def test_states_keep_their_dtype_when_the_base_computes_in_another():
    path = Trajectory(base_path().states.float(), TIMESTEPS, STDS)
    lean = lean_from_end(lambda k, x: bent(k, x.double()), path, terminal)
    assert lean.adjoints.dtype == lean.base_means.dtype == torch.float32
    # float32 keeps 24 bits; six steps of rounding the state and the adjoint.
    exact = lean_from_end(bent, Trajectory(path.states.double(), TIMESTEPS, STDS), terminal).adjoints
    torch.testing.assert_close(lean.adjoints.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lowest": -1}, "lowest=-1 is outside the grid; pass a step from 0 to 6"),
        ({"lowest": STEPS + 1}, "lowest=7 is outside the grid"),
        ({"lowest_base_mean": -1}, "lowest_base_mean=-1 is outside the grid; pass a step from 0 to 6"),
        ({"terminal": torch.zeros(BATCH)}, r"terminal adjoint has shape \(3,\); it must be the states' shape \(3, 2\)"),
        ({"base_mean": lambda k, x: bent(k, x.detach())}, "does not depend on x through autograd"),
        ({"base_mean": lambda k, x: TRAINED * x.detach()}, "does not depend on x through autograd"),
        ({"base_mean": lambda k, x: x[:1]}, r"base_mean returned shape \(1, 2\) for states of shape \(3, 2\)"),
    ],
)
def test_it_refuses_what_it_cannot_use(change, message):
    arguments = {"base_mean": bent, "trajectory": base_path(), "terminal": draw(BATCH, DIM, seed=5)} | change
    with pytest.raises(ValueError, match=message):
        lean_adjoint(**arguments)
