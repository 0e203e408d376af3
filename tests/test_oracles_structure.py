"""What must hold whatever the law: gradients, scales and splits, on a network with parameters and a bimodal base."""

from __future__ import annotations

import pytest
import torch
from adjoints import lean_from_end
from problems import GaussianMixture, QuadraticReward
from samplers import BIMODAL, CASES, EXACT, FAMILIES, LINEAR, NORMAL, Sampler, draw, tensor
from torch import Tensor

from diffusers_adjoint.core.adjoint import lean_adjoint
from diffusers_adjoint.core.matching import matching_loss
from diffusers_adjoint.core.trajectory import Trajectory


class Corrected(torch.nn.Module):
    """The exact network plus a small trained one: what fine-tuning starts from, with known base."""

    def __init__(self, sampler: Sampler, law: GaussianMixture, *, zero: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sampler, self.law = sampler, law
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        if zero:
            torch.nn.init.zeros_(self.net[2].weight)
            torch.nn.init.zeros_(self.net[2].bias)

    def forward(self, k: int, x: Tensor) -> Tensor:
        time = torch.full_like(x, k / 10)
        output = self.sampler.output(self.law, k, x) + 0.3 * self.net(torch.cat([x, time], 1))
        return self.sampler.transition(output, x, k).mean


BENT = QuadraticReward(tensor([0.5]), tensor([[0.7]]), tensor([0.2]))
STEPS = 8


def setting(prediction: str, integrator: str, *, zero: bool = False) -> tuple[Sampler, Corrected, Corrected, Trajectory]:
    """Sampler, frozen base, trained model and a path of the trained one."""
    sampler = Sampler.of(prediction, integrator, STEPS)
    base, trained = Corrected(sampler, BIMODAL, zero=zero), Corrected(sampler, BIMODAL, zero=zero)
    if not zero:
        torch.nn.init.normal_(trained.net[2].weight)
    return sampler, base, trained, sampler.path(trained, draw(6, 1, seed=8), seed=9)


def total_loss(sampler: Sampler, base: Corrected, trained: Corrected, path: Trajectory, reward: QuadraticReward) -> Tensor:
    lean = lean_from_end(base, path, lambda end: -reward.grad(end))
    terms = [
        matching_loss(trained(k, path.states[k]), lean.base_means[k], sampler.stds[k], lean.adjoints[k + 1])
        for k in sampler.noisy_steps()
    ]
    return torch.stack(terms).sum(0)


def gradients(model: Corrected) -> list[Tensor]:
    grads = [parameter.grad for parameter in model.net.parameters()]
    model.zero_grad()
    return grads


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_the_adjoint_is_the_gradient_through_the_sampler(prediction, integrator):
    """Along a base path, against autograd through all steps and against finite differences; the end is the noisy x_K."""
    sampler, base, _, _ = setting(prediction, integrator)
    noise, start = draw(STEPS, 6, 1, seed=9), draw(6, 1, seed=8)

    def end_from(x: Tensor, k: int) -> Tensor:
        for j in range(k, STEPS):
            x = base(j, x) + sampler.stds[j] * noise[j]
        return x

    path = sampler.path(base, start, seed=9)
    lean = lean_adjoint(base, path, -BENT.grad(path.states[-1]))
    for k in range(STEPS):
        x = path.states[k].clone().requires_grad_()
        through_all = torch.autograd.grad(-BENT(end_from(x, k)).sum(), x)[0]
        torch.testing.assert_close(lean.adjoints[k], through_all, **EXACT)
        width = 1e-5
        up, down = (BENT(end_from(path.states[k] + sign * width, k)) for sign in (1, -1))
        # Truncation ~ width² = 1e-10 times third derivatives (bimodal: up to 1e3), rounding 1e-11.
        torch.testing.assert_close(lean.adjoints[k, :, 0], -(up - down).detach() / (2 * width), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_the_gradient_reaches_the_trained_network_and_nothing_else(prediction):
    sampler, base, trained, path = setting(prediction, "compensated")
    total_loss(sampler, base, trained, path, BENT).sum().backward()
    assert all(grad.abs().max() > 0 for grad in gradients(trained))
    assert gradients(base) == [None] * 4  # its parameters do require a gradient
    assert path.states.grad is None and not path.states.requires_grad


@pytest.mark.parametrize("prediction", FAMILIES)
def test_the_adjoint_does_not_know_the_trained_network(prediction):
    _, base, trained, path = setting(prediction, "compensated")
    before = lean_from_end(base, path, lambda end: -BENT.grad(end)).adjoints
    torch.nn.init.normal_(trained.net[0].weight)
    assert torch.equal(lean_from_end(base, path, lambda end: -BENT.grad(end)).adjoints, before)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_scaling_the_reward_scales_adjoint_and_optimal_control(prediction):
    sampler, base, _, path = setting(prediction, "compensated")
    one, three = (lean_from_end(base, path, lambda end, r=r: -r.grad(end)).adjoints for r in (BENT, BENT.scaled(3)))
    torch.testing.assert_close(three, 3 * one, **EXACT)
    chain = sampler.chain(NORMAL)
    one, three = (torch.cat([x.flatten() for x in chain.optimal_control(r)]) for r in (LINEAR, LINEAR.scaled(3)))
    torch.testing.assert_close(three, 3 * one, **EXACT)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_at_the_base_the_loss_is_half_the_scaled_adjoint_squared(prediction):
    sampler, base, trained, path = setting(prediction, "compensated", zero=True)
    lean = lean_from_end(base, path, lambda end: -BENT.grad(end))
    expected = 0.5 * (sampler.stds[:, None] * lean.adjoints[1:, :, 0]).square().sum(0)
    torch.testing.assert_close(total_loss(sampler, base, trained, path, BENT), expected, **EXACT)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_without_reward_the_base_is_a_fixed_point_to_the_bit(prediction):
    sampler, base, trained, path = setting(prediction, "compensated", zero=True)
    total_loss(sampler, base, trained, path, BENT.scaled(0.0)).sum().backward()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(trained))


@pytest.mark.parametrize("prediction", FAMILIES)
def test_the_gradient_does_not_depend_on_how_batch_and_steps_are_split(prediction):
    sampler, base, trained, path = setting(prediction, "compensated")
    total_loss(sampler, base, trained, path, BENT).sum().backward()
    whole = gradients(trained)
    for rows in (slice(0, 1), slice(1, 6)):
        part = Trajectory(path.states[:, rows], path.timesteps, path.stds)
        lean = lean_from_end(base, part, lambda end: -BENT.grad(end))
        for k in sampler.noisy_steps():  # one backward a step and a part of the batch
            mean = trained(k, part.states[k])
            matching_loss(mean, lean.base_means[k], sampler.stds[k], lean.adjoints[k + 1]).sum().backward()
    for split, together in zip(gradients(trained), whole, strict=True):
        torch.testing.assert_close(split, together, atol=1e-10, rtol=1e-10)
