"""Score pairing: the tilted score itself on laws that are known, the cap, and the chains on which it is not right."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline
from problems import mixture_1d
from scheduler_problems import KnownChain, batch, mean_function, noise_levels, normal, ready
from tiny_conditioned import components_of, picture, sd15_from_image
from tiny_images import flux
from tiny_pipelines import sd15
from tiny_trainer import PROMPTS, make_trainer, watch_targets
from torch import Tensor

from diffusers_adjoint.core.matching import LossSteps, regression_loss, step_kl
from diffusers_adjoint.objectives import AdjointMatching
from diffusers_adjoint.objectives import adjoint_matching as module
from diffusers_adjoint.objectives.score_pairing import score_shifts
from diffusers_adjoint.schedulers import MemorylessDDIMScheduler, MemorylessFlowMatchEulerDiscreteScheduler
from diffusers_adjoint.soc.solver import ProblemChain

STEPS, SLOPE = 6, 0.8  # r(x) = .8 x
ALL = LossSteps(tuple(range(STEPS)), (1.0,) * STEPS)
FLOW, DDIM = MemorylessFlowMatchEulerDiscreteScheduler, MemorylessDDIMScheduler
START = batch(5, 1, dtype=torch.float64)
UNCAPPED = AdjointMatching("score", cap=None)


@dataclass(frozen=True)
class Scored:
    tilt: Tensor


def linear(x: Tensor) -> Scored:
    return Scored(torch.full_like(x, SLOPE))


def score_of(law, x: Tensor, alpha: float, beta: float) -> Tensor:
    """Of the law that x = α X_1 + β X_0 has, by autograd of its density."""
    leaf = x.clone().requires_grad_()
    noisy = type(law)(law.weights, alpha * law.means, alpha**2 * law.covariances + beta**2)
    return torch.autograd.grad(noisy.log_prob(leaf).sum(), leaf)[0]


# -------------------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize("cls", [FLOW, DDIM])
def test_it_is_the_tilted_score_of_a_gaussian_at_any_number_of_steps(cls):
    """μ_k = E[X_{k+1} | X_k] is exact for a Gaussian, so the slopes multiply to that of E[X_1 | X_k], and −ã_k is the difference
    of the scores. The target does not vary, so the loss at the optimum is 0."""
    law, tilted = normal(0.7, 0.36), normal(0.7 + 0.36 * SLOPE, 0.36)
    chain = KnownChain(ready(cls, STEPS, integrator="ancestral"), law, START, model=tilted)
    targets = UNCAPPED.targets(chain, ALL, linear)
    alphas, betas = (level.tolist() for level in noise_levels(chain.scheduler))
    for k, x in enumerate(targets.states):
        if chain.times[k] >= 0.02:
            wished = score_of(tilted, x, alphas[k], betas[k]) - score_of(law, x, alphas[k], betas[k])
            # float64; √ᾱ ≥ .06 is divided by.
            torch.testing.assert_close(targets.shifts[k], chain.gains[k] * wished, atol=1e-9, rtol=1e-9)
            loss = regression_loss(chain.mean(k, x), targets.base_means[k], targets.shifts[k], targets.scales[k])
            assert loss.max() < 1e-15


def test_the_loss_of_the_base_is_what_the_shifts_say():
    """½ ‖g_k ã_k / s_post‖² with ã_k = −.8 ∂E[X_1 | X_k]/∂x, by hand for N(.7, .36) on the flow path."""
    chain = KnownChain(ready(FLOW, STEPS, integrator="ancestral"), normal(0.7, 0.36), START)
    targets = UNCAPPED.targets(chain, ALL, linear)
    t = chain.times[1:]
    slope = t * 0.36 / (t**2 * 0.36 + (1 - t) ** 2)
    losses = [regression_loss(b, b, d, s) for b, d, s in zip(targets.base_means, targets.shifts, targets.scales, strict=True)]
    expected = 0.5 * (chain.gains[1:] * SLOPE * slope / chain.posterior_stds[1:]) ** 2
    torch.testing.assert_close(torch.stack(losses)[1:], expected[:, None].expand(-1, len(START)), rtol=1e-9, atol=0)
    of_noise = chain.stds[0] ** 2 * SLOPE * slope[0]  # −s_0² ã_1, with the noise that these paths have
    torch.testing.assert_close(targets.shifts[0], of_noise.expand(len(START), 1), rtol=1e-9, atol=0)


# docs/theory.md. Closed form: the tilt N(v, v) of N(0, v) by r = x is at KL v/2.
@pytest.mark.parametrize(("variance", "shares"), [(1.0, (1.0, 1.0, 1.0)), (0.04, (0.60, 0.77, 0.88)), (0.01, (0.42, 0.63, 0.79))])
def test_the_kl_that_is_logged_is_that_of_the_laws_for_unit_variance_and_less_for_narrow_data(variance, shares):
    for steps, share in zip((10, 20, 40), shares, strict=True):
        scheduler = FLOW(integrator="ancestral")
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
        base, tilted = (mean_function(scheduler, normal(mean, variance)) for mean in (0.0, variance))
        x = torch.zeros(1, 1, dtype=torch.float64)  # the control is the same everywhere
        kl = sum(step_kl(tilted(k, x), base(k, x), std) for k, std in enumerate(scheduler.posterior_stds))
        assert kl.item() / (variance / 2) == pytest.approx(share, abs=0.005)  # half a unit of the last digit


def test_along_tilted_paths_it_is_the_tilted_score_of_a_mixture():
    """There ã_k varies, and its mean given x_k is what counts: by bins of x_k, against autograd of the two densities."""
    law = mixture_1d([0.5, 0.5], [-1.0, 1.0], [0.16, 0.16])
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64) * torch.exp(SLOPE * torch.tensor([-1.0, 1.0], dtype=torch.float64))
    tilted = mixture_1d((weights / weights.sum()).tolist(), [-1 + 0.16 * SLOPE, 1 + 0.16 * SLOPE], [0.16, 0.16])
    start = batch(40_000, 1, dtype=torch.float64)
    chain = KnownChain(ready(FLOW, 40, integrator="ancestral"), law, start, model=tilted)
    chosen = LossSteps((5, 20, 35), (1.0,) * 3)
    errors = {"score": [], "next": []}
    for pairing, found in errors.items():
        targets = AdjointMatching(pairing, cap=None).targets(chain, chosen, linear)
        for k, x, shift in zip(chosen.indices, targets.states, targets.shifts, strict=True):
            t, order = float(chain.times[k]), x[:, 0].argsort()
            wished = chain.gains[k] * (score_of(tilted, x, t, 1 - t) - score_of(law, x, t, 1 - t))
            in_bins = [values[order, 0].view(20, -1).mean(1) for values in (shift, wished)]
            found.append(((in_bins[0] - in_bins[1]).norm() / in_bins[1].norm()).item())
    # 2000 samples a bin leave about 3 % where ã varies most.
    assert max(errors["score"]) < 0.06
    assert errors["next"][2] > 0.3  # near the data "ancestral" has too little noise for s_k² ã_{k+1}


def test_every_prediction_type_asks_for_the_same_control():
    law, start = mixture_1d([0.35, 0.65], [-1.0, 0.9], [0.16, 0.3]), START
    found = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = ready(DDIM, STEPS, prediction_type=kind, timestep_spacing="trailing", integrator="ancestral")
        found[kind] = AdjointMatching().targets(KnownChain(scheduler, law, start), ALL, linear)
    kept = noise_levels(scheduler)
    scale = sum(kept)  # α + β: x/(α + β) is on the flow path
    flow = FLOW(integrator="ancestral")
    flow.set_timesteps(sigmas=(kept[1] / scale)[:-1].tolist())
    found["flow"] = AdjointMatching().targets(KnownChain(flow, law, start / scale[0]), ALL, lambda x: linear(x * scale[-1]))
    for kind in ("v_prediction", "sample"):
        torch.testing.assert_close(found[kind].shifts, found["epsilon"].shifts, rtol=1e-8, atol=1e-10)
        assert torch.equal(found[kind].logged["capped"], found["epsilon"].logged["capped"])
    # diffusers keeps σ in float32.
    torch.testing.assert_close(found["flow"].shifts * scale[1:, None, None], found["epsilon"].shifts, rtol=1e-5, atol=1e-6)


def test_without_a_reward_the_base_stays():
    chain = KnownChain(ready(FLOW, STEPS, integrator="ancestral"), normal(), START)
    targets = AdjointMatching().targets(chain, ALL, lambda x: Scored(torch.zeros_like(x)))
    assert not targets.shifts.any() and not targets.logged["capped"].any()


def test_all_steps_carry_the_loss_and_have_the_scale_of_posterior():
    """ "ancestral" ends without noise; its own s_k would leave that step out, and log a KL of its own."""
    chain = KnownChain(ready(FLOW, STEPS, integrator="ancestral"), normal(), START)
    assert chain.stds[-1] == 0
    expected = ready(FLOW, STEPS, integrator="posterior").stds
    assert torch.equal(AdjointMatching().scales(chain), expected) and expected.min() > 0
    assert torch.equal(AdjointMatching().targets(chain, ALL, linear).scales, expected)
    assert torch.equal(AdjointMatching("next").scales(chain), chain.stds)


# ----------------------------------------------------------------------------------------------------------------- the cap


def test_the_cap_shortens_and_keeps_the_direction():
    adjoints, following = batch(3, 4, 2, 5, seed=1), batch(3, 4, 2, 5, seed=2)
    gains, stds = torch.tensor([0.5, 2.0, 0.1]).double(), torch.tensor([0.6, 0.9, 0.4]).double()
    free = score_shifts(adjoints, gains, following, stds, None)
    found = score_shifts(adjoints, gains, following, stds, 1.2)
    limit = 1.2 * stds[:, None] ** 2 * following.flatten(2).norm(dim=2)
    size = free.shifts.flatten(2).norm(dim=2)
    assert 0 < found.capped.sum() < found.capped.numel() and not free.capped.any()
    torch.testing.assert_close(found.capped, size > limit)
    torch.testing.assert_close(found.shifts.flatten(2).norm(dim=2).double(), torch.minimum(size.double(), limit))
    torch.testing.assert_close(found.shifts * (size / found.shifts.flatten(2).norm(dim=2))[..., None, None], free.shifts)
    assert torch.equal(found.shifts[~found.capped], free.shifts[~found.capped])


def test_the_cap_leaves_zeros_and_nans_alone():
    """A sample without a reward has the adjoint 0; one whose adjoint is NaN must be found by the regression."""
    adjoints = torch.stack([torch.zeros(1, 3), torch.full((1, 3), torch.nan), torch.full((1, 3), 1e30)], 1)
    found = score_shifts(adjoints, torch.ones(1), adjoints.clamp(max=1.0), torch.ones(1), 1.2)
    assert torch.equal(found.shifts[:, 0], torch.zeros(1, 3)) and found.shifts[:, 1:].isnan().all()
    assert not found.capped[:, :2].any()


def test_data_of_unit_variance_are_never_capped_at_1_and_narrow_ones_are_where_their_modes_meet():
    """For N(m, I) the shift is s_post² ã_{k+1} itself, which is where the cap's unit comes from."""
    chain = KnownChain(ready(FLOW, STEPS, integrator="ancestral"), normal(0.7, 1.0), START)
    targets = AdjointMatching(cap=1 + 1e-9).targets(chain, ALL, linear)
    assert not targets.logged["capped"].any()
    narrow = mixture_1d([0.5, 0.5], [-1.0, 1.0], [0.04, 0.04])
    start = torch.linspace(-2, 2, 401, dtype=torch.float64)[:, None]
    chain = KnownChain(ready(FLOW, STEPS, integrator="ancestral"), narrow, start)
    capped = AdjointMatching().targets(chain, ALL, linear).logged["capped"]
    assert 0 < capped.mean() < 1


def test_the_share_of_capped_points_is_logged(tmp_path):
    """Of each image over its steps, those at pure noise aside."""
    trainer = make_trainer(tmp_path, max_steps=1, num_loss_steps=4)
    seen = []
    watch_targets(trainer, lambda chain, targets: seen.append((chain, targets)))
    trainer.train()
    expected, line = seen[0][1].logged["capped"], trainer.state.log_history[0]
    assert expected.shape == (2,) and line["capped"] == pytest.approx(expected.mean().item())
    assert set((expected * 3).tolist()) <= {0.0, 1.0, 2.0, 3.0}  # of four steps the first is pure noise


# -------------------------------------------------------------------------------------------------------------- pure noise


class Rounded(torch.autograd.Function):
    """A network of 16 bits: its values, and what is pulled back through it. 1.7 because a slope of 1 would be exact."""

    @staticmethod
    def forward(ctx, output):
        return (1.7 * output).bfloat16().double() / 1.7

    @staticmethod
    def backward(ctx, gradient):
        return (1.7 * gradient).bfloat16().double() / 1.7


@pytest.mark.parametrize("first", [1.0, 0.9999, 0.999])
def test_near_pure_noise_16_bits_do_not_ruin_the_control(first, monkeypatch):
    """Many grids begin at σ_0 = .999. Step 0 of a rounded network against the same of an exact one, relative to the control."""
    law = mixture_1d([0.35, 0.65], [-1.0, 0.9], [0.16, 0.3])
    scheduler = FLOW(integrator="ancestral")
    scheduler.set_timesteps(sigmas=[first, *[1 - k / STEPS for k in range(1, STEPS)]])

    def shift(**options):
        return UNCAPPED.targets(KnownChain(scheduler, law, START, **options), ALL, linear).shifts[0]

    exact, found = shift(), shift(rounded=Rounded.apply)
    assert (found - exact).norm() < 2**-8 * exact.norm()  # what bfloat16 keeps of a number
    if first < 1:
        monkeypatch.setattr(module, "PURE_NOISE", 0.0)
        of_score, rounded = shift(), shift(rounded=Rounded.apply)
        assert (
            of_score - exact
        ).norm() < 0.05 * exact.norm()  # without rounding it is the same control, but for the step's length
        assert (rounded - of_score).norm() > (0.5 if first == 0.9999 else 0.03) * of_score.norm()


# -------------------------------------------------------------------------------------------- the chains where it is right


def test_a_trainer_goes_on_ancestral_paths(tmp_path):
    assert make_trainer(tmp_path).replay.scheduler.config.integrator == "ancestral"
    for options in ({"loss_kwargs": {"pairing": "next"}}, {"loss_type": "one_step"}, {"loss_type": "basic_adjoint_matching"}):
        assert make_trainer(tmp_path, **options).replay.scheduler.config.integrator == "posterior"
    assert make_trainer(tmp_path, method="discrete_adjoint").replay.scheduler.config.integrator == "posterior"
    named = make_trainer(tmp_path, integrator="euler")
    assert named.replay.scheduler.config.integrator == "euler"
    assert named.method.scales(KnownChain(ready(FLOW, 4), normal(), START)).min() > 0


@pytest.mark.parametrize("mode", ["full", "rollout"])
def test_under_guidance_steps_are_paired_by_next(tmp_path, mode, caplog):
    trainer = make_trainer(tmp_path, guidance_scale=3.0, cfg_mode=mode, max_steps=1)
    seen = []
    watch_targets(trainer, lambda chain, targets: seen.append((chain, targets)))
    trainer.train()
    chain, targets = seen[0]
    assert trainer.replay.scheduler.config.integrator == "posterior" and not chain.predicts_scores
    assert targets.logged == {} and "capped" not in trainer.state.log_history[0]
    assert "guidance acts in training, so the base's predictions are not the scores of its own paths" in caplog.text
    assert "pairing 'next' is used instead of 'score', on paths of integrator='posterior'" in caplog.text
    with pytest.raises(ValueError, match="pairing='score' needs an unguided diffusion or flow model"):
        make_trainer(tmp_path, guidance_scale=3.0, cfg_mode=mode, loss_kwargs={"pairing": "score"})


def test_guidance_that_does_not_act_in_training_changes_nothing(tmp_path, caplog):
    trainer = make_trainer(tmp_path, guidance_scale=3.0)
    assert trainer.replay.scheduler.config.integrator == "ancestral" and "guidance acts" not in caplog.text


@pytest.mark.parametrize("pag_scale", [3.0, 0.0])
def test_perturbed_attention_counts_as_guidance(tmp_path, caplog, pag_scale):
    """It acts whatever guidance_scale is, unless its own scale is 0."""
    parts = components_of(sd15(), "requires_safety_checker")
    layers = {"pag_applied_layers": ["up"]} if pag_scale else {}
    cls = StableDiffusionPAGPipeline if pag_scale else StableDiffusionPipeline
    pipeline = cls(**parts, requires_safety_checker=False, **layers)
    kwargs = {"pag_scale": pag_scale} if pag_scale else None
    trainer = make_trainer(tmp_path, pipeline=pipeline, cfg_mode="full", pipeline_kwargs=kwargs, max_steps=1)
    trainer.train()
    assert trainer.replay.arguments.guides == (pag_scale > 0)
    assert trainer.replay.scheduler.config.integrator == ("posterior" if pag_scale else "ancestral")
    assert ("guidance acts in training" in caplog.text) == (pag_scale > 0)


@pytest.mark.parametrize(("scale", "integrator"), [(1.0, "ancestral"), (3.5, "posterior")])
def test_distilled_guidance_counts_as_guidance(tmp_path, scale, integrator, caplog):
    """A guided prediction is no score, whoever computes it."""
    trainer = make_trainer(tmp_path, build=flux, guidance_scale=scale)
    assert not trainer.replay.arguments.guides
    assert trainer.replay.scheduler.config.integrator == integrator
    assert ("the network takes guidance_scale=3.5 as an input" in caplog.text) == (scale > 1)


def test_a_control_problem_has_no_score():
    chain = ProblemChain(None, None, None)
    assert not chain.predicts_scores
    with pytest.raises(ValueError, match="pairing='score' needs an unguided"):
        AdjointMatching("score").scales(chain)


@pytest.mark.parametrize("cap", [0, -1.0, float("inf"), float("nan"), "1", True])
def test_a_cap_that_bounds_nothing_is_refused(cap):
    with pytest.raises(ValueError, match="is not a bound; pass a number above 0, or None"):
        AdjointMatching(cap=cap)


def test_from_an_image_steps_are_paired_by_next(tmp_path, caplog):
    """Which is known only when the pipeline has been called: the trainer changes its chain at the start of training."""

    def trainer_from_images(**changes):
        rows = Dataset.from_list([{"prompt": prompt, "image": picture(i)} for i, prompt in enumerate(PROMPTS)])
        options = {"num_inference_steps": 5, "pipeline_kwargs": {"strength": 0.8}, "max_steps": 1, "num_loss_steps": 4}
        return make_trainer(tmp_path, sd15_from_image, rows=rows, **(options | changes))

    trainer, seen = trainer_from_images(), []
    watch_targets(trainer, lambda chain, targets: seen.append((chain, targets)))
    trainer.train()
    chain, targets = seen[0]
    assert trainer.replay.starts_below_noise and not chain.predicts_scores and targets.logged == {}
    assert trainer.replay.scheduler.config.integrator == "posterior"
    assert torch.equal(targets.scales, chain.stds.to(targets.scales)) and len(targets.scales) == 4 and targets.scales.min() > 0
    line = "the paths start from an image, so the base's predictions are not the scores of its own paths"
    assert caplog.text.count(line) == 1
    caplog.clear()
    trainer = trainer_from_images(integrator="euler")
    trainer.train()
    assert trainer.replay.scheduler.config.integrator == "euler" and "on paths of integrator='euler'" in caplog.text
    with pytest.raises(ValueError, match="pairing='score' needs an unguided .* that starts from pure noise"):
        trainer_from_images(loss_kwargs={"pairing": "score"}).train()
