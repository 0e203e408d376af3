r"""Four objectives for one control problem: how near the optimum each comes with the same number of network evaluations.

    python benchmarks/solvers.py [--quick] [--learning-rate 0.003]

**Problems.** K = 20 steps, and always the optimum of *that chain*, so that no error of the grid is in the control errors. A
linear-quadratic problem (d = 4, quadratic f and g, diagonal σ) and the Ornstein–Uhlenbeck process with linear g (d = 4, f = 0),
both by a Riccati recursion; a double well (d = 1, from one well to the other) and, for flow matching and d = 1, the tilts of a
Gaussian by a quadratic reward and of ½N(−1, .16) + ½N(1, .16) by r(x) = x, all three by backward induction on a grid. The first
three train a control u(x, t), the tilts a velocity network v(x, t) against a frozen one: the same small MLP, Adam, learning rate
and batch size for all objectives, starting from no control.

**Error.** E Σ_k h‖u_θ − u*‖² / E Σ_k h‖u*‖² along paths of the optimum: 1 without control. For tilts also W2 of ODE samples to
the exact tilt, which contains the error of the grid. Means over three seeds, ± half of their range.

**Work.** Network evaluations per path, counted, not timed: 1 for a forward, 1 more with a vector–Jacobian product (VJP) to the
state, 2 more with a backward pass to the weights, whether or not it also goes to the state. In tilts the base network is as large
as the trained one and counts as much; the drift of a control problem is a formula, counted but free. A run goes on until its
work, rounded up to whole updates, is that of the others. With S of K steps in the loss and j the earliest of these, one update is

| forward / + VJP / + backward | trained network | base network of a tilt | drift of a control problem |
|---|---|---|---|
| `adjoint_matching` | K / 0 / S | 1 / K − 1 − j / 0 | K + S + 1 / K − 1 − j / 0 |
| `basic_adjoint_matching`, `continuous_adjoint` | K / K − 1 / K | 1 / K − 1 / 0 | 2K + 1 / 2K − 2 / 0 |
| `discrete_adjoint` (every step evaluated anew) | K / 0 / K | 1 / K − 1 / 0 | K + 2 / 2K − 2 / 0 |
| `back_propagation` (the same, all graphs kept) | 0 / 0 / K | 1 / K − 1 / 0 | 2 / 2K − 2 / 0 |

The two with a full adjoint could leave steps out of the loss, too, but out of nothing else; a pass through the chain takes all.

**Memory.** Most bytes alive at a time in one update, in units of one evaluation of the network with its backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from diffusers_adjoint.core.control_cost import continuous_adjoint, discrete_adjoint
from diffusers_adjoint.core.matching import step_kl
from diffusers_adjoint.objectives import AdjointMatching, BasicAdjointMatching
from diffusers_adjoint.soc import FLOW, ControlProblem, PathSampler, memoryless_noise, solve

# The problems with known answers live with the tests that check them; a second copy here could not be trusted as much.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import problems as known  # noqa: E402

STEPS, BATCH, WIDTH, LEARNING_RATE = 20, 128, 64, 1e-2
UPDATES, SEEDS = 60, 3  # updates of Adjoint Matching with S = K; the other rows get its work
SHARES = (0.25, 0.5, 1.0)  # of the work, where errors are taken
NODES, NODE_WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()
Field = Callable[[Tensor, Tensor], Tensor]  # (x, t) → (B, d)
Mean = Callable[[int, Tensor], Tensor]  # (k, x) → (B, d)


class Network(nn.Module):
    """base(x, t) + MLP(x, t), (B, d) → (B, d), float64; the MLP is zero at the start."""

    def __init__(self, dim: int, base: Field | None) -> None:
        super().__init__()
        self.base, last = base, nn.Linear(WIDTH, dim)
        self.layers = nn.Sequential(nn.Linear(dim + 1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), last).double()
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        change = self.layers(torch.cat([x, t.expand(len(x), 1)], 1))
        return change if self.base is None else self.base(x, t) + change


class Counted:
    """A function of (x, t) that counts its evaluations by what they are used for.

    Hooks on a view of x, and on a zero with gradient that is added to the output, see which gradients a backward pass asks for.
    """

    def __init__(self, function: Field, trained: bool) -> None:
        self.function, self.calls = function, list[set[str]]()
        self.zero = torch.zeros((), dtype=torch.float64, requires_grad=trained)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        reached: set[str] = set()
        self.calls.append(reached)
        if torch.is_grad_enabled() and x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda _: reached.add("state"))
        output = self.function(x, t)
        if torch.is_grad_enabled() and self.zero.requires_grad:
            zero = self.zero.view_as(self.zero)
            zero.register_hook(lambda _: reached.add("weights"))
            output = output + zero
        return output

    def take(self) -> np.ndarray:
        """Evaluations since the last call of this: forward only, with a VJP, with a backward pass; (3,)."""
        kinds = Counter("weights" if "weights" in call else "state" if call else "forward" for call in self.calls)
        self.calls.clear()
        return np.array([kinds["forward"], kinds["state"], kinds["weights"]], dtype=float)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at a time; recomputation under a checkpoint is seen, too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in [x.untyped_storage() for x in tree_leaves(output) if isinstance(x, Tensor)]:
            if storage.data_ptr() not in given:  # else a view of an input, or the input itself
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return output

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class Task:
    """A control problem, its optimum and what is trained.

    Args:
        name: heading of its table.
        dim: d.
        problem: calls `base`.
        base: the drift, or the frozen velocity network.
        optimum: (k, x) → μ_k*(x), the best step means of this chain.
        point: x_0 of all paths; `None` for N(0, I).
        sampler, target: of a tilt, where `sampler.mean(network)` is trained, and not `problem.mean(network)`; the exact tilt.
    """

    name: str
    dim: int
    problem: ControlProblem
    base: Counted
    optimum: Mean
    point: float | None = None
    sampler: PathSampler | None = None
    target: known.GaussianMixture | None = None

    def network(self) -> Network:
        return Network(self.dim, None if self.sampler is None else self.base.function)

    def mean(self, network: Field) -> Mean:
        return (self.problem if self.sampler is None else self.sampler).mean(network)

    def batch(self, generator: torch.Generator, size: int = BATCH) -> Tensor:
        noise = torch.randn(size, self.dim, generator=generator, dtype=torch.float64)
        return noise if self.point is None else torch.full_like(noise, self.point)

    @cached_property
    def paths(self) -> list[tuple[int, Tensor, Tensor]]:
        """k, x_k and μ_k*(x_k) of 500 paths of the optimum."""
        generator, found = torch.Generator().manual_seed(12345), []
        x = self.batch(generator, 500)
        for k, std in enumerate(self.problem.stds):
            best = self.optimum(k, x)
            found.append((k, x, best))
            x = best + std * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return found

    def control_error(self, mean: Mean) -> float:
        stds, missed, spent = self.problem.stds, 0.0, 0.0
        with torch.no_grad():
            for k, x, best in self.paths:
                missed += ((mean(k, x) - best) / stds[k]).square().sum().item()
                spent += ((best - self.problem.base_mean(k, x)) / stds[k]).square().sum().item()
        return missed / spent

    def tilt_error(self, network: Field) -> float:
        """W2 of 1024 samples by 50 steps without noise; from a Sobol' sequence, so that chance is small."""
        levels = torch.quasirandom.SobolEngine(self.dim, scramble=True, seed=0).draw(1024, dtype=torch.float64)
        with torch.no_grad():
            states = PathSampler(FLOW, lambda t: 0.0, times(50)).sample(
                network, torch.special.ndtri(levels.clamp(1e-6, 1 - 1e-6))
            )
        return known.sliced_w2(states[-1], self.target)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def times(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def affine_task(name: str, diagonal: Tensor, running: float, terminal: float, slope: Tensor, steps: int) -> Task:
    """Drift Ax with A = diag + .4 above the diagonal, f = ½ running ‖x‖², g = ½ terminal ‖x‖² + slope·x, σ = (.6, .8, 1, 1.2)."""
    eye, matrix = torch.eye(4, dtype=torch.float64), torch.diag(diagonal) + 0.4 * torch.ones(4, 4, dtype=torch.float64).triu(1)
    law = known.LinearQuadratic(matrix, running * eye, terminal * eye, slope, double(0.6, 0.8, 1.0, 1.2))
    base, grid = Counted(law.drift, trained=False), times(steps)
    problem = ControlProblem.euler(base, lambda t: law.sigma, grid, law.terminal_cost, law.running_cost if running else None)
    chain = law.chain(grid)
    return Task(name, 4, problem, base, chain.controlled(*chain.optimal_control(*law.chain_costs(grid))).mean)


def linear_quadratic(steps: int) -> Task:
    return affine_task("Linear-quadratic, d = 4", double(0.5, -0.5, 0.2, -1), 1.0, 0.5, double(1, -1, 0.5, 0), steps)


def ornstein_uhlenbeck(steps: int) -> Task:
    return affine_task("Ornstein–Uhlenbeck, linear cost, d = 4", double(-1, -1, -1, -1), 0.0, 0.0, double(1, -1, 0.5, 1.5), steps)


def double_well(steps: int) -> Task:
    well = known.DoubleWell()
    base = Counted(well.drift, trained=False)
    problem = ControlProblem.euler(base, lambda t: well.sigma, times(steps), well.terminal_cost)
    optimum = line_optimum(problem, torch.linspace(-3, 3, 1201, dtype=torch.float64))  # beyond it the drift points inwards
    return Task("Double well, d = 1", 1, problem, base, optimum, point=-1.0)


def gaussian_tilt(steps: int) -> Task:
    reward = known.QuadraticReward(double(2.0), double(0.5)[None], double(0.0))
    return tilt_task("Gaussian tilt, d = 1", known.mixture_1d([1.0], [-0.5], [0.5]), reward, steps)


def mixture_tilt(steps: int) -> Task:
    law = known.mixture_1d([0.5, 0.5], [-1, 1], [0.16, 0.16])
    return tilt_task("Mixture tilt, d = 1", law, known.QuadraticReward.linear(double(1.0)), steps)


def tilt_task(name: str, law: known.GaussianMixture, reward: known.QuadraticReward, steps: int) -> Task:
    base, sampler = Counted(exact_velocity(law), trained=False), PathSampler(FLOW, memoryless_noise(FLOW), times(steps))
    problem = sampler.tilt(base, reward)
    optimum = line_optimum(problem, torch.linspace(-8, 8, 801, dtype=torch.float64))
    return Task(name, 1, problem, base, optimum, None, sampler, law.tilt(reward)[0])


def exact_velocity(law: known.GaussianMixture) -> Field:
    """E[X_1 − X_0 | X_t = x] = Σ_i p_i(x) (m_i + (t c_i − (1 − t)) (x − t m_i)/s_i) with s_i = t² c_i + (1 − t)², d = 1."""
    means, variances = law.means[:, 0], law.covariances[:, 0, 0]  # `law.denoise`, for any d, takes twice as long

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        spread, away = t**2 * variances + (1 - t) ** 2, x - t * means
        posterior = torch.softmax(law.weights.log() - 0.5 * spread.log() - away**2 / (2 * spread), 1)
        return (posterior * (means + (t * variances - (1 - t)) / spread * away)).sum(1, keepdim=True)

    return velocity


def line_optimum(problem: ControlProblem, axis: Tensor) -> Mean:
    """Best step means of a chain on the line without running cost, linear between the points of `axis`, constant beyond.

    The change δ of step k's mean solves δ = −s² E[V'_{k+1}(μ + δ + sξ)], and V'_k = μ' E[V'_{k+1}] (Gauss–Hermite quadrature).
    """
    slope, changes = problem.terminal_adjoint(axis[:, None])[:, 0], list[Tensor]()
    for k in reversed(range(len(problem.stds))):
        x = axis[:, None].requires_grad_()
        mean, std, change = problem.base_mean(k, x), problem.stds[k], torch.zeros_like(axis)
        (jacobian,) = torch.autograd.grad(mean.sum(), x)
        for _ in range(400):
            points = (mean.detach()[:, 0] + change)[:, None] + std * NODES
            expected = torch.from_numpy(np.interp(points, axis, slope)) @ NODE_WEIGHTS
            miss = -(std**2) * expected - change
            change = change + 0.7 * miss  # damped: the map can oscillate
            if miss.abs().max() < 1e-9:
                break
        else:
            raise RuntimeError(f"no optimum of step {k} after 400 iterations; the last change was {float(miss.abs().max()):.1e}.")
        slope = jacobian[:, 0] * expected
        changes.insert(0, change)
    return lambda k, x: problem.base_mean(k, x) + torch.from_numpy(np.interp(x.detach(), axis, changes[k]))


TASKS = (linear_quadratic, ornstein_uhlenbeck, double_well, gaussian_tilt, mixture_tilt)


@dataclass(frozen=True)
class Method:
    """A row of the tables: the name of an objective of `solve` or "back_propagation", and S/K."""

    name: str
    share: float = 1.0

    def __str__(self) -> str:
        return f"`{self.name}`" + (f", S = K/{1 / self.share:.0f}" if self.share < 1 else "")

    def update(self, task: Task, mean: Mean, optimizer: torch.optim.Optimizer, seed: int) -> None:
        if self.name == "back_propagation":
            optimizer.zero_grad()
            back_propagate(task, mean, torch.Generator().manual_seed(seed))
            optimizer.step()
        else:
            steps = None if self.share == 1 else round(self.share * len(task.problem.stds))
            solve(task.problem, mean, optimizer, task.batch, 1, objective=OBJECTIVES[self.name], num_loss_steps=steps, seed=seed)


OBJECTIVES = {
    "adjoint_matching": AdjointMatching(),
    "basic_adjoint_matching": BasicAdjointMatching(),
    "continuous_adjoint": continuous_adjoint,
    "discrete_adjoint": discrete_adjoint,
}
METHODS = (Method("adjoint_matching"), Method("adjoint_matching", 0.25), Method("basic_adjoint_matching"))
METHODS += (Method("continuous_adjoint"), Method("discrete_adjoint"), Method("back_propagation"))


def back_propagate(task: Task, mean: Mean, generator: torch.Generator) -> None:
    """One backward pass through the whole chain, with the graphs of all steps alive."""
    problem, x, cost = task.problem, task.batch(generator), torch.zeros(BATCH, dtype=torch.float64)
    for k, std in enumerate(problem.stds):
        if problem.running_cost is not None:
            cost = cost + problem.running_cost(k, x)
        moved = mean(k, x)
        cost = cost + step_kl(moved, problem.base_mean(k, x), std)
        x = moved + std * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    (cost + problem.terminal_cost(x)).mean().backward()


def count(task: Task, method: Method, updates: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations of the trained network and of the base, (3,) each, means over updates."""
    network = task.network()
    counted, optimizer = Counted(network, trained=True), torch.optim.SGD(network.parameters(), 0.0)
    task.base.take()
    for seed in range(updates):
        method.update(task, task.mean(counted), optimizer, seed)
    return counted.take() / updates, task.base.take() / updates


def work(task: Task, network: np.ndarray, base: np.ndarray) -> float:
    return float((1, 2, 3) @ (network if task.sampler is None else network + base))


def memory(task: Task, method: Method) -> float:
    """Peak of one update, in peaks of one evaluation of the network with its backward pass."""
    network, x = task.network(), task.batch(torch.Generator().manual_seed(0))
    with LiveBytes() as one:
        network(x, task.problem.times[1]).sum().backward()
    with LiveBytes() as update:
        method.update(task, task.mean(network), torch.optim.SGD(network.parameters(), 0.0), 0)
    return update.peak / one.peak


def train(task: Task, method: Method, budget: float, seed: int, learning_rate: float) -> list[float]:
    """The number of updates, control errors after SHARES of the budget, and for a tilt W2 at the end."""
    torch.manual_seed(seed)
    network, updates, spent, errors = task.network(), 0, 0.0, list[float]()
    counted, optimizer = Counted(network, trained=True), torch.optim.Adam(network.parameters(), learning_rate)
    for share in SHARES:
        while spent < share * budget:
            task.base.take()
            method.update(task, task.mean(counted), optimizer, seed=100_000 * seed + updates)
            spent, updates = spent + work(task, counted.take(), task.base.take()), updates + 1
        errors.append(task.control_error(task.mean(network)))
    return [updates, *errors] + ([] if task.target is None else [task.tilt_error(network)])


def print_costs() -> None:
    print(f"\nCost of one update. Evaluations: forward / + VJP / + backward, K = {STEPS}. Memory: K = {STEPS}, {2 * STEPS}.\n")
    print("| | control problem: network | drift | work | memory | tilt: network | base | work | memory |\n|---|" + "---|" * 8)
    pairs = [(make(STEPS), make(2 * STEPS)) for make in (linear_quadratic, gaussian_tilt)]
    for method in METHODS:
        cells = []
        for task, longer in pairs:
            counts = count(task, method)
            cells += [" / ".join(f"{n:.3g}" for n in row) for row in counts]
            cells += [f"{work(task, *counts):.0f}", f"{memory(task, method):.1f}, {memory(longer, method):.1f}"]
        print(f"| {method} | {' | '.join(cells)} |")


def print_errors(task: Task, budget: float, found: dict[Method, list[list[float]]]) -> None:
    """`found`: for each method and seed, what `train` returns."""
    start = "" if task.target is None else f"; W2 of the base {task.tilt_error(task.base):.3f}"
    print(f"\n**{task.name}**, W = {budget:.0f}{start}\n")
    heads = ["updates", "error at ¼ W", "½ W", "W"] + ["W2 at W"] * (task.target is not None)
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for method, runs in found.items():
        updates, *errors = zip(*runs, strict=True)
        cells = [f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}" for values in errors]
        print(f"| {method} | {statistics.mean(updates):.0f} | {' | '.join(cells)} |")
    print(f"\n{verdict({method: [run[len(SHARES)] for run in runs] for method, runs in found.items()})}")


def verdict(final: dict[Method, list[float]]) -> str:
    """Whether Adjoint Matching has the lower error at equal work than the best of the paper's others; open if ranges overlap."""
    rivals = [method for method in final if method.name not in ("adjoint_matching", "back_propagation")]
    rival, found = min(rivals, key=lambda method: statistics.mean(final[method])), []
    for method in [method for method in final if method.name == "adjoint_matching"]:
        lower, higher = max(final[method]) < min(final[rival]), min(final[method]) > max(final[rival])
        found.append(f"{method}: {'reproduced' if lower else 'the reverse' if higher else 'no difference beyond the spread'}")
    return f"The paper's finding, a lower error by Adjoint Matching for equal work, against {rival}: {'; '.join(found)}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Objectives of stochastic optimal control at equal work.")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="Adam's, the same for all")
    parser.add_argument("--quick", action="store_true", help="a few updates, one seed: costs are right, errors mean nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small tensors: more threads are slower
    updates, seeds = (4, 1) if options.quick else (UPDATES, SEEDS)

    print_costs()
    progress = tqdm(total=len(TASKS) * len(METHODS) * seeds, unit="run")
    for make in TASKS:
        task, found = make(STEPS), {}
        budget = updates * work(task, *count(task, METHODS[0], 1))
        for method in METHODS:
            found[method] = []
            for seed in range(seeds):
                found[method].append(train(task, method, budget, seed, options.learning_rate))
                progress.update()
        print_errors(task, budget, found)
    progress.close()


if __name__ == "__main__":
    main()
