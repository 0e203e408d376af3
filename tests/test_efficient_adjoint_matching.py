"""Efficient Adjoint Matching: its target on known laws, its rate and where it diverges, what it costs, what it refuses."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import GaussianMixture, mixture_1d
from scheduler_problems import KnownChain, batch, noise_levels, normal, ready
from tiny_trainer import config, make_trainer
from torch import Tensor

from diffusers_adjoint.core.matching import LossSteps, regression_loss
from diffusers_adjoint.objectives import EfficientAdjointMatching, Targets
from diffusers_adjoint.objectives.efficient_adjoint_matching import asked_clean
from diffusers_adjoint.schedulers import MemorylessDDIMScheduler, MemorylessFlowMatchEulerDiscreteScheduler

STEPS, SLOPE = 6, 0.8  # r(x) = .8 x
FLOW, DDIM = MemorylessFlowMatchEulerDiscreteScheduler, MemorylessDDIMScheduler


@dataclass(frozen=True)
class Scored:
    tilt: Tensor


def linear(slope: float):
    return lambda x: Scored(torch.full_like(x, slope))


def two_modes(slope: float = 0.0) -> GaussianMixture:
    """½N(−1, .16) + ½N(1, .16), tilted by e^{slope · x}."""
    weights = torch.tensor([-1.0, 1.0], dtype=torch.float64).mul(slope).softmax(0)
    return mixture_1d(weights.tolist(), [-1 + 0.16 * slope, 1 + 0.16 * slope], [0.16, 0.16])


def score_of(law: GaussianMixture, x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    noisy = GaussianMixture(law.weights, alpha * law.means, alpha**2 * law.covariances + beta**2)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(noisy.log_prob(leaf).sum(), leaf)[0]


class CleanChain(KnownChain):
    """On a law whose score is known at any level; its samples are given."""

    def __init__(self, scheduler, law: GaussianMixture, samples: Tensor) -> None:
        super().__init__(scheduler, law, samples)
        self.levels, self.toward, self.law, self.asked, self.drawn = scheduler.levels, scheduler.toward, law, [], 100

    def sample(self) -> Tensor:
        return self.start

    def noised(self, clean: Tensor, k: int) -> Tensor:
        self.drawn += 1
        return self.scheduler.noised(clean, batch(*clean.shape, dtype=clean.dtype, seed=self.drawn), k)

    def base_score(self, x: Tensor, noise: float) -> Tensor:
        self.asked.append((noise, x))
        return score_of(self.law, x, 1.0, noise / (1 - noise))


def targets_of(objective: EfficientAdjointMatching, chain: CleanChain, slope: float = SLOPE) -> Targets:
    """Of all steps that carry the loss."""
    steps = objective.scales(chain).nonzero().flatten().tolist()
    return objective.targets(chain, LossSteps(tuple(steps), (1.0,) * len(steps)), linear(slope))


# -------------------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize("cls", [FLOW, DDIM])
def test_a_gaussian_is_tilted_in_one_sweep_when_the_reference_has_its_variance(cls):
    """With C = s² the step uphill ends at one place wherever it starts: the target does not vary. That is the tilt's mean, but
    that the blur adds to the variance which the reward moves."""
    noise = 0.05
    law, tilted = normal(0.7, 0.36), normal(0.7 + (0.36 + (noise / (1 - noise)) ** 2) * SLOPE, 0.36)
    anywhere = 3 * batch(5, 1, dtype=torch.float64)
    chain = CleanChain(ready(cls, STEPS), law, anywhere)
    targets = targets_of(EfficientAdjointMatching(variance=0.36, noise=noise), chain)
    optimum = CleanChain(chain.scheduler, tilted, anywhere)
    assert len(targets.states) >= STEPS - 1
    for k, x in enumerate(targets.states):
        # float64; √ᾱ ≥ .006 is divided by.
        torch.testing.assert_close(targets.base_means[k] + targets.shifts[k], optimum.mean(k, x), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(targets.base_means[k], chain.mean(k, x))
        loss = regression_loss(optimum.mean(k, x), targets.base_means[k], targets.shifts[k], targets.scales[k])
        assert loss.max() < 1e-15


@pytest.mark.parametrize("variance", [0.09, 0.36, 0.6, 1.0])
def test_the_rate_of_a_sweep_is_what_the_reference_makes_it(variance):
    """From N(a, s²) one sweep on N(m, s²) asks at pure noise for the mean a + C (λ − (a − m)/s²), without blur: the error goes
    with 1 − C/s², to which C = 1 gives −1.8 and no convergence."""
    m, s2, a = 0.7, 0.36, -0.4
    samples = a + s2**0.5 * batch(200_000, 1, dtype=torch.float64)
    chain = CleanChain(ready(FLOW, STEPS), normal(m, s2), samples)
    objective = EfficientAdjointMatching(variance=variance, noise=0.01)
    targets = objective.targets(chain, LossSteps((0,), (1.0,)), linear(SLOPE))
    x = targets.states[0]
    asked = chain.clean(targets.base_means[0] + targets.shifts[0], x, 0)
    goal = m + s2 * SLOPE
    # The standard error of a mean of 200 000 with std |1 − C/s²| s is below .003, and the blur of variance 1e-4 moves it by 1e-3.
    assert asked.mean().item() - goal == pytest.approx((1 - variance / s2) * (a - goal), abs=0.01)


@pytest.mark.parametrize("variance", [0.1, 1.16])
@pytest.mark.parametrize(("slope", "noise"), [(0.0, 0.15), (SLOPE, 0.01)])
def test_among_samples_of_the_tilt_the_mean_target_is_the_tilt_s_own_whatever_the_reference(slope, noise, variance):
    """Given x_k, by bins, on two modes. With λ = 0 that is: at the base's own samples no shift is wished for, at any blur."""
    law, tilted = two_modes(), two_modes(slope)
    generator = torch.Generator().manual_seed(3)
    mode = torch.multinomial(tilted.weights, 200_000, replacement=True, generator=generator)
    samples = tilted.means[mode] + 0.4 * batch(200_000, 1, dtype=torch.float64)
    chain = CleanChain(ready(FLOW, STEPS), law, samples)
    targets = targets_of(EfficientAdjointMatching(variance, noise), chain, slope)
    alphas, betas = (level.tolist() for level in noise_levels(chain.scheduler))
    for k in targets.steps.indices[1:]:
        x = targets.states[k]
        wished = chain.gains[k] * (score_of(tilted, x, alphas[k], betas[k]) - score_of(law, x, alphas[k], betas[k]))
        if slope == 0:
            assert not wished.any()
        off = (targets.shifts[k] - wished)[x[:, 0].argsort(), 0].view(20, -1)
        # Of 100 bins the largest of standard normals is about 2.6; 4.5 has odds of 1 in 1500.
        assert (off.mean(1).abs() < 4.5 * off.std(1) / off.shape[1] ** 0.5).all()


def test_every_prediction_type_asks_for_the_same_control():
    law, start = mixture_1d([0.35, 0.65], [-1.0, 0.9], [0.16, 0.3]), batch(5, 1, dtype=torch.float64)
    found, objective = {}, EfficientAdjointMatching(variance=0.3)
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = ready(DDIM, STEPS, prediction_type=kind, timestep_spacing="trailing")
        found[kind] = targets_of(objective, CleanChain(scheduler, law, start))
    alphas, betas = noise_levels(scheduler)
    scale = alphas + betas  # x/(α + β) is on the flow path
    flow = FLOW()
    flow.set_timesteps(sigmas=(betas / scale)[:-1].tolist())
    found["flow"] = targets_of(objective, CleanChain(flow, law, start))
    for kind in ("v_prediction", "sample"):
        torch.testing.assert_close(found[kind].shifts, found["epsilon"].shifts, rtol=1e-8, atol=1e-10)
    # diffusers keeps σ in float32.
    torch.testing.assert_close(
        found["flow"].shifts * scale[1 : 1 + len(found["flow"].shifts), None, None], found["epsilon"].shifts, rtol=1e-5, atol=1e-6
    )


def test_a_reference_by_channels_is_one_of_each_channel():
    law = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    start = batch(4, 2, dtype=torch.float64)

    def shifts(variance):
        return targets_of(EfficientAdjointMatching(variance), CleanChain(ready(FLOW, STEPS), law, start)).shifts

    both = shifts([0.1, 0.7])
    assert torch.equal(both[..., 0], shifts(0.1)[..., 0]) and torch.equal(both[..., 1], shifts(0.7)[..., 1])
    with pytest.raises(ValueError, match=r"variance has 3 numbers, but the latents have shape \(2,\) each, .*; pass one number"):
        shifts([0.1, 0.2, 0.3])


# ---------------------------------------------------------------------------------------------------------------- the cost


def test_it_asks_each_thing_once():
    chain, scored = CleanChain(ready(FLOW, STEPS), normal(), batch(4, 1, dtype=torch.float64)), []
    reward = linear(SLOPE)
    EfficientAdjointMatching(noise=0.03).targets(chain, LossSteps((1, 4), (1.0, 1.0)), lambda x: scored.append(x) or reward(x))
    assert chain.evaluated == [1, 4] and len(chain.asked) == len(scored) == 1
    assert chain.asked[0][0] == 0.03 and torch.equal(scored[0], chain.start)


def test_steps_that_begin_within_the_blur_carry_no_loss():
    """Nothing of less noise can be made of y."""
    chain = CleanChain(ready(FLOW, STEPS), normal(), batch(4, 1, dtype=torch.float64))
    for noise in (0.01, 0.3):
        scales, within = EfficientAdjointMatching(noise=noise).scales(chain), chain.levels[1] <= noise
        assert within.any() and not scales[within].any()
        assert torch.equal(scales[~within], chain.posterior_stds[~within])


def test_blurred_samples_are_noised_on_to_the_step_s_own_level():
    """Var x_k = α² Var x_1 + β², whatever of it the blur has been."""
    samples = 0.6 * batch(200_000, 1, dtype=torch.float64)
    chain = CleanChain(ready(FLOW, STEPS), normal(), samples)
    targets = targets_of(EfficientAdjointMatching(noise=0.15), chain)
    alphas, betas = chain.levels[:, list(targets.steps.indices)]
    expected = (alphas * 0.6) ** 2 + betas**2
    # The standard error of a variance is √(2/200 000) = .3 % of it.
    torch.testing.assert_close(targets.states.var((1, 2)), expected, rtol=0.015, atol=0)
    assert chain.asked[0][1].var() == pytest.approx(0.36 + (0.15 / 0.85) ** 2, rel=0.015)


def test_the_trainer_never_differentiates_the_network_but_in_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, loss_type="efficient_adjoint_matching", loss_kwargs={"variance": 0.2})
    trainer.check_first_row = lambda: None  # the start-up check has its own evaluations
    seen = []
    trainer.denoiser.network.register_forward_pre_hook(
        lambda *_: seen.append(("base" if trainer.denoiser.base_active else "model", torch.is_grad_enabled()))
    )
    trainer.train()
    # K = 4 for samples; the score, and S = 2 means of the base; S of the loss.
    assert seen == [("model", False)] * 4 + [("base", False)] * 3 + [("model", True)] * 2
    line = trainer.state.log_history[0]
    assert line["loss"] > 0 and line["adjoint_norm"] > 0  # of λ∇r at the samples


# -------------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variance": 0.0}, ValueError, "variance=0.0 is not a variance; pass a number above 0"),
        ({"variance": float("inf")}, ValueError, "variance=inf is not a variance"),
        ({"variance": [0.1, -1.0]}, ValueError, "is not a variance; pass a number above 0, or a list of one per channel"),
        ({"variance": []}, ValueError, "is not a variance"),
        ({"variance": "much"}, TypeError, "'much' is not a number; pass variance=0.1"),
        ({"noise": 1.0}, ValueError, "noise=1.0 is not a share of noise; pass a number between 0 and 1"),
        ({"noise": True}, TypeError, "True is not a number"),
    ],
)
def test_options_that_make_no_target_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        EfficientAdjointMatching(**options)


def test_variances_of_channels_come_from_the_command_line_too(tmp_path):
    args = config(tmp_path, loss_type="efficient_adjoint_matching", loss_kwargs='{"variance": [0.1, 0.2], "noise": 0.02}')
    assert args.objective == EfficientAdjointMatching([0.1, 0.2], 0.02)


def test_where_the_base_knows_no_score_of_its_own_law_it_is_refused(tmp_path):
    message = (
        "needs the base's score, which a guided model or one that starts from an image does not predict; pass cfg_mode='none'"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, loss_type="efficient_adjoint_matching", cfg_mode="full", guidance_scale=4.0).train()


# ---------------------------------------------------------------------------------------------------- sweep after sweep


# The map of one sweep without any noise of samples: 1500 quantiles of the model's law, the flow path, 100 Euler steps.
QUANTILES = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
TIMES = torch.cat([torch.tensor([0.01]), torch.arange(0.05, 0.95, 0.05), torch.tensor([0.94, 0.97, 0.99])]).double()
PLACES = torch.linspace(-6, 7, 391, dtype=torch.float64)
EULER = 100


def clean_of(law: GaussianMixture, x: Tensor, t: float) -> Tensor:
    """E[X_1 | x_t] by Tweedie's formula, (N,)."""
    return (x + (1 - t) ** 2 * score_of(law, x[:, None], t, 1 - t)[:, 0]) / t


def quantiles_of(law: GaussianMixture) -> Tensor:
    at = torch.linspace(-6, 7, 40_001, dtype=torch.float64)
    cdf = sum(w * torch.distributions.Normal(m, v.sqrt()).cdf(at) for w, m, v in zip(*laws(law), strict=True))
    return torch.from_numpy(np.interp(QUANTILES, cdf, at))


def laws(law: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    return law.weights, law.means[:, 0], law.covariances[:, 0, 0]


def sampled(base: GaussianMixture, moved: Tensor) -> Tensor:
    """Quantiles of the law whose clean prediction is the base's plus `moved`, (times, places), by the flow's ODE, sorted."""
    x = torch.distributions.Normal(0.0, 1.0).icdf(QUANTILES)
    for i in range(EULER):
        t = max(i / EULER, 1e-3)
        j = int((torch.searchsorted(TIMES, t) - 1).clamp(0, len(TIMES) - 2))
        share = float(((t - TIMES[j]) / (TIMES[j + 1] - TIMES[j])).clamp(0, 1))
        more = torch.from_numpy(np.interp(x, PLACES, (1 - share) * moved[j] + share * moved[j + 1]))
        x = x + (clean_of(base, x, t) + more - x) / (1 - t) / EULER
    return x.sort().values


def swept(base: GaussianMixture, samples: Tensor, variance: float) -> Tensor:
    """The mean of what own samples ask for, less the base's prediction, at all times and places."""
    reference = torch.tensor(variance, dtype=torch.float64)
    ahead = samples + variance * (1.0 + score_of(base, samples[:, None])[:, 0])  # r(x) = x, without blur
    moved = []
    for t in TIMES.tolist():
        likely = (-((PLACES[:, None] - t * samples) ** 2) / (2 * (1 - t) ** 2)).softmax(1)
        moved.append(asked_clean(likely @ ahead, PLACES, t, 1 - t, reference) - clean_of(base, PLACES, t))
    return torch.stack(moved)


def distances(variance: float, sweeps: int) -> list[float]:
    """W2 to the tilt after each sweep; ends early where it is beyond 3."""
    base, goal, found = two_modes(), quantiles_of(two_modes(1.0)), []
    samples = sampled(base, torch.zeros(len(TIMES), len(PLACES), dtype=torch.float64))
    for _ in range(sweeps):
        # Far from all samples what is asked for has no meaning, and grows without bound.
        samples = sampled(base, swept(base, samples, variance).clamp(-30, 30))
        found.append((samples - goal).square().mean().sqrt().item())
        if not found[-1] < 3:
            break
    return found


@pytest.mark.slow
def test_a_reference_narrower_than_the_modes_data_gets_to_the_tilt_slowly():
    """C = .3 on data of variance 1.16, .16 within a mode: 1.09 from the tilt at first, and most of it gone after 30 sweeps."""
    found = distances(0.3, 30)
    assert 0.5 < found[2] < 0.65 and found[9] > 0.2  # slow
    assert found[29] <= 0.03  # the ODE's 100 steps leave .01 even of the exact tilt


@pytest.mark.slow
def test_a_reference_as_wide_as_the_data_diverges():
    """C = 1.16, the variance of the data: nearest after one sweep, and away from there."""
    found = distances(1.16, 10)
    assert found[0] < 0.35 and found[2] > 0.6 and found[-1] > 1.09
