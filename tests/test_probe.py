"""Images of the base before training: what they say of λ and of distilled models, and that nothing else notices them."""

import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from peft import LoraConfig
from scipy.stats import t as student
from tiny_audio import FAMILIES as AUDIO
from tiny_images import flux2_klein
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, brightness, config, difference, logged, make_trainer, weights
from tiny_videos import FAMILIES as VIDEOS
from torch import nn

from diffusers_adjoint import AdjointMatchingTrainer, memoryless_scheduler
from diffusers_adjoint.metrics import Estimate
from diffusers_adjoint.metrics.estimate import between_prompt_std, within_prompt_std
from diffusers_adjoint.model.randomness import Stream, seeded_generators
from diffusers_adjoint.replay import PipelineReplay
from diffusers_adjoint.rewards import WeightedReward
from diffusers_adjoint.trainer.probe import SamplerDifference, first_rows, probe_base, sampler_difference
from diffusers_adjoint.trainer.sample_log import summarise
from diffusers_adjoint.trainer.target_kl import announce_tilt, exceeds_target

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "pipeline"


# ------------------------------------------------------------------------------------------------- spread within a prompt


def test_the_spread_within_a_prompt_is_pooled_over_prompts():
    rewards = torch.tensor([[1.0, 3.0, torch.nan], [10.0, 10.5, 11.0], [7.0, torch.nan, torch.nan]], dtype=torch.float64)
    # ((1 − 2)² + (3 − 2)²) + (.5² + .5²) over (2 − 1) + (3 − 1) + (1 − 1)
    expected = math.sqrt((2 + 0.5) / 3)
    found = within_prompt_std(rewards)
    assert found.mean == pytest.approx(expected, rel=1e-12)
    assert found.standard_error == pytest.approx(expected / math.sqrt(6), rel=1e-12)
    moved = within_prompt_std(rewards + torch.tensor([[0.0], [100.0], [-5.0]]))
    assert moved.mean == pytest.approx(expected, rel=1e-12)
    assert between_prompt_std(rewards) == pytest.approx(np.std([2, 10.5, 7], ddof=1), rel=1e-12)
    assert math.isnan(within_prompt_std(torch.ones(4, 1)).mean) and math.isnan(between_prompt_std(torch.ones(1, 4)))


def test_the_spread_within_a_prompt_is_unbiased_and_its_error_calibrated():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 8, 2, generator=generator, dtype=torch.float64) * 3 + torch.arange(8.0).view(8, 1) * 50
    found = [within_prompt_std(draw) for draw in draws]
    variances = torch.tensor([estimate.mean**2 for estimate in found])
    stds = torch.tensor([estimate.mean for estimate in found])
    # The variance of 8 degrees of freedom spreads by half of itself, its mean over 4000 draws by .8 %, of which four are allowed.
    assert variances.mean().item() == pytest.approx(9, rel=0.032)
    # √(2ν) is the first term of an expansion in 1/ν: 3 % at 8.
    assert stds.std().item() == pytest.approx(torch.tensor([e.standard_error for e in found]).mean().item(), rel=0.05)


def test_the_log_tells_the_spread_within_prompts_from_that_between_them():
    samples = {"reward": torch.tensor([1.0, 3.0, 11.0, 13.0, torch.nan, 7.0]), "rewards/r": torch.tensor([1.0, 3.0])}
    line = summarise(samples, images_per_prompt=2)
    assert line["reward_std"] == pytest.approx(math.sqrt(2)) and line["rewards/r/std"] == pytest.approx(math.sqrt(2))
    assert line["reward_std_between"] == pytest.approx(np.std([2, 12, 7], ddof=1))
    assert line["reward"] == pytest.approx(7)
    alone = summarise(samples, images_per_prompt=1)
    assert "reward_std" not in alone  # nothing tells it from the spread between prompts
    assert alone["reward_std_between"] == pytest.approx(np.std([1, 3, 11, 13, 7], ddof=1))
    assert "reward_std_between" not in summarise(samples, images_per_prompt=6)
    assert summarise(samples)["reward_std"] == pytest.approx(np.std([1, 3, 11, 13, 7], ddof=1))  # of an evaluation


def offset_reward(images, prompts, offset):
    """A number added to all rewards of one prompt changes no target."""
    return brightness(images, prompts) + torch.tensor(offset)


def train_with_offsets(folder, offsets, **changes):
    rows = Dataset.from_dict({"prompt": PROMPTS[: len(offsets)], "offset": offsets})
    args = config(folder, train_sampling_strategy="sequential", **{"max_steps": 1, **changes})
    trainer = AdjointMatchingTrainer(sd3(), offset_reward, args, rows, peft_config=LoraConfig(r=2))
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{"probe_base": True}, {"num_generations": 4}], ids=["probe", "first update"])
def test_what_differs_between_prompts_is_no_tilt(tmp_path, caplog, capsys, options):
    told, targets, within = [], [], []
    for offsets in ([0.0, 0.0], [0.0, 1.0]):
        caplog.clear()
        trainer = train_with_offsets(tmp_path, offsets, **options)
        assert "outside 0.1–10" not in caplog.text
        told.append(next(line for line in capsys.readouterr().out.splitlines() if "nats from the base" in line))
        targets += logged(trainer, "target_kl_estimate")
        within += logged(trainer, "reward_std")
    assert told[0] == told[1]
    # Float32 rewards of .5 ± .002 lose a digit or two when 1 is added.
    assert targets[0] == pytest.approx(targets[1], rel=1e-3) and targets[0] > 0
    assert within == ([] if "probe_base" in options else [pytest.approx(within[0], rel=1e-3)] * 2)
    assert logged(trainer, "reward_std_between")[0] == pytest.approx(np.std([0, 1], ddof=1), rel=0.02)


def test_the_log_does_not_depend_on_how_a_batch_is_split(tmp_path):
    lines = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = train_with_offsets(
            tmp_path,
            [0.0, 1.0, 2.0, 3.0],
            num_generations=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        lines.append({name: logged(trainer, name)[0] for name in ("reward_std", "reward_std_between", "target_kl_estimate")})
    for line in lines[1:]:
        assert line == pytest.approx(lines[0], rel=1e-2)  # float32 rewards up to 3.5 that differ by 1e-3


def test_a_target_that_cannot_be_told_is_no_number(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=1)  # without a probe, and with one image a prompt
    trainer.train()
    assert "cannot be estimated, because no prompt has two images" in caplog.text
    assert not logged(trainer, "target_kl_estimate")
    caplog.clear()
    trainer = make_trainer(tmp_path, reward=lambda images, prompts: [None] * len(images), max_steps=1, probe_base=True)
    with pytest.raises(ValueError, match="no update was made"):  # without any reward
        trainer.train()
    assert "cannot be estimated, because no prompt has two images" in caplog.text
    assert not logged(trainer, "target_kl_estimate") and not logged(trainer, "probe/reward/own")


@pytest.mark.parametrize(("scale", "said"), [(0.05, "raise reward_scale"), (3.0, None), (11.0, "lower reward_scale")])
def test_what_is_said_of_the_target(caplog, capsys, scale, said):
    rewards = torch.tensor([[0.0, math.sqrt(2)], [5.0, 5.0 + math.sqrt(2)]])  # spread 1 within each
    assert announce_tilt(scale, rewards) == pytest.approx(scale**2 / 2)
    line = f"λ·std(r) = {scale:.3g} ± {scale / 2:.1g} within a prompt: the target is about {scale**2 / 2:.3g} nats from the base."
    assert capsys.readouterr().out == f"{line}\n"  # information, of every healthy run
    assert ("is outside 0.1–10" in caplog.text) == (said is not None)
    assert said is None or said in caplog.text


# ----------------------------------------------------------------------------------------------- leaving the target behind


def test_a_kl_far_beyond_the_target_is_told_once(tmp_path, caplog):
    options = {"lora": False, "reward_scale": 20.0, "probe_base": True, "max_steps": 4}
    trainer = make_trainer(tmp_path, learning_rate=0.3, rows=PROMPTS * 2, **options)
    trainer.train()
    target, kl = logged(trainer, "target_kl_estimate"), logged(trainer, "kl")
    assert max(kl) > 3 * target[0] + 1 and sum(value > 3 * target[0] + 1 for value in kl) > 1
    warnings = [line for line in caplog.messages if "lower learning_rate" in line]
    assert len(warnings) == 1
    first = next(value for value in kl if value > 3 * target[0] + 1)
    assert f"kl = {first:.3g} nats, but the target is about {target[0]:.3g} nats" in warnings[0]
    caplog.clear()
    make_trainer(tmp_path, learning_rate=1e-5, rows=PROMPTS * 2, **options).train()
    assert "lower learning_rate" not in caplog.text


def test_what_is_beyond_the_target():
    assert not exceeds_target({"kl": 2.4, "target_kl_estimate": 0.5})
    assert exceeds_target({"kl": 2.6, "target_kl_estimate": 0.5})
    assert exceeds_target({"kl_unguided": 2.6, "target_kl_estimate": 0.5})
    assert not exceeds_target({"kl": 1e9}) and not exceeds_target({"kl": math.nan, "target_kl_estimate": 0.5})


# ------------------------------------------------------------------------------------------------------ what the probe draws


def samples(pipeline, prompts, numbers, steps, memoryless, integrator="posterior"):
    """By plain diffusers, one image a call."""
    images = []
    for prompt, number in zip(prompts, numbers, strict=True):
        parts = pipeline.components
        if memoryless:
            parts = parts | {"scheduler": memoryless_scheduler(pipeline.scheduler, integrator=integrator)}
        plain = type(pipeline)(**parts)
        plain.set_progress_bar_config(disable=True)
        (start,) = seeded_generators(0, 0, [number], Stream.PROBE)
        if memoryless:  # this pipeline does not hand its generator to the scheduler
            plain.scheduler.set_generator(seeded_generators(0, 0, [number], Stream.PROBE_NOISE))
        call = {"num_inference_steps": steps, "guidance_scale": 1.0, "generator": start, "output_type": "pt"}
        images.append(plain(prompt, **call).images)
    return torch.cat(images)


@pytest.mark.parametrize(("options", "integrator"), [({}, "posterior"), ({"sampling_integrator": "compensated"}, "compensated")])
def test_it_measures_what_plain_diffusers_samples(tmp_path, options, integrator):
    """Also when another integrator trains: the chain of the probe is the nearest to the base, if no other is asked for."""
    trainer = make_trainer(tmp_path, probe_base=True, seed=0, integrator="euler", max_steps=1, **options)
    trainer.train()
    numbers = range(16)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    fresh = sd3()
    memoryless, own = (brightness(samples(fresh, prompts, numbers, 4, kind, integrator), prompts) for kind in (True, False))
    # Batches of two against single images: float32 sums in another order.
    assert logged(trainer, "probe/reward/memoryless") == [pytest.approx(memoryless.mean().item(), rel=1e-5)]
    assert logged(trainer, "probe/reward/own") == [pytest.approx(own.mean().item(), rel=1e-5)]
    spread = memoryless.double().view(4, 4).var(1).mean().sqrt().item()  # equal numbers: the mean of the variances
    assert logged(trainer, "target_kl_estimate")[0] == pytest.approx(0.5 * (50.0 * spread) ** 2, rel=1e-3)
    assert {f"probe/{name}/own" for name in ("brightness", "sharpness", "saturated_pixels")} <= trainer.state.log_history[
        0
    ].keys()


class Rows:
    """Samples in each call of the denoiser without gradient."""

    def __init__(self, network):
        self.rows = []
        network.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, network, args, kwargs):
        self.rows.append(len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))


@pytest.mark.parametrize(
    ("build", "scale", "mode", "guided"),
    [(sd3, 1.0, "rollout", 1), (sd3, 4.0, "none", 1), (sd15, 4.0, "rollout", 2)],
)
def test_it_costs_sixteen_images_of_each_kind(tmp_path, monkeypatch, build, scale, mode, guided):
    """Both kinds are guided where training's rollouts are."""
    options = {"guidance_scale": scale, "cfg_mode": mode, "num_inference_steps": 5}
    trainer = make_trainer(tmp_path, build, rows=PROMPTS[:2], probe_base=True, max_steps=1, **options)
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)  # counted elsewhere
    monkeypatch.setattr(trainer, "training_step", lambda *_: torch.zeros((), requires_grad=True))
    counter = Rows(getattr(trainer.pipeline, trainer.replay.component))
    trainer.train()
    steps = 5 + 5 + (build is sd15)  # PNDM takes one step twice
    assert sum(counter.rows) == 16 * steps * guided
    assert max(counter.rows) <= 2 * guided  # no more images at a time than training has
    assert trainer.denoiser.evaluations == 0  # none of them is in evaluations_per_second


def test_before_the_batch_size_is_found_one_image_is_drawn_at_a_time(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, probe_base=True, auto_find_batch_size=True, max_steps=1, num_inference_steps=2)
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)
    monkeypatch.setattr(trainer, "training_step", lambda *_: torch.zeros((), requires_grad=True))
    counter = Rows(trainer.pipeline.transformer)
    trainer.train()
    assert counter.rows == [1] * (2 * 16 * 2)


def test_few_prompts_have_more_images_each_and_many_have_two(tmp_path):
    def prompts(rows):
        seen = []

        def reward(images, prompts):
            seen.extend(prompts)
            return brightness(images, prompts)

        replay = PipelineReplay(sd3(), memoryless_scheduler(sd3().scheduler), 2)
        columns = first_rows([{"prompt": prompt} for prompt in rows])
        probe = probe_base(replay, WeightedReward(reward), columns, batch_size=40, guided=False, seed=0)
        assert probe.rewards.shape == (len(columns["prompt"]), len(seen) // 2 // len(columns["prompt"]))
        return {prompt: seen.count(prompt) // 2 for prompt in dict.fromkeys(seen)}

    assert prompts(["a"]) == {"a": 16}
    assert prompts(list("abc")) == dict.fromkeys("abc", 6)
    assert prompts(list("abcdefghij")) == dict.fromkeys("abcdefgh", 2)


def test_the_base_is_measured_not_an_adapter_of_ours(tmp_path):
    moved = make_trainer(tmp_path, probe_base=True, max_steps=1)
    for name, parameter in moved.denoiser.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    fresh = make_trainer(tmp_path, probe_base=True, max_steps=1)
    for trainer in (moved, fresh):
        trainer.train()
    assert logged(moved, "probe/reward/own") == logged(fresh, "probe/reward/own")
    assert logged(moved, "probe/reward/memoryless") == logged(fresh, "probe/reward/memoryless")


# ------------------------------------------------------------------------------------------- nothing else notices the probe


def noisy(images, prompts):
    """Draws from every global generator there is."""
    chance = random.random() + float(np.random.rand()) + torch.rand(()).item()
    return brightness(images, prompts) + chance


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_training_is_the_same_bit_for_bit(tmp_path, lora):
    order = []

    def reward(images, prompts):
        order.extend(prompts)
        return noisy(images, prompts)

    def run(probe):
        order.clear()
        random.seed(0)
        np.random.seed(0)
        trainer = make_trainer(tmp_path, reward=reward, lora=lora, probe_base=probe, rows=PROMPTS * 2)  # shuffled
        trainer.train()
        return weights(trainer), logged(trainer, "reward"), order[-4:]

    (probed, *rest), (plain, *same) = run(True), run(False)
    assert difference(probed, plain) == 0.0
    assert rest == same


def test_a_stream_is_not_consumed(tmp_path):
    seen = []

    def reward(images, prompts):
        if torch.is_grad_enabled():
            seen.append(list(prompts))
        return brightness(images, prompts)

    rows = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS))
    make_trainer(tmp_path, reward=reward, rows=rows, probe_base=True).train()
    assert seen[-2:] == [PROMPTS[:2], PROMPTS[2:]]


def test_a_resumed_run_and_a_second_one_draw_nothing_and_know_the_target(tmp_path):
    without_gradient = []

    def reward(images, prompts):
        without_gradient.append(not torch.is_grad_enabled())
        return brightness(images, prompts)

    def make():
        without_gradient.clear()
        steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "rows": PROMPTS * 2}
        return make_trainer(tmp_path, reward=reward, probe_base=True, **steps)

    trainer = make()
    trainer.train()
    targets = logged(trainer, "target_kl_estimate")
    assert sum(without_gradient) == 2 * 8  # batches of two images of either kind
    assert len(targets) == 4 and len(set(targets)) == 1 and targets[0] > 0  # with the images of the base, and in each line
    trainer.train()
    assert sum(without_gradient) == 2 * 8
    assert set(logged(trainer, "target_kl_estimate")) == set(targets)
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not any(without_gradient)
    assert logged(resumed, "target_kl_estimate") == targets[1:]


def test_a_run_that_stopped_before_its_first_line_goes_on_with_the_target(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "probe_base": True}
    trainer, resumed = make_trainer(tmp_path, **settings), make_trainer(tmp_path, **settings)
    trainer.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    told, known = ([line["target_kl_estimate"] for line in run.state.log_history if "loss" in line] for run in (trainer, resumed))
    assert known == told and len(told) == 1


def test_an_error_of_the_reward_is_an_error(tmp_path):
    def reward(images, prompts):
        if not torch.is_grad_enabled():
            raise RuntimeError("this reward is broken")
        return brightness(images, prompts)

    with pytest.raises(RuntimeError, match="this reward is broken"):
        make_trainer(tmp_path, reward=reward, probe_base=True).train()
    make_trainer(tmp_path, reward=reward).train()  # without a probe it is called with gradients only


@pytest.mark.parametrize("family", [VIDEOS[0], AUDIO[0]], ids=lambda family: family.name)
def test_videos_and_sound_are_probed(family):
    replay = PipelineReplay(
        family.build(), memoryless_scheduler(family.build().scheduler), 3, pipeline_kwargs=dict(family.kwargs)
    )
    columns = {name: values[:2] for name, values in family.columns.items()}
    reward = WeightedReward([lambda images, prompts: images.flatten(1).mean(1), lambda images, prompts: images.flatten(1).std(1)])
    probe = probe_base(replay, reward, columns, batch_size=8, guided=True, seed=0)
    assert probe.rewards.shape == (2, 8) and probe.rewards.isfinite().all()
    assert ("sharpness" in probe.own) == (family is VIDEOS[0])
    assert {"reward", "rewards/<lambda>", "rewards/<lambda>_1"} <= probe.own.keys()


def test_an_image_that_is_no_number_is_left_out():
    pipeline = sd3()
    decode, calls = pipeline.vae.decode, []

    def spoilt(*args, **kwargs):
        decoded = decode(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:  # the first batch of the memoryless chain
            decoded[0][0] = torch.nan
        return decoded

    pipeline.vae.decode = spoilt
    replay = PipelineReplay(pipeline, memoryless_scheduler(pipeline.scheduler), 2)
    columns = {"prompt": PROMPTS[:2]}
    probe = probe_base(replay, WeightedReward(brightness), columns, batch_size=8, guided=False, seed=0)
    for name in ("reward", "sharpness", "saturated pixels"):
        assert (probe.memoryless[name].isnan().sum(), probe.own[name].isnan().sum()) == (1, 0)
    assert all(math.isfinite(value) for value in probe.summary().values())


# ------------------------------------------------------------------------------------------------------------- two samplers


def test_the_difference_of_two_samplers_is_the_slow_one():
    generator = torch.Generator().manual_seed(0)
    own, memoryless = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    own[0, 1], memoryless[1, :3], memoryless[2] = torch.nan, torch.nan, torch.nan
    found = sampler_difference(own, memoryless)

    def groups(values):
        return [row[~np.isnan(row)] for row in values.numpy()]

    def variance(values):
        rows = [row for row in groups(values) if len(row)]
        return sum(((row - row.mean()) ** 2).sum() for row in rows) / sum(len(row) - 1 for row in rows)

    pairs = [(a, b) for a, b in zip(groups(own), groups(memoryless), strict=True) if len(a) and len(b)]
    assert len(pairs) == 2
    mean = np.mean([a.mean() - b.mean() for a, b in pairs])
    error = math.sqrt(sum(variance(own) / len(a) + variance(memoryless) / len(b) for a, b in pairs)) / 2
    assert found.difference.mean == pytest.approx(mean, rel=1e-12)
    assert found.difference.standard_error == pytest.approx(error, rel=1e-12)
    assert found.std == pytest.approx(math.sqrt((variance(own) + variance(memoryless)) / 2), rel=1e-12)
    assert found.freedom == (2 + 3 + 3) + (3 + 0)


def test_no_more_is_seen_than_is_there():
    nothing = torch.full((2, 2), torch.nan, dtype=torch.float64)
    assert not sampler_difference(nothing, torch.ones(2, 2, dtype=torch.float64)).matters
    single = sampler_difference(torch.tensor([[1.0]]), torch.tensor([[5.0]]))
    assert not single.matters  # nothing to tell chance from difference
    both = {"own": 1.0, "memoryless": 0.0, "std": 4.0, "freedom": 1000}
    assert not SamplerDifference(difference=Estimate(1.0, 0.1), **both).matters  # certain, and small
    assert SamplerDifference(difference=Estimate(2.1, 0.1), **both).matters
    assert not SamplerDifference(difference=Estimate(2.1, 0.75), **both).matters  # large, and uncertain


@pytest.mark.parametrize("freedom", [14, 16, 30, 1000])
def test_three_estimated_standard_errors_are_as_seldom_as_three_known_ones(freedom):
    exact = student.isf(0.00134989803163, freedom)  # P(N(0, 1) > 3)
    std = {"own": 0.0, "memoryless": 0.0, "std": 0.0, "freedom": freedom}
    # The third term of the expansion is below half a per cent there.
    assert not SamplerDifference(difference=Estimate(0.995 * exact, 1.0), **std).matters
    assert SamplerDifference(difference=Estimate(1.005 * exact, 1.0), **std).matters


@pytest.mark.parametrize(("prompts", "images"), [(1, 16), (8, 2)])
def test_what_does_not_differ_is_seldom_told_apart(prompts, images):
    """Of normal numbers 0.27 %; of what follows another law, exponential, 1 % and less."""
    generator = torch.Generator().manual_seed(0)
    offsets = 100 * torch.arange(prompts, dtype=torch.float64).view(-1, 1)
    for draw, expected in ((torch.Tensor.normal_, 0.0027), (torch.Tensor.exponential_, 0.004)):
        draws = draw(torch.empty(1200, 2, prompts, images, dtype=torch.float64), generator=generator) + offsets
        rate = np.mean([sampler_difference(own, memoryless).matters for own, memoryless in draws])
        # Four standard errors of a rate over 1200.
        assert abs(rate - expected) < 4 * math.sqrt(expected / 1200)


class Straight(ModelMixin, ConfigMixin):
    """The flow of pixels N(0, s²), known in closed form: of a model of the data, or of one that is distilled.

    A distilled model is exact where its own sampler goes: from noise x_0 on the straight line to s·x_0, in one step or in many.
    Elsewhere it says what it says on the line through the same x.
    """

    @register_to_config
    def __init__(self, std: float, distilled: bool):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))  # what training may move

    def forward(self, x, noise):
        """x = (1 − σ) X_1 + σ X_0 → the prediction of X_0 − X_1."""
        data = 1 - noise
        s = self.config.std
        gain = s / (noise + data * s) if self.config.distilled else data * s**2 / ((data * s) ** 2 + noise**2)
        return (x - gain * x) / noise + self.shift


class Pixels(DiffusionPipeline):
    """Grey pixels around one half, one σ at a time."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def prepare_latents(self, count, generator):
        return torch.stack([torch.randn(1, 4, 4, generator=g, device="cpu") for g in generator[:count]])

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pt", return_dict=False):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.prepare_latents(len(prompt), generator)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t / 1000)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return ((0.5 + latents / 8).clamp(0, 1),)


def end_point_stds(std, distilled, steps):
    """Standard deviation of x_K by the pipeline's own Euler steps and by the memoryless chain, x being a multiple of noise."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    chain = memoryless_scheduler(own)
    own.set_timesteps(steps)
    chain.set_timesteps(steps)
    factor, variance = 1.0, 1.0
    sigmas = own.sigmas.double().tolist()
    for k, (now, after) in enumerate(pairwise(sigmas)):
        data = 1 - now
        gain = std / (now + data * std) if distilled else data * std**2 / ((data * std) ** 2 + now**2)
        slope = (1 - gain) / now
        factor *= 1 + (after - now) * slope
        mean = chain.table.state[k].item() + chain.table.output[k].item() * slope
        variance = mean**2 * variance + (chain.table.std[k].item() ** 2 if k + 1 < steps else 0.0)
    return abs(factor), math.sqrt(variance)


def spread(images, prompts):
    return images.flatten(1).std(1)


@pytest.mark.parametrize(("distilled", "std", "steps"), [(True, 0.2, 4), (True, 0.2, 9), (False, 1.0, 40)])
def test_a_distilled_model_is_told(tmp_path, caplog, distilled, std, steps):
    own, memoryless = end_point_stds(std, distilled, steps)
    # In closed form: the distilled model's own samples are exact at any number of steps, the memoryless ones are far from them.
    assert (own == pytest.approx(std, rel=1e-6) and memoryless > 2 * std) if distilled else abs(own / memoryless - 1) < 0.05
    trainer = make_trainer(
        tmp_path,
        pipeline=Pixels(Straight(std, distilled), FlowMatchEulerDiscreteScheduler(shift=3.0)),
        reward=spread,
        lora=False,
        num_inference_steps=steps,
        probe_base=True,
        max_steps=1,
        learning_rate=1e-4,
    )
    trainer.train()
    # 16 pixels of 16 images: 4 % of a standard deviation, of which four are allowed; √(15/16.5) for 16 pixels of unknown mean.
    for kind, expected in (("own", own), ("memoryless", memoryless)):
        assert logged(trainer, f"probe/reward/{kind}")[0] * 8 == pytest.approx(0.984 * expected, rel=0.18)
    assert ("give different images of the base: " in caplog.text) == distilled
    if distilled:
        assert f"with {steps} steps" in caplog.text and "reward 0.0" in caplog.text and "contrast 0.0" in caplog.text
        assert "put the distillation (a LoRA, as published for many) on top afterwards" in caplog.text


@pytest.mark.parametrize("steps", [pytest.param(10, marks=pytest.mark.slow), 20])
def test_a_trained_model_of_the_data_is_not_told(tmp_path, caplog, steps):
    """The digits pipeline at the steps of its demo and at the default, whose two samplers give the same digits."""
    trainer = make_trainer(
        tmp_path,
        pipeline=DiffusionPipeline.from_pretrained(DIGITS),
        rows=["zero", "one", "two", "three", "four", "five", "six", "seven"],
        pipeline_kwargs={"max_sequence_length": 1},
        num_inference_steps=steps,
        per_device_train_batch_size=8,
        max_steps=1,
        probe_base=True,
    )
    trainer.train()
    assert "different images of the base" not in caplog.text
    assert logged(trainer, "probe/brightness/own")[0] == pytest.approx(0.31, abs=0.05)


def test_a_pipeline_that_calls_itself_distilled_is_told(tmp_path, caplog):
    options = {"pipeline_kwargs": {"max_sequence_length": 128, "height": 32, "width": 32}}
    make_trainer(tmp_path, pipeline=flux2_klein(), **options)
    assert "is_distilled" not in caplog.text
    pipeline = flux2_klein()
    pipeline.register_to_config(is_distilled=True)
    make_trainer(tmp_path, pipeline=pipeline, **options)
    assert "Flux2KleinPipeline says is_distilled=True" in caplog.text
