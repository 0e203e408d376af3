"""Matching loss, clipping, path KL and the choice of loss steps."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from diffusers_adjoint.core.matching import choose_loss_steps, clip_loss, control, matching_loss, regression_loss, step_kl

STD = 0.3
# The same float64 arithmetic in another order.
EXACT = {"atol": 1e-13, "rtol": 1e-13}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5, 2, 3)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN, BASE, ADJOINT = draw(0), draw(1), draw(2)


def test_the_loss_is_half_the_squared_residual_summed_over_all_but_the_batch():
    expected = torch.zeros(5, dtype=torch.float64)
    for i, j, k in itertools.product(range(5), range(2), range(3)):
        mean, base, adjoint = (x[i, j, k] for x in (MEAN, BASE, ADJOINT))
        expected[i] += ((mean - base) / STD + STD * adjoint) ** 2 / 2
    torch.testing.assert_close(matching_loss(MEAN, BASE, STD, ADJOINT), expected, **EXACT)


def test_the_loss_vanishes_where_the_control_is_minus_the_scaled_adjoint():
    loss = matching_loss(BASE - STD**2 * ADJOINT, BASE, STD, ADJOINT)
    # A sum of six squares of rounding errors, each some 1e-15.
    assert loss.max() < 1e-28


def test_the_regression_is_towards_the_base_s_mean_plus_the_shift_in_units_of_the_scale():
    shift = draw(3)
    expected = 0.5 * ((MEAN - (BASE + shift)) / STD).square().sum((1, 2))
    torch.testing.assert_close(regression_loss(MEAN, BASE, shift, STD), expected, **EXACT)
    mean, base, wished = (x.clone().requires_grad_() for x in (MEAN, BASE, shift))
    regression_loss(mean, base, wished, STD).sum().backward()
    torch.testing.assert_close(mean.grad, (MEAN - BASE - shift) / STD**2, **EXACT)
    assert base.grad is None and wished.grad is None
    with pytest.raises(ValueError, match=r"mean has shape \(5, 2, 3\) but shift \(5, 2\); they must agree"):
        regression_loss(MEAN, BASE, shift[..., 0], STD)


def test_a_shift_that_float32_would_lose_beside_the_mean_is_learnt():
    """A mean of size 1 has steps of 1e-7 in float32; a stored target mean would be the base's own."""
    base, shift, scale = torch.ones(2, 3), torch.full((2, 3), 1e-9), 0.02
    mean = base.clone().requires_grad_()
    regression_loss(mean, base, shift, scale).sum().backward()
    assert torch.equal(base + shift, base)
    torch.testing.assert_close(mean.grad, -shift / scale**2)


def test_at_the_base_the_loss_is_the_adjoint_s_own_size():
    expected = 0.5 * (STD * ADJOINT).square().sum((1, 2))
    torch.testing.assert_close(matching_loss(BASE, BASE, STD, ADJOINT), expected, **EXACT)


def test_the_gradient_is_the_residual_over_the_std_and_reaches_the_mean_only():
    mean, base, adjoint = (x.clone().requires_grad_() for x in (MEAN, BASE, ADJOINT))
    matching_loss(mean, base, STD, adjoint).sum().backward()
    torch.testing.assert_close(mean.grad, ((MEAN - BASE) / STD + STD * ADJOINT) / STD, **EXACT)
    assert base.grad is None and adjoint.grad is None


def test_without_a_reward_the_gradient_at_the_base_is_exactly_zero():
    mean = BASE.clone().requires_grad_()
    matching_loss(mean, BASE, STD, torch.zeros_like(BASE)).sum().backward()
    assert torch.equal(mean.grad, torch.zeros_like(BASE))


def test_loss_and_kl_do_not_depend_on_the_batch_they_are_computed_in():
    whole = matching_loss(MEAN, BASE, STD, ADJOINT), step_kl(MEAN, BASE, STD)
    parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    assert torch.equal(whole[0], torch.cat([matching_loss(MEAN[i], BASE[i], STD, ADJOINT[i]) for i in parts]))
    assert torch.equal(whole[1], torch.cat([step_kl(MEAN[i], BASE[i], STD) for i in parts]))


def test_a_std_per_sample_is_that_sample_s_std():
    stds = torch.linspace(0.1, 1, 5, dtype=torch.float64).view(5, 1, 1)
    each = [matching_loss(MEAN[i : i + 1], BASE[i : i + 1], float(stds[i]), ADJOINT[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(matching_loss(MEAN, BASE, stds, ADJOINT), torch.cat(each), **EXACT)


def test_scalar_states_are_states_too():
    loss = matching_loss(MEAN[:, 0, 0], BASE[:, 0, 0], STD, ADJOINT[:, 0, 0])
    assert torch.equal(loss, matching_loss(MEAN[:, :1, :1], BASE[:, :1, :1], STD, ADJOINT[:, :1, :1]))


def test_step_kl_is_the_divergence_of_the_two_gaussian_steps():
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(MEAN, STD), normal(BASE, STD)).sum((1, 2))
    torch.testing.assert_close(step_kl(MEAN, BASE, STD), expected, **EXACT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: control(MEAN, BASE[:1], STD), r"mean has shape \(5, 2, 3\) but base_mean \(1, 2, 3\)"),
        (lambda: matching_loss(MEAN, BASE, STD, ADJOINT[:1]), r"mean has shape \(5, 2, 3\) but adjoint \(1, 2, 3\)"),
        (lambda: matching_loss(MEAN, BASE, 0.0, ADJOINT), "std is 0.0; leave steps without noise out of the loss steps"),
        (lambda: step_kl(MEAN, BASE, torch.tensor(-1.0)), "leave steps without noise out of the loss steps"),
        (lambda: control(MEAN, BASE, math.nan), "std is nan"),
    ],
)
def test_loss_refuses_what_would_go_wrong_silently(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_clip_is_on_the_un_halved_norm_per_sample_and_gives_clipped_terms_no_gradient():
    norm_squared = matching_loss(MEAN, BASE, STD, ADJOINT) * 2
    ordered = norm_squared.sort().values
    threshold = float((ordered[1] + ordered[2]) / 2)  # keeps two samples of five
    mean = MEAN.clone().requires_grad_()
    clipped = clip_loss(matching_loss(mean, BASE, STD, ADJOINT), threshold)
    clipped.sum().backward()
    kept = norm_squared < threshold
    assert kept.sum() == 2
    assert torch.equal(clipped[kept], norm_squared[kept] / 2)
    assert torch.equal(clipped[~kept], torch.full((3,), threshold / 2, dtype=torch.float64))
    free = MEAN.clone().requires_grad_()
    matching_loss(free, BASE, STD, ADJOINT).sum().backward()
    assert torch.equal(mean.grad[kept], free.grad[kept])
    assert torch.equal(mean.grad[~kept], torch.zeros_like(mean.grad[~kept]))


def test_a_clipped_overflow_has_no_gradient_either():
    mean = torch.full((1, 1), 1e30, requires_grad=True)  # its square overflows float32
    clip_loss(matching_loss(mean, torch.zeros(1, 1), 1.0, torch.zeros(1, 1)), 10.0).sum().backward()
    assert torch.equal(mean.grad, torch.zeros(1, 1))


def test_no_clip_leaves_the_loss_alone():
    loss = matching_loss(MEAN, BASE, STD, ADJOINT)
    assert clip_loss(loss, None) is loss


def choices(stds: torch.Tensor, count: int, selection: str, draws: int) -> list:
    generator = torch.Generator().manual_seed(0)
    return [choose_loss_steps(stds, count, selection, generator) for _ in range(draws)]


def test_the_paper_s_forty_steps_give_the_last_ten_and_ten_of_the_first_thirty():
    for steps in choices(torch.ones(40), 20, "paper", 50):
        assert steps.indices[10:] == tuple(range(30, 40))
        assert len(set(steps.indices[:10])) == 10 and max(steps.indices[:10]) < 30
        assert steps.inclusion == (10 / 30,) * 10 + (1.0,) * 10


@pytest.mark.parametrize("selection", ["paper", "uniform"])
@pytest.mark.parametrize("count", [3, 5, 9])
def test_steps_are_distinct_increasing_noisy_and_repeat_with_the_seed(selection, count):
    stds = torch.ones(12).index_fill(0, torch.tensor([0, 4, 11]), 0.0)
    runs = choices(stds, count, selection, 20)
    for steps in runs:
        assert len(steps.indices) == len(steps.inclusion) == count
        assert list(steps.indices) == sorted(set(steps.indices))
        assert not {0, 4, 11} & set(steps.indices)
    assert runs == choices(stds, count, selection, 20)


@pytest.mark.parametrize("selection", ["paper", "uniform"])
@pytest.mark.parametrize(("noisy", "count"), [(8, 4), (7, 2), (5, 5)])
def test_every_subset_is_equally_likely_and_the_kl_estimate_is_unbiased(selection, noisy, count):
    stds = torch.cat([torch.ones(noisy), torch.zeros(1)])  # as the ancestral grid ends
    terms = torch.rand(noisy, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2
    always = tuple(range(noisy - max(noisy // 4, 1), noisy)) if selection == "paper" and count < noisy else ()
    pool = [k for k in range(noisy) if k not in always]
    subsets = [(*drawn, *always) for drawn in itertools.combinations(pool, count - len(always))]

    draws = 4000
    runs = choices(stds, count, selection, draws)
    tally = Counter(steps.indices for steps in runs)
    assert set(tally) <= set(subsets)
    # Five binomial standard errors for each subset: 1 in 10⁶ a subset by chance, and the seed is fixed.
    p = 1 / len(subsets)
    assert all(abs(tally[subset] / draws - p) <= 5 * math.sqrt(p * (1 - p) / draws) for subset in subsets)

    inclusion = {k: q for steps in runs for k, q in zip(steps.indices, steps.inclusion, strict=True)}
    estimates = [sum(float(terms[k]) / inclusion[k] for k in subset) for subset in subsets]
    # Exact expectation over all subsets (Horvitz–Thompson): equal but for rounding.
    assert sum(estimates) / len(subsets) == pytest.approx(float(terms.sum()), rel=1e-13)


@pytest.mark.parametrize("selection", ["paper", "uniform"])
def test_stated_inclusion_probabilities_are_the_frequencies(selection):
    draws = 4000
    runs = choices(torch.ones(40), 20, selection, draws)
    tally = Counter(k for steps in runs for k in steps.indices)
    inclusion = {k: q for steps in runs for k, q in zip(steps.indices, steps.inclusion, strict=True)}
    assert set(inclusion) == set(range(40)), "every step with noise has a probability"
    for k, q in inclusion.items():
        # Five binomial standard errors (0 for steps that are always chosen).
        assert abs(tally[k] / draws - q) <= 5 * math.sqrt(q * (1 - q) / draws)


@pytest.mark.parametrize(
    ("stds", "count", "selection", "message"),
    [
        (torch.ones(8), 0, "uniform", "num_loss_steps=0 does not fit a grid with 8 noisy steps; pass 1 to 8"),
        (torch.ones(8), 9, "paper", "num_loss_steps=9 does not fit a grid with 8 noisy steps"),
        (torch.tensor([1.0, 1.0, 0.0]), 3, "uniform", "num_loss_steps=3 does not fit a grid with 2 noisy steps"),
        (torch.ones(40), 10, "paper", "num_loss_steps=10 is too few, .* always uses the last 10 steps"),
        (torch.ones(8), 4, "latest", "loss_step_selection='latest' is unknown; pass 'uniform' or 'paper'"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(stds, count, selection, message):
    with pytest.raises(ValueError, match=message):
        choose_loss_steps(stds, count, selection)
