"""The one-step adjoint: exact where the clean prediction says all, biased elsewhere, and what it costs."""

from dataclasses import dataclass

import pytest
import torch
from problems import GaussianMixture, mixture_1d
from scheduler_problems import KnownChain, batch, noise_levels, normal, ready
from tiny_trainer import difference, make_trainer, weights
from torch import Tensor

from diffusers_adjoint.core.matching import LossSteps
from diffusers_adjoint.objectives import OneStep
from diffusers_adjoint.schedulers import MemorylessDDIMScheduler, MemorylessFlowMatchEulerDiscreteScheduler

STEPS, SLOPE = 6, 0.8  # r(x) = .8 x
START = batch(4, 1, dtype=torch.float64)
ALL = LossSteps(tuple(range(STEPS)), (1.0,) * STEPS)


@dataclass(frozen=True)
class Scored:
    tilt: Tensor
    usable: Tensor


def linear(x: Tensor) -> Scored:
    return Scored(torch.full_like(x, SLOPE), torch.ones(len(x), dtype=torch.bool))


def noisy(law: GaussianMixture, alpha: float, beta: float) -> GaussianMixture:
    return GaussianMixture(law.weights, alpha * law.means, alpha**2 * law.covariances + beta**2)


def score_of(law: GaussianMixture, x: Tensor, alpha: float, beta: float) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(noisy(law, alpha, beta).log_prob(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("cls", [MemorylessFlowMatchEulerDiscreteScheduler, MemorylessDDIMScheduler])
def test_it_is_the_tilted_score_for_a_gaussian_and_a_linear_reward(cls):
    """There the clean prediction's reward is log E[e^r | x_k] up to a constant."""
    law, tilted = normal(0.7, 0.36), normal(0.7 + 0.36 * SLOPE, 0.36)
    chain = KnownChain(ready(cls, STEPS), law, START)
    targets = OneStep().targets(chain, ALL, linear)
    alphas, betas = (level.tolist() for level in noise_levels(chain.scheduler))
    for k, x in enumerate(targets.states):
        if alphas[k] == 0:
            assert not targets.shifts[k].any()  # pure noise knows nothing of the reward
            continue
        wished = score_of(tilted, x, alphas[k], betas[k]) - score_of(law, x, alphas[k], betas[k])
        # float64; √ᾱ ≥ .006 is divided by.
        torch.testing.assert_close(targets.shifts[k], chain.gains[k] * wished, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(targets.base_means[k], chain.mean(k, x))


def test_it_is_biased_for_two_modes():
    law = mixture_1d([0.5, 0.5], [-1.0, 1.0], [0.04, 0.04])
    weights = torch.tensor([0.5, 0.5]) * torch.exp(SLOPE * torch.tensor([-1.0, 1.0]))
    tilted = mixture_1d((weights / weights.sum()).tolist(), [-1 + 0.04 * SLOPE, 1 + 0.04 * SLOPE], [0.04, 0.04])
    chain = KnownChain(ready(MemorylessFlowMatchEulerDiscreteScheduler, STEPS), law, START)
    targets = OneStep().targets(chain, ALL, linear)
    alphas, betas = (level.tolist() for level in noise_levels(chain.scheduler))
    errors = []
    for k in range(1, STEPS):
        x = targets.states[k]
        wished = chain.gains[k] * (score_of(tilted, x, alphas[k], betas[k]) - score_of(law, x, alphas[k], betas[k]))
        errors.append(((targets.shifts[k] - wished).norm() / wished.norm()).item())
    assert errors[1] > 0.1  # in the middle of the path


def test_its_scale_is_the_noise_of_posterior_so_that_all_steps_carry_the_loss():
    """Also on "ancestral", whose last step has no noise."""
    chain = KnownChain(ready(MemorylessFlowMatchEulerDiscreteScheduler, STEPS, integrator="ancestral"), normal(), START)
    targets = OneStep().targets(chain, ALL, linear)
    assert chain.stds[-1] == 0 and torch.equal(targets.scales, OneStep().scales(chain)) and targets.scales.min() > 0
    torch.testing.assert_close(targets.scales, ready(MemorylessFlowMatchEulerDiscreteScheduler, STEPS).stds)


def test_it_evaluates_the_base_and_the_reward_once_a_loss_step():
    chain, scored = KnownChain(ready(MemorylessFlowMatchEulerDiscreteScheduler, STEPS), normal(), START), []
    OneStep().targets(chain, LossSteps((1, 4), (1.0, 1.0)), lambda x: scored.append(1) or linear(x))
    assert chain.evaluated == [1, 4] and len(scored) == 2


def test_a_sample_without_a_reward_at_a_step_is_left_out_and_not_told_to_stay():
    chain = KnownChain(ready(MemorylessFlowMatchEulerDiscreteScheduler, STEPS), normal(), START)
    usable = torch.tensor([True, False, True, True])
    targets = OneStep().targets(chain, ALL, lambda x: Scored(torch.where(usable[:, None], SLOPE, 0.0).double(), usable))
    assert targets.shifts[:, 1].isnan().all() and targets.shifts[:, usable].isfinite().all()


def test_checkpointed_layers_are_the_base_s_when_they_are_evaluated_again(tmp_path):
    """The second update is of a model that differs from its base."""
    plain = make_trainer(tmp_path / "plain", loss_type="one_step")
    plain.train()
    checkpointed = make_trainer(tmp_path / "checkpointed", loss_type="one_step", gradient_checkpointing=True)
    checkpointed.train()
    assert checkpointed.denoiser.network.is_gradient_checkpointing
    assert difference(weights(plain), weights(checkpointed)) <= 1e-6  # recomputed activations, same numbers up to rounding


def test_the_trainer_knows_it(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, loss_type="one_step")
    trainer.check_first_row = lambda: None  # the start-up check has its own evaluations
    seen = []
    trainer.denoiser.network.register_forward_pre_hook(
        lambda *_: seen.append(("base" if trainer.denoiser.base_active else "model", torch.is_grad_enabled()))
    )
    trainer.train()
    assert seen == [("model", False)] * 3 + [("base", True)] * 2 + [("model", True)] * 2  # K − 1 = 3, S = 2
    assert trainer.state.log_history[0]["loss"] > 0
