"""Small networks fine-tuned by the real functions on mixtures reach the exact tilted law, sampled with any noise or none.

The base is the exact network of a mixture; a correction net, zero at first, is trained on top of it by rollout, lean
adjoint, chosen loss steps and matching loss, as the trainer does it. Distances are W2 (sliced in 2-D) to the known target.
"""

from __future__ import annotations

import math

import pytest
import torch
from adjoints import lean_from_end
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from problems import GaussianMixture, QuadraticReward, mixture_1d, sliced_w2
from samplers import Sampler, constant_noise, memoryless, parent_of
from torch import Tensor

from diffusers_adjoint.core.matching import choose_loss_steps, matching_loss
from diffusers_adjoint.core.trajectory import MeanFunction, rollout
from diffusers_adjoint.schedulers.integrators import DEFAULT_INTEGRATOR

pytestmark = pytest.mark.slow

STEPS, LOSS_STEPS, BATCH, UPDATES, SAMPLES = 20, 8, 128, 800, 20_000


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two separate modes: the tilt must move mass between them, from ½ to .88 (linear reward) or .98 (quadratic).
LINE = mixture_1d([0.5, 0.5], [-1.0, 1.0], [0.16, 0.16])
LINE_REWARDS = {
    "linear": QuadraticReward.linear(tensor([1.0])),
    "quadratic": QuadraticReward(tensor([0.0]), tensor([[2.0]]), tensor([1.2])),
}
PLANE = GaussianMixture(
    tensor([0.5, 0.3, 0.2]),
    tensor([[-1.0, -0.5], [1.0, 0.8], [0.6, -1.2]]),
    tensor([[[0.2, 0.08], [0.08, 0.15]], [[0.15, -0.06], [-0.06, 0.2]], [[0.1, 0.0], [0.0, 0.1]]]),
)
PLANE_REWARDS = {
    "linear": QuadraticReward.linear(tensor([0.9, 0.5])),
    "quadratic": QuadraticReward(tensor([0.0, 0.0]), tensor([[1.2, 0.4], [0.4, 1.0]]), tensor([0.8, 0.6])),
}


class Correction(torch.nn.Module):
    """What is trained: added to the exact network's output; zero at first. (B, d), flow time in [0, 1] → (B, d)."""

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(dim + 4, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, dim),
        )
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor, time: float) -> Tensor:
        features = [time, math.sin(math.pi * time), math.cos(math.pi * time), math.cos(2 * math.pi * time)]
        return self.net(torch.cat([x, x.new_tensor(features).expand(len(x), 4)], 1))


def predict(sampler: Sampler, law: GaussianMixture, net: Correction | None, k: int, x: Tensor) -> Tensor:
    output = sampler.output(law, k, x)
    return output if net is None else output + net(x, float(sampler.alphas[k] / (sampler.alphas[k] + sampler.betas[k])))


def step_mean(sampler: Sampler, law: GaussianMixture, net: Correction | None) -> MeanFunction:
    return lambda k, x: sampler.transition(predict(sampler, law, net, k, x), x, k).mean


def fine_tune(sampler: Sampler, law: GaussianMixture, reward: QuadraticReward, selection: str, seed: int) -> Correction:
    torch.manual_seed(seed)
    generator, dim = torch.Generator().manual_seed(seed), law.means.shape[1]
    law, reward, net = law.to(torch.float32), reward.to(torch.float32), Correction(dim)
    base, trained, stds = step_mean(sampler, law, None), step_mean(sampler, law, net), sampler.stds.tolist()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)

    def noise(_: int) -> Tensor:
        return torch.randn(BATCH, dim, generator=generator)

    for _ in range(UPDATES):
        steps = choose_loss_steps(sampler.stds, LOSS_STEPS, selection, generator)
        path = rollout(trained, noise(0), sampler.timesteps, sampler.stds, noise)
        lean = lean_from_end(base, path, lambda end: -reward.grad(end), lowest=steps.indices[0] + 1)
        optimizer.zero_grad()
        for k in steps.indices:
            mean = trained(k, path.states[k])
            matching_loss(mean, lean.base_means[k], stds[k], lean.adjoints[k + 1]).mean().backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def sample_sde(sampler: Sampler, law: GaussianMixture, net: Correction | None) -> Tensor:
    generator, shape = torch.Generator().manual_seed(99), (SAMPLES, law.means.shape[1])
    noise = lambda _: torch.randn(shape, generator=generator)  # noqa: E731
    mean = step_mean(sampler, law.to(torch.float32), net)
    return rollout(mean, noise(0), sampler.timesteps, sampler.stds, noise, keep_last=True).states[-1]


@torch.no_grad()
def sample_ode(
    parent: FlowMatchEulerDiscreteScheduler | DDIMScheduler, sampler: Sampler, law: GaussianMixture, net: Correction | None
) -> Tensor:
    x = torch.randn(SAMPLES, law.means.shape[1], generator=torch.Generator().manual_seed(98))
    for k, timestep in enumerate(parent.timesteps):
        x = parent.step(predict(sampler, law.to(torch.float32), net, k, x), timestep, x).prev_sample
    return x


@torch.no_grad()
def sample_between(sampler: Sampler, law: GaussianMixture, net: Correction | None, rho: float) -> Tensor:
    """With σ² = ρ·2η, of which 0 is the ODE and 1 memoryless: x' = α' x̂_1 + β' (c x̂_0 + √(1 − c²) ξ), c = (αβ'/(α'β))^ρ."""
    generator = torch.Generator().manual_seed(97)
    x = torch.randn(SAMPLES, law.means.shape[1], generator=generator)
    levels = list(zip(sampler.alphas.tolist(), sampler.betas.tolist(), strict=True))
    for k, ((alpha, beta), (alpha_next, beta_next)) in enumerate(zip(levels, levels[1:], strict=False)):
        output = predict(sampler, law.to(torch.float32), net, k, x)
        data, noise = {
            "flow_prediction": lambda x=x, m=output, a=alpha, b=beta: (x - b * m, x + a * m),
            "epsilon": lambda x=x, m=output, a=alpha, b=beta: ((x - b * m) / a, m),
            "v_prediction": lambda x=x, m=output, a=alpha, b=beta: (a * x - b * m, a * m + b * x),
        }[sampler.prediction_type]()
        kept = (alpha * beta_next / (alpha_next * beta)) ** rho
        fresh = torch.randn(x.shape, generator=generator)
        x = alpha_next * data + beta_next * (kept * noise + (1 - kept**2) ** 0.5 * fresh)
    return x


def distances(prediction: str, law: GaussianMixture, target: GaussianMixture, net: Correction | None) -> dict[str, float]:
    """W2 to the target by three ways of sampling, on a grid five times finer than the one trained on."""
    scheduler = memoryless(prediction, DEFAULT_INTEGRATOR, 100)
    sampler = Sampler.over(scheduler)
    return {
        "ODE": sliced_w2(sample_ode(parent_of(scheduler), sampler, law, net), target),
        "between": sliced_w2(sample_between(sampler, law, net, rho=0.3), target),
        "SDE": sliced_w2(sample_sde(sampler, law, net), target),
    }


@pytest.mark.parametrize(
    ("prediction", "dim", "kind", "selection"),
    [
        ("flow_prediction", 1, "linear", "paper"),
        ("flow_prediction", 1, "quadratic", "uniform"),
        ("epsilon", 1, "linear", "uniform"),
        ("epsilon", 1, "quadratic", "paper"),
        ("flow_prediction", 2, "linear", "uniform"),
        ("flow_prediction", 2, "quadratic", "paper"),
        ("v_prediction", 2, "linear", "uniform"),
        ("epsilon", 2, "quadratic", "uniform"),
    ],
)
def test_fine_tuning_reaches_the_tilted_law(prediction, dim, kind, selection):
    law, reward = (LINE, LINE_REWARDS[kind]) if dim == 1 else (PLANE, PLANE_REWARDS[kind])
    target = law.tilt(reward)[0]
    net = fine_tune(Sampler.of(prediction, DEFAULT_INTEGRATOR, STEPS), law, reward, selection, seed=0)
    before, after = distances(prediction, law, target, None), distances(prediction, law, target, net)
    for way in ("ODE", "between", "SDE"):  # Theorem 1: one network, any noise
        assert before[way] > 0.85, "the base must be far from the target, or this test proves nothing"
        # Three seeds of all eight cases gave .061 … .135 after, .89 … 1.24 before. Some .05 … .08 of that is the grid of 20
        # steps (benchmarks/discretisation.py), the rest 800 noisy updates; a third of margin on the worst.
        assert after[way] < 0.18
        assert after[way] < before[way] / 5


def test_fine_tuning_a_sampler_with_memory_misses_the_tilt_as_predicted():
    """T5, negative control: constant noise, same functions; only 1 − e^{−πσ²/2s} of the tilt is reached, here .39."""
    sigma, spread, slope = 0.5, 0.8, 1.3
    sampler, law = constant_noise(sigma, STEPS), mixture_1d([1.0], [0.7], [spread**2])
    net = fine_tune(sampler, law, QuadraticReward.linear(tensor([slope])), "uniform", seed=0)
    reached, start = sample_sde(sampler, law, net), sample_sde(sampler, law, None)
    share = float((reached.mean() - start.mean()) / (slope * spread**2))
    # Exactly steered, the grid of 20 steps reaches .370; three seeds of training came within 1e-4 of that, and the formula is
    # continuous time's, off by O(1/K).
    exact = float(sampler.chain(law).terminal_law(torch.zeros(1, dtype=torch.float64)).covariance()) / spread**2
    assert share == pytest.approx(exact, abs=2e-3)
    assert share == pytest.approx(1 - math.exp(-math.pi * sigma**2 / (2 * spread)), abs=0.03)
    assert float(reached.var()) == pytest.approx(float(start.var()), rel=1e-2)  # a linear reward moves the mean only


def test_after_fine_tuning_with_memory_no_noise_samples_the_tilt():
    """Theorem 1's negative control, on the mixture: constant noise leaves the tuned network with another law for every σ."""
    law, reward = LINE, LINE_REWARDS["linear"]
    target, net = law.tilt(reward)[0], fine_tune(constant_noise(0.5, STEPS), law, reward, "uniform", seed=0)
    reached = {sigma: sliced_w2(sample_sde(constant_noise(sigma, 100), law, net), target) for sigma in (0.0, 0.5, 1.0)}
    # .74, .74 and .72 were measured; the base is at .94 and memoryless training reaches .06 … .135.
    assert min(reached.values()) > 0.5
