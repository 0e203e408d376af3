"""Control problems, paths and noise schedules of `diffusers_adjoint.soc`, against closed forms and the answers of `problems`."""

from __future__ import annotations

import math

import pytest
import torch
from problems import AffineChain, DoubleWell, LinearQuadratic, QuadraticReward, gaussian, mixture_1d, model_output, sliced_w2
from samplers import draw, tensor
from torch import Tensor

from diffusers_adjoint.core.adjoint import lean_adjoint
from diffusers_adjoint.core.control_cost import continuous_adjoint, discrete_adjoint
from diffusers_adjoint.core.matching import LossSteps, matching_loss, path_kl
from diffusers_adjoint.core.trajectory import rollout
from diffusers_adjoint.objectives import AdjointMatching, BasicAdjointMatching, OneStep, Targets
from diffusers_adjoint.schedulers.integrators import posterior
from diffusers_adjoint.soc import (
    COSINE,
    FLOW,
    ControlProblem,
    PathSampler,
    check_noise,
    correlation,
    leftover_memory,
    memoryless_noise,
    solve,
)
from diffusers_adjoint.soc.solver import accumulate_gradient

EXACT = {"atol": 1e-11, "rtol": 1e-11}
PATHS = {"flow": FLOW, "cosine": COSINE}
REGRESSIONS = {"adjoint_matching": AdjointMatching(), "basic_adjoint_matching": BasicAdjointMatching()}
OBJECTIVES = {**REGRESSIONS, "continuous_adjoint": continuous_adjoint, "discrete_adjoint": discrete_adjoint}
LQ = LinearQuadratic(
    matrix=tensor([[-0.4, 0.3], [0.1, 0.2]]),
    running=tensor([[0.8, 0.2], [0.2, 0.5]]),
    terminal=tensor([[1.0, -0.3], [-0.3, 1.5]]),
    slope=tensor([0.5, -0.4]),
    sigma=tensor([0.9, 0.6]),
)
ORNSTEIN_UHLENBECK = LinearQuadratic(
    matrix=LQ.matrix, running=torch.zeros(2, 2).double(), terminal=torch.zeros(2, 2).double(), slope=LQ.slope, sigma=LQ.sigma
)


def grid(steps: int, start: float = 0.0) -> Tensor:
    return torch.linspace(start, 1, steps + 1, dtype=torch.float64)


def euler(problem: LinearQuadratic | DoubleWell, steps: int) -> ControlProblem:
    running = problem.running_cost if isinstance(problem, LinearQuadratic) else None
    return ControlProblem.euler(problem.drift, lambda t: problem.sigma, grid(steps), problem.terminal_cost, running)


# ---------------------------------------------------------------------------------------------------------------- problems


def test_the_euler_chain_is_the_reference_s():
    problem, chain = euler(LQ, 12), LQ.chain(grid(12))
    ours = AffineChain.of(problem.base_mean, problem.stds, 2)
    torch.testing.assert_close(ours.jacobians, chain.jacobians, **EXACT)
    torch.testing.assert_close(problem.stds, chain.stds.expand(12, 2), **EXACT)
    x, reward = draw(5, 2, seed=0), LQ.chain_costs(grid(12))[0]
    torch.testing.assert_close(problem.terminal_adjoint(x), -reward.grad(x), **EXACT)
    torch.testing.assert_close(problem.running_cost_grad(3, x), x @ LQ.running / 12, **EXACT)
    assert euler(DoubleWell(), 4).running_cost_grad is None


def test_a_control_enters_with_the_root_of_the_step():
    problem, x = euler(LQ, 12), draw(5, 2, seed=0)
    moved = problem.mean(lambda x, t: x * t)(3, x) - problem.base_mean(3, x)
    torch.testing.assert_close(moved, x * 3 / 12 * LQ.sigma / 12, **EXACT)  # h σ u


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_at_the_riccati_optimum_every_objective_is_stationary(objective):
    """Along noiseless paths of the affine chain expectation and value are one; lean adjoints are stationary there as well."""
    times = grid(8)
    problem, chain = euler(LQ, 8), LQ.chain(times)
    gains, offsets = (values.clone().requires_grad_() for values in chain.optimal_control(*LQ.chain_costs(times)))

    def mean(k: int, x: Tensor) -> Tensor:
        return problem.base_mean(k, x) + problem.stds[k] * (x @ gains[k].T + offsets[k])

    path = rollout(mean, 2 * draw(6, 2, seed=1), times[:-1], problem.stds, lambda k: torch.zeros(6, 2), keep_last=True)
    accumulate_gradient(problem, mean, path, LossSteps(tuple(range(8)), (1.0,) * 8), objective)
    for parameter in (gains, offsets):
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), **EXACT)
    with torch.no_grad():
        gains *= 0.9
    accumulate_gradient(problem, mean, path, LossSteps(tuple(range(8)), (1.0,) * 8), objective)
    assert gains.grad.abs().max() > 0.01  # beside it, it is not


def test_the_lean_loss_is_zero_at_the_optimum_of_a_linear_cost():
    """T1: the adjoint of an Ornstein–Uhlenbeck process is the same on every path, so that nothing is left of the loss."""
    times = grid(10)
    problem, chain = euler(ORNSTEIN_UHLENBECK, 10), ORNSTEIN_UHLENBECK.chain(times)
    _, offsets = chain.optimal_control(*ORNSTEIN_UHLENBECK.chain_costs(times))
    mean = lambda k, x: problem.base_mean(k, x) + problem.stds[k] * offsets[k]  # noqa: E731
    noise = draw(10, 6, 2, seed=2)
    path = rollout(mean, draw(6, 2, seed=1), times[:-1], problem.stds, lambda k: noise[k], keep_last=True)
    lean = lean_adjoint(problem.base_mean, path, problem.terminal_adjoint(path.states[-1]))
    for k in range(10):
        # Rounding of some 1e-16 over stds of .2, squared.
        assert matching_loss(mean(k, path.states[k]), lean.base_means[k], problem.stds[k], lean.adjoints[k + 1]).max() < 1e-28
        closed_form = torch.linalg.matrix_exp((1 - times[k + 1]) * ORNSTEIN_UHLENBECK.matrix.T) @ ORNSTEIN_UHLENBECK.slope
        torch.testing.assert_close(lean.adjoints[k + 1, 0], closed_form, atol=0.03, rtol=0)  # Euler, h = 1/10


@pytest.mark.parametrize("objective", REGRESSIONS.values(), ids=REGRESSIONS)
def test_the_gradient_of_a_few_steps_is_that_of_all_on_the_average(objective):
    """Each of four steps alone, chosen with probability ¼: the four gradients average to the whole one."""
    problem, control = euler(LQ, 4), Net(dim=2).double()
    torch.nn.init.normal_(control.net[-1].weight)
    noise = draw(4, 6, 2, seed=2)
    path = rollout(
        problem.mean(control), draw(6, 2, seed=1), problem.times[:-1], problem.stds, lambda k: noise[k], keep_last=True
    )

    def gradient(steps: LossSteps) -> Tensor:
        control.zero_grad()
        accumulate_gradient(problem, problem.mean(control), path, steps, objective)
        return torch.cat([parameter.grad.flatten() for parameter in control.parameters()])

    whole = gradient(LossSteps((0, 1, 2, 3), (1.0,) * 4))
    parts = torch.stack([gradient(LossSteps((k,), (0.25,))) for k in range(4)])
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(parts.mean(0), whole, **EXACT)


def test_the_base_is_evaluated_down_to_the_earliest_loss_step():
    problem, evaluated = euler(LQ, 6), []
    watched = ControlProblem(
        lambda k, x: evaluated.append(k) or problem.base_mean(k, x), problem.times, problem.stds, problem.terminal_cost
    )
    path = rollout(
        problem.base_mean, draw(3, 2, seed=1), problem.times[:-1], problem.stds, lambda k: draw(3, 2, seed=k), keep_last=True
    )
    gain = torch.ones(1, dtype=torch.float64, requires_grad=True)
    accumulate_gradient(watched, lambda k, x: gain * x, path, LossSteps((3, 5), (1.0, 1.0)))
    assert evaluated == [5, 4, 3]


class ByNumbers:
    """An objective that asks for the value of the cost alone."""

    needs_gradient = False

    def targets(self, chain, steps, score):
        path, chosen = chain.rollout(), list(steps.indices)
        scored = score(chain.end_point(path, of="base").state)
        self.scored = scored
        base_means = torch.stack([chain.base_mean(k, path.states[k]) for k in chosen])
        shifts = scored.exponent.view(1, -1, 1).expand_as(base_means)
        return Targets(path.states[chosen], steps, shifts, base_means, path.stds[chosen], scored)


def test_an_objective_without_need_of_a_gradient_takes_any_cost():
    """The cost is a step function: its gradient is not asked for, and its value is minus the exponent."""
    problem, objective = euler(LQ, 4), ByNumbers()
    steep = ControlProblem(problem.base_mean, problem.times, problem.stds, lambda x: (x > 0).double().sum(1))
    control = Net(dim=2).double()
    path = rollout(
        problem.mean(control), draw(3, 2, seed=1), problem.times[:-1], problem.stds, lambda k: draw(3, 2, seed=k), keep_last=True
    )
    accumulate_gradient(steep, steep.mean(control), path, LossSteps((1, 3), (1.0, 1.0)), objective)
    assert torch.equal(objective.scored.exponent, -(path.states[-1] > 0).double().sum(1))
    assert objective.scored.tilt.isnan().all() and objective.scored.usable.all()
    assert control.net[-1].weight.grad.abs().max() > 0


class AffineControl(torch.nn.Module):
    """u(x, t) = G_k x + g_k, a table: with it the optimum of an affine chain can be reached to rounding."""

    def __init__(self, steps: int, dim: int) -> None:
        super().__init__()
        self.gains = torch.nn.Parameter(torch.zeros(steps, dim, dim).double())
        self.offsets = torch.nn.Parameter(torch.zeros(steps, dim).double())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        k = round(float(t) * len(self.gains))
        return x @ self.gains[k].T + self.offsets[k]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_solving_reaches_the_riccati_control(objective):
    steps, times = 8, grid(8)
    problem, control = euler(LQ, steps), AffineControl(steps, 2)
    optimizer = torch.optim.Adam(control.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    start = lambda generator: torch.randn(128, 2, generator=generator).double()  # noqa: E731
    losses = solve(
        problem, problem.mean(control), optimizer, start, 120, objective=objective, on_update=lambda *_: schedule.step()
    )
    assert losses.shape == (120,)
    gains, offsets = LQ.chain(times).optimal_control(*LQ.chain_costs(times))
    for found, best in ((control.gains, gains), (control.offsets, offsets)):
        best = best * steps**0.5  # √Δ u = √h u
        # 120 noisy updates with a decaying rate; the optimum itself reaches 1.6.
        assert (found - best).abs().max() < 0.1
        assert best.abs().max() > 0.3


class Net(torch.nn.Module):
    """u(x, t) or a correction of a velocity, zero at first."""

    def __init__(self, dim: int = 1, width: int = 48) -> None:
        super().__init__()
        layers = [torch.nn.Linear(dim + 3, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(width, dim))
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        features = torch.stack([t, (math.pi * t).sin(), (math.pi * t).cos()]).expand(len(x), 3)
        return self.net(torch.cat([x, features], 1))


def test_any_module_solves_the_double_well():
    """A network against the Hopf–Cole solution on a grid: most paths from the left well must cross the barrier."""
    torch.manual_seed(0)
    well, steps = DoubleWell(), 40
    problem, control = euler(well, steps), Net()
    optimizer = torch.optim.Adam(control.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    start = lambda generator: torch.full((128, 1), -1.0)  # noqa: E731
    options = {"num_loss_steps": 10, "on_update": lambda *_: schedule.step()}
    solve(problem, problem.mean(control), optimizer, start, 250, **options)

    best = problem.mean(lambda x, t: well.control(x.double(), t).to(x))
    noise = draw(steps, 2000, 1, seed=3).float()
    path = states_under(best, problem, noise)
    spent = wrong = 0.0
    for k in range(steps):
        with torch.no_grad():
            exact = well.control(path[k].double(), problem.times[k])
            found = control(path[k], problem.times[k].float())
        spent, wrong = spent + exact.square().mean(), wrong + (found - exact).square().mean()
    assert spent / steps > 1  # there is something to be found
    # Of the squared control; three seeds gave .029, .031, .041: network, noise and Euler's O(h) together.
    assert wrong / spent < 0.06
    crossed = (states_under(problem.mean(control), problem, noise)[-1] > 0).float().mean()
    assert crossed == pytest.approx((path[-1] > 0).float().mean().item(), abs=0.05)
    assert (states_under(problem.base_mean, problem, noise)[-1] > 0).float().mean() < 0.2


def states_under(mean, problem: ControlProblem, noise: Tensor) -> Tensor:
    """Paths from the left well, (K + 1, B, 1)."""
    start = torch.full_like(noise[0], -1.0)
    return rollout(mean, start, problem.times[:-1], problem.stds, lambda k: noise[k], keep_last=True).states


# ------------------------------------------------------------------------------------------------------------ paths, schedules


@pytest.mark.parametrize("name", PATHS)
def test_rates_and_memoryless_noise_are_the_closed_forms(name):
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    eta = (1 - t) / t if name == "flow" else math.pi / 2 / (math.pi / 2 * t).tan()
    torch.testing.assert_close(PATHS[name].eta(t), eta, **EXACT)
    torch.testing.assert_close(
        memoryless_noise(PATHS[name])(t), (2 * eta).sqrt(), atol=1e-7, rtol=1e-11
    )  # √ of rounding at t = 1


def scaled(path, rho: float):
    return lambda t: (rho * 2 * path.eta(t)).sqrt()


# σ(t) of a path, whether it is memoryless, and whether it is σ² = 2η.
SCHEDULES = {
    "σ² = 2η": (memoryless_noise, True, True),
    "half of it": (lambda path: scaled(path, 0.5), True, False),
    "twice": (lambda path: scaled(path, 2.0), True, False),
    "1/t": (lambda path: lambda t: 1 / t, True, False),
    "more of it at the end": (lambda path: lambda t: memoryless_noise(path)(t) * (1 + t), True, False),
    "constant": (lambda path: lambda t: 1.0, False, False),
    "small constant": (lambda path: lambda t: 0.2, False, False),
    "σ² = 1/√t": (lambda path: lambda t: t**-0.25, False, False),
    "none at the start": (lambda path: lambda t: torch.where(t > 0.1, memoryless_noise(path)(t), 0.0), False, False),
    "none": (lambda path: lambda t: 0.0, False, False),
}


def proposition_1(path, noise, start: float) -> float:
    """α_{t'} exp(−∫_{t'}^t χ/2β² ds) with χ = σ² − 2η and t = ½, as 2409.08861 prints it (eq. 25), by the trapezoidal rule."""
    y = torch.linspace(math.log(start), math.log(0.5), 20_001, dtype=torch.float64)
    t = y.exp()
    chi = torch.as_tensor(noise(t)).double() ** 2 - 2 * path.eta(t)
    return float(path.alpha(t[0]) * torch.exp(-torch.trapezoid(t * chi / (2 * path.beta(t) ** 2), y)))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_two_checks_of_a_schedule(schedule, name):
    make, memoryless, transferable = SCHEDULES[schedule]
    report = check_noise(PATHS[name], make(PATHS[name]))
    assert (report.memoryless, report.transferable) == (memoryless, transferable)
    assert ("not memoryless" not in str(report)) == memoryless and ("any noise" in str(report)) == transferable
    early, late = (proposition_1(PATHS[name], make(PATHS[name]), start) for start in (1e-10, 1e-5))
    # The limit itself: memoryless schedules lose √(10⁻⁵) and more on five decades; the others tend to a number.
    assert early < 0.01 * late + 1e-300 if memoryless else early > 0.8 * late
    # A first level of 10⁻¹² is what the integral leaves out; its root for half the noise.
    assert report.leftover_memory < 2e-6 if memoryless else report.leftover_memory > 0.05


@pytest.mark.parametrize(("sigma", "variance"), [(0.2, 1.0), (1.0, 0.64), (1.0, 4.0)])
def test_leftover_memory_of_constant_noise_is_the_closed_form(sigma, variance):
    """T5: corr² = exp(−πσ²/2s), the share of a tilt that is lost; and the sampler's own chain has it."""
    memory = leftover_memory(FLOW, lambda t: sigma, variance)
    assert memory**2 == pytest.approx(math.exp(-math.pi * sigma**2 / (2 * variance**0.5)), rel=1e-6)
    law = gaussian(tensor([0.7]), tensor([[variance]]))
    sampler = PathSampler(FLOW, lambda t: sigma, grid(400))
    chain = AffineChain.of(sampler.mean(velocity_of(law, FLOW)), sampler.stds, 1)
    carried = (
        float(chain.carry()[0]) / float(chain.terminal_law(torch.zeros(1).double(), torch.eye(1).double()).covariance()) ** 0.5
    )
    assert carried == pytest.approx(memory, rel=2e-3)  # first order in 1/400, and exact for variance 1


def test_correlation_measures_what_two_normal_variables_share():
    first, second = draw(50_000, 2, seed=0), draw(50_000, 2, seed=1)
    # Standard error 1/√100 000 = 3e-3.
    assert correlation(first, 3 * (0.6 * first + 0.8 * second) + 5) == pytest.approx(0.6, abs=0.012)
    assert correlation(first, second) == pytest.approx(0, abs=0.012)
    assert correlation(first, -first) == pytest.approx(-1)
    with pytest.raises(ValueError, match="pass x_0 and x_K of the same paths"):
        correlation(first, second[:10])


# ------------------------------------------------------------------------------------------------------------------- sampler

REWARD = QuadraticReward.linear(tensor([1.0]))
MIXTURE = mixture_1d([0.35, 0.65], [-1.0, 0.9], [0.16, 0.3])


def velocity_of(law, path):
    """E[α̇ X_1 + β̇ X_0 | X_t = x]."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        (alpha_rate, beta_rate), levels = path.rates(t.double()), (float(path.alpha(t)), float(path.beta(t)))
        data = model_output(law, x, *levels, "sample")
        noise = model_output(law, x, *levels, "epsilon")
        return alpha_rate * data + beta_rate * noise

    return velocity


@pytest.mark.parametrize("name", PATHS)
def test_memoryless_noise_gives_the_posterior_step(name):
    """In flow coordinates it is the schedulers' integrator."""
    path, times, x = PATHS[name], grid(9), draw(5, 1, seed=0)
    sampler = PathSampler(path, memoryless_noise(path), times)
    alphas, betas = path.alpha(times), path.beta(times)
    share = alphas / (alphas + betas)
    steps, mean = posterior(share[:-1], share.diff()), sampler.mean(velocity_of(MIXTURE, path))
    for k in range(9):
        data = model_output(MIXTURE, x, float(alphas[k]), float(betas[k]), "sample")
        noise = model_output(MIXTURE, x, float(alphas[k]), float(betas[k]), "epsilon")
        scale, scale_next = alphas[k] + betas[k], alphas[k + 1] + betas[k + 1]
        expected = scale_next * (steps.state[k] * x / scale + steps.velocity[k] * (data - noise))
        # The midpoint rule's error over a step, 256 points.
        torch.testing.assert_close(mean(k, x), expected, atol=1e-5, rtol=0)
        assert float(sampler.stds[k]) == pytest.approx(float(scale_next * steps.std[k]), abs=1e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0, 2.5])
def test_scaled_noise_keeps_a_power_of_the_ratio_of_levels(name, rho):
    """With S = α² + β², G = ρ · log of (α'/√S')/(α/√S), since (log α/√S)˙ = η/S."""
    path, times, x = PATHS[name], grid(9, 0.1), draw(5, 1, seed=0)
    sampler = PathSampler(path, scaled(path, rho), times)
    alphas, betas = path.alpha(times), path.beta(times)
    for k in range(8):
        spread, spread_next = alphas[k] ** 2 + betas[k] ** 2, alphas[k + 1] ** 2 + betas[k + 1] ** 2
        kept = (alphas[k] / alphas[k + 1] * (spread_next / spread).sqrt()) ** rho
        data = model_output(MIXTURE, x, float(alphas[k]), float(betas[k]), "sample")
        noise = model_output(MIXTURE, x, float(alphas[k]), float(betas[k]), "epsilon")
        centre = data - alphas[k] / betas[k] * noise  # m of data N(m, I)
        expected = alphas[k + 1] * centre + (spread_next / spread).sqrt() * kept * (x - alphas[k] * centre)
        torch.testing.assert_close(sampler.mean(velocity_of(MIXTURE, path))(k, x), expected, atol=1e-5, rtol=0)
        assert float(sampler.stds[k]) == pytest.approx(float((spread_next * (1 - kept**2)).sqrt()), abs=1e-5)


ANY_NOISE = {
    "ODE": lambda path: lambda t: 0.0,
    "a third": lambda path: scaled(path, 0.3),
    "memoryless": memoryless_noise,
    "constant": lambda path: lambda t: 0.7,
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("noise", ANY_NOISE)
def test_every_noise_samples_the_law_of_the_network(noise, name):
    """The family of eqs. 10–11, and so Theorem 1 for an exact network: the tilt's velocity gives the tilt, whatever σ."""
    path = PATHS[name]
    target = MIXTURE.tilt(REWARD)[0]
    start = draw(20_000, 1, seed=0)
    sampler = PathSampler(path, ANY_NOISE[noise](path), grid(150))
    reached = sampler.sample(velocity_of(target, path), start, torch.Generator().manual_seed(1))
    # First order in 1/150 (.02 at the most), and 20 000 samples (.01); the base is at .6.
    assert sliced_w2(reached[-1], target) < 0.035
    assert sliced_w2(reached[-1], MIXTURE) > 0.5
    memory = correlation(reached[0], reached[-1])
    assert abs(memory) < 0.03 if noise in ("a third", "memoryless") else memory > 0.2


def test_a_biased_schedule_is_refused_unless_allowed():
    velocity = velocity_of(MIXTURE, FLOW)
    biased = PathSampler(FLOW, lambda t: 0.2, grid(5))
    with pytest.raises(
        ValueError, match=r"not memoryless: correlation of X_0 and X_1 0\.97 .* pass memoryless_noise\(path\), or"
    ):
        biased.tilt(velocity, REWARD)
    for times in (grid(5, 0.3), grid(5) / 2):
        with pytest.raises(ValueError, match="pass times from 0 to 1, or allow_biased_schedule=True"):
            PathSampler(FLOW, memoryless_noise(FLOW), times).tilt(velocity, REWARD)
    with pytest.warns(UserWarning, match="not memoryless"):
        assert biased.tilt(velocity, REWARD, allow_biased_schedule=True).stds is biased.stds
    with pytest.warns(UserWarning, match="sample the tuned network with this noise only"):
        PathSampler(FLOW, scaled(FLOW, 0.5), grid(5)).tilt(velocity, REWARD)
    problem = PathSampler(FLOW, memoryless_noise(FLOW), grid(5)).tilt(velocity, REWARD)  # no warning: pytest makes them errors
    x = draw(4, 1, seed=0)
    torch.testing.assert_close(problem.terminal_adjoint(x), -torch.ones_like(x), **EXACT)


# ------------------------------------------------------------------------------------------------------------------ bad input


def make(**change):
    """`ControlProblem.euler` of a sound problem, changed."""
    sound = {
        "drift": lambda x, t: -x,
        "noise": lambda t: 1.0,
        "times": grid(4),
        "terminal_cost": lambda x: x.square().sum(-1),
        "running_cost": lambda x, t: x.square().sum(-1),
    }
    return ControlProblem.euler(**sound | change)


def run(problem: ControlProblem, control=None, updates=2, **options):
    control = control or Net(dim=2).double()
    optimizer = torch.optim.Adam(control.parameters() if isinstance(control, torch.nn.Module) else [torch.zeros(1)], lr=1e-3)
    return solve(problem, problem.mean(control), optimizer, lambda g: torch.randn(3, 2, generator=g).double(), updates, **options)


def test_the_sound_problem_is_solved():
    assert run(make()).isfinite().all()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: make(noise=lambda x, t: x), TypeError, "a σ that depends on the state is not covered"),
        (lambda: make(noise=lambda t: 0.0), ValueError, "σ is 0 at every step, so no step can be controlled"),
        (lambda: make(noise=lambda t: -1.0), ValueError, r"σ\(0\) = -1.0; pass a finite σ"),
        (lambda: make(noise=lambda t: tensor([1.0, 0.0])), ValueError, "positive in every component, or 0 in all of them"),
        (lambda: make(noise=lambda t: 1 / t), ValueError, r"σ\(0\) = inf; pass a finite σ"),
        (lambda: make(times=grid(4).flip(0)), ValueError, r"times must increase, from t_0 to t_K; pass a tensor like"),
        (lambda: make(times=tensor([0.0, 0.5, 0.5, 1.0])), ValueError, "times must increase"),
        (lambda: make(times=tensor([0.0])), ValueError, "times must increase"),
        (lambda: ControlProblem(lambda k, x: x, grid(4), torch.ones(3), torch.sum), ValueError, "5 times need 4 stds, but got 3"),
        (lambda: run(make(drift=lambda x, t: x[:1])), ValueError, r"drift returned shape \(1, 2\) for states of shape \(3, 2\)"),
        (
            lambda: run(make(), lambda x, t: x.sum(1)),
            ValueError,
            r"the control returned shape \(3,\) for states of shape \(3, 2\)",
        ),
        (lambda: run(make(noise=lambda t: torch.ones(3, 2))), ValueError, r"σ has shape \(3, 2\) but a state \(2,\)"),
        (
            lambda: run(make(terminal_cost=lambda x: x)),
            ValueError,
            r"terminal_cost returned shape \(3, 2\) for 3 states; return one",
        ),
        (lambda: run(make(terminal_cost=lambda x: x.detach().sum(1))), ValueError, "terminal_cost has no gradient in the state"),
        (lambda: run(make(running_cost=lambda x, t: x.detach().sum(1))), ValueError, "running_cost has no gradient in the state"),
        (lambda: run(make(running_cost=lambda x, t: x.sum())), ValueError, r"running_cost returned shape \(\) for 3 states"),
        (lambda: run(make(terminal_cost=lambda x: x.sum(1) / 0)), ValueError, "the loss of update 0 is"),
        (
            lambda: run(make(terminal_cost=lambda x: torch.nn.Linear(2, 1).double()(x.detach())[:, 0])),
            ValueError,
            "terminal_cost has no gradient in the state",
        ),
        (lambda: run(make(), updates=0), ValueError, "updates=0 solves nothing; pass at least 1"),
        (lambda: run(make(), num_loss_steps=0), ValueError, "num_loss_steps=0 does not fit"),
        (lambda: make(times=torch.arange(5)), ValueError, "times must increase, from t_0 to t_K; pass a tensor like"),
        (lambda: make(times=[0.0, 0.5, 1.0]), ValueError, "times must increase, from t_0 to t_K; pass a tensor like"),
        (
            lambda: ControlProblem(lambda k, x: x, grid(2), tensor([[1.0, 0.0], [1.0, 1.0]]), torch.sum),
            ValueError,
            r"the std of step 0 = \[1.0, 0.0\]; pass a finite σ",
        ),
        (
            lambda: run(make(), objective=AdjointMatching),
            TypeError,
            "is no objective; pass an object, such as AdjointMatching()",
        ),
        (lambda: run(make(), objective=None), TypeError, "objective=None is no objective; pass an object"),
        (lambda: run(make(), objective=OneStep()), ValueError, "which a control problem does not predict; pass AdjointMatching"),
        (lambda: run(make(), objective=discrete_adjoint, num_loss_steps=2), ValueError, "leave num_loss_steps out"),
        (lambda: run(make(), num_loss_steps=5), ValueError, "num_loss_steps=5 does not fit a grid with 4 noisy steps"),
        (lambda: PathSampler(FLOW, lambda t: 1.0, grid(4) * 2), ValueError, r"a path is defined on \[0, 1\]"),
        (lambda: PathSampler(FLOW, lambda t: 1.0, grid(4).flip(0)), ValueError, "times must increase"),
        (
            lambda: PathSampler(FLOW, lambda t: -t, grid(4)),
            ValueError,
            "noise returned -.*; σ must be a number ≥ 0 at every time",
        ),
        (lambda: PathSampler(FLOW, lambda t: t * torch.nan, grid(4)), ValueError, "σ must be a number ≥ 0"),
        (
            lambda: PathSampler(FLOW, lambda t: torch.ones(2), grid(4)),
            ValueError,
            r"noise returned shape \(2,\) for times of shape",
        ),
        (lambda: PathSampler(FLOW, lambda x, t: x, grid(4)), TypeError, "a σ that depends on the state is not covered"),
        (
            lambda: PathSampler(FLOW, lambda t: 0.0, grid(4)).tilt(
                velocity_of(MIXTURE, FLOW), REWARD, allow_biased_schedule=True
            ),
            ValueError,
            "σ is 0 at every step",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the noise is not memoryless")
def test_bad_input_is_refused_in_one_sentence(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize(
    ("running_cost", "message"),
    [
        (lambda x, t: x.detach().sum(1), "running_cost has no gradient in the state"),
        (lambda x, t: x.square().sum(), r"running_cost returned shape \(\) for 3 states"),
        (lambda x, t: x.square().sum(1, keepdim=True), r"running_cost returned shape \(3, 1\) for 3 states"),
    ],
)
def test_every_objective_refuses_a_running_cost_it_cannot_use(objective, running_cost, message):
    with pytest.raises(ValueError, match=message):
        run(make(running_cost=running_cost), objective=objective)


def test_solving_draws_one_batch_an_update():
    drawn, control, problem = [], Net(dim=2).double(), make()
    start = lambda generator: drawn.append(1) or torch.zeros(3, 2, dtype=torch.float64)  # noqa: E731
    solve(problem, problem.mean(control), torch.optim.Adam(control.parameters()), start, 4)
    assert len(drawn) == 4


def test_the_spent_cost_is_the_kl_of_the_paths():
    """The fourth of the functions: Σ ½ ‖√h u‖² for a control that is known."""
    problem, x = euler(LQ, 6), draw(3, 2, seed=1)
    control = lambda x, t: torch.ones_like(x) * t  # noqa: E731
    mean = problem.mean(control)
    path = rollout(mean, x, problem.times[:-1], problem.stds, lambda k: draw(3, 2, seed=k), keep_last=True)
    expected = sum(t**2 / 6 for t in problem.times[:-1])
    torch.testing.assert_close(path_kl(mean, problem.base_mean, path), expected.expand(3), **EXACT)
