"""Pipelines that step two latents at once: their state is both, and rewards hear what is made of the second one."""

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import BaseOutput
from peft import LoraConfig
from test_quantised import quantise
from tiny_joint import LTX2, ltx2
from tiny_pipelines import generators, sd3
from torch import Tensor, nn

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, memoryless_scheduler
from diffusers_adjoint.replay import PipelineReplay, check_replay
from diffusers_adjoint.replay.conditioning import joined, separated
from diffusers_adjoint.replay.plain import Media
from diffusers_adjoint.rewards import WeightedReward, gradient_clipped, per_frame, reward_gradient, smoothed, weighted_sum
from diffusers_adjoint.rewards.quantised import warn_of_quantised_rewards

PROMPTS = ["a cat", "two dogs"]
COLUMNS = {"prompt": PROMPTS}
SOUND = 32  # numbers; as many as make a generator give a small tensor what it gives a large one first


@dataclass
class DuetOutput(BaseOutput):
    frames: Tensor
    audio: Tensor


class Duet(StableDiffusion3Pipeline):
    """A picture, with latents (4, 4, 4), and a sound (32,), each of which the network's prediction for the other depends on."""

    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        sound = self.prepare_sound(len(prompt), generator)
        other = self.second_scheduler(num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps)
        embeds, _, pooled, _ = self.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=8)
        for t in self.scheduler.timesteps:
            seen = latents + sound.mean(1).view(-1, 1, 1, 1)
            given = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "return_dict": False}
            output = self.transformer(seen, timestep=t.expand(len(prompt)), **given)[0]
            heard = output.flatten(1)[:, :SOUND] + sound
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            sound = self.step_sound(other, heard, t, sound)
        images = self.image_processor.postprocess(self.vae.decode(latents, return_dict=False)[0], output_type=output_type)
        audio = sound.tanh()
        return DuetOutput(frames=images, audio=audio) if return_dict else (images, audio)

    def prepare_sound(self, samples, generator):
        drawn = generator if isinstance(generator, list) else [generator]
        return torch.stack([torch.randn(SOUND, generator=one) for one in drawn])

    def second_scheduler(self, steps):
        other = copy.deepcopy(self.scheduler)
        other.set_timesteps(steps)
        return other

    def step_sound(self, scheduler, output, t, sound):
        return scheduler.step(output, t, sound, return_dict=False)[0]


def duet(cls=Duet):
    return cls(**sd3().components)


def replay_of(pipeline, integrator=None, **settings):
    return PipelineReplay(pipeline, memoryless_scheduler(pipeline.scheduler, integrator), 4, **settings)


def prepared(cls=Duet):
    replay = replay_of(duet(cls))
    replay.find_state(COLUMNS, generators())
    return replay, *replay.prepare(COLUMNS, generators())


# ----------------------------------------------------------------------------------------------------------------- the chain


def test_the_state_is_both_one_after_the_other():
    replay, x, _ = prepared()
    drawn = generators()
    latents = replay.pipeline.prepare_latents(2, 4, 8, 8, torch.float32, "cpu", drawn)
    sound = replay.pipeline.prepare_sound(2, drawn)
    assert torch.equal(x, torch.cat([latents.flatten(1), sound], 1))


@pytest.mark.parametrize("integrator", ["ancestral", "posterior", "euler"])
def test_the_chain_is_that_of_two_memoryless_steps_with_one_noise_level(integrator):
    """The slow way: two schedulers, each of which steps its own latents."""
    pipeline = duet()
    replay = replay_of(pipeline, integrator)
    replay.find_state(COLUMNS, generators())
    x, conditioning = replay.prepare(COLUMNS, generators())
    schedulers = [memoryless_scheduler(pipeline.scheduler, integrator) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.set_timesteps(4)
    latents, sound = x[:, :-SOUND].reshape(2, 4, 4, 4).contiguous(), x[:, -SOUND:].contiguous()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        off = {"do_classifier_free_guidance": False, "max_sequence_length": 8}
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, **off)
        for k, t in enumerate(schedulers[0].timesteps):
            seen = latents + sound.mean(1).view(-1, 1, 1, 1)
            output = pipeline.transformer(seen, embeds, pooled, t.expand(2), return_dict=False)[0]
            steps = [
                scheduler.transition(m, part, k)
                for scheduler, m, part in zip(
                    schedulers, (output, output.flatten(1)[:, :SOUND] + sound), (latents, sound), strict=True
                )
            ]
            joint = replay.transition(replay.predict(x, k, conditioning), x, k)
            assert torch.equal(joint.mean, torch.cat([step.mean.flatten(1) for step in steps], 1))
            assert {joint.std} == {step.std for step in steps}
            drawn = torch.randn(x.shape, generator=noise)
            x = joint.sample(drawn)
            latents = steps[0].sample(drawn[:, :-SOUND].reshape(2, 4, 4, 4))
            sound = steps[1].sample(drawn[:, -SOUND:])
    assert torch.equal(x, torch.cat([latents.flatten(1), sound], 1))


def test_both_are_stepped_with_noise_of_their_own():
    """Copies of the scheduler that draw the same numbers would make picture and sound one."""
    replay = replay_of(duet())
    for sample in (lambda: own_steps(replay), lambda: replay.memoryless_sample(COLUMNS, generators())[1]):
        first = sample()[0]
        mean = replay.scheduler.transition(first.model_output, first.sample, 0)
        noise = (first.prev_sample - mean.mean) / mean.std
        assert noise.abs().max() < 6
        assert not torch.isclose(noise[:, :SOUND], noise[:, -SOUND:], atol=1e-3).any()


def own_steps(replay):
    """As a user does who sets a memoryless scheduler: it is copied by the pipeline, and not by us."""
    steps, pipeline = [], duet()
    scheduler = memoryless_scheduler(pipeline.scheduler)

    class Watched(type(scheduler)):
        def step(self, model_output, timestep, sample, return_dict=True):
            after = super().step(model_output, timestep, sample, return_dict=False)
            steps.append((model_output.flatten(1), sample.flatten(1), after[0].flatten(1)))
            return after

    scheduler.__class__ = Watched
    scheduler.set_generator(generators((7, 8)))
    pipeline.scheduler = scheduler
    pipeline(PROMPTS, generator=generators(), return_dict=False)
    replay.scheduler.set_timesteps(4)
    return [Step(*(torch.cat(parts, 1) for parts in zip(*steps[i : i + 2], strict=True))) for i in range(0, len(steps), 2)]


@dataclass
class Step:
    model_output: Tensor
    sample: Tensor
    prev_sample: Tensor


def test_the_derivative_crosses_from_each_to_the_other():
    replay, x, conditioning = prepared()
    leaf = x.requires_grad_()
    output = replay.predict(leaf, 1, conditioning)
    for mine, others in ((slice(-SOUND), slice(-SOUND, None)), (slice(-SOUND, None), slice(-SOUND))):
        slope = torch.autograd.grad(output[:, mine].sum(), leaf, retain_graph=True)[0]
        assert slope[:, others].abs().max() > 0


def test_the_check_passes_and_asks_for_few_predictions():
    pipeline, calls = duet(), []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    check_replay(replay_of(pipeline), COLUMNS, generators())
    assert len(calls) <= 32


def test_one_sample_alone_is_that_of_the_batch():
    replay, x, conditioning = prepared()
    y, alone = replay.prepare({"prompt": PROMPTS[1:]}, generators()[1:])
    assert torch.equal(y, x[1:])
    together, one = replay.predict(x, 2, conditioning), replay.predict(y, 2, alone)
    torch.testing.assert_close(one, together[1:], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- what is refused


class OtherNoise(Duet):
    def second_scheduler(self, steps):
        other = copy.deepcopy(self.scheduler)
        other.set_shift(9.0)
        other.set_timesteps(steps)
        return other


class StepsLate(Duet):
    """The sound is stepped with the timestep of the next step."""

    def step_sound(self, scheduler, output, t, sound):
        timesteps = scheduler.timesteps.tolist()
        later = timesteps[min(timesteps.index(float(t)) + 1, len(timesteps) - 1)]
        return scheduler.step(output, torch.tensor(later), sound, return_dict=False)[0]


class StepsOnce(Duet):
    def step_sound(self, scheduler, output, t, sound):
        return scheduler.step(output, t, sound, return_dict=False)[0] if t == scheduler.timesteps[0] else sound


class ScaledSound(Duet):
    """What is stepped is no prepared latent."""

    def second_scheduler(self, steps):
        self.factor = 2.0
        return super().second_scheduler(steps)

    def step_sound(self, scheduler, output, t, sound):
        factor, self.factor = self.factor, 1.0
        return scheduler.step(output, t, factor * sound, return_dict=False)[0]


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (OtherNoise, "they have different noise levels"),
        (StepsLate, "they are called at different timesteps"),
        (StepsOnce, "one is called more often than another"),
        (ScaledSound, "what one of them steps is not what a prepare_… method returns"),
    ],
)
def test_latents_that_make_no_one_chain_are_refused(cls, why):
    with pytest.raises(ValueError, match=f"^{cls.__name__} steps several latents .*, because {why}; use a pipeline with"):
        check_replay(replay_of(duet(cls)), COLUMNS, generators())


class SoundFollowsPicture(Duet):
    """The picture's next state decides how the sound is stepped."""

    def step_sound(self, scheduler, output, t, sound):
        return scheduler.step(output + self.moved, t, sound, return_dict=False)[0]

    def second_scheduler(self, steps):
        other = super().second_scheduler(steps)
        own, pipeline = self.scheduler.step, self

        def step(output, t, latents, return_dict=True):
            after = own(output, t, latents, return_dict=return_dict)
            pipeline.moved = after[0].mean()
            return after

        self.scheduler.step = step
        return other


def test_a_sound_that_is_predicted_from_the_pictures_next_state_is_refused():
    with pytest.raises(ValueError, match="SoundFollowsPicture .*hands another prediction to scheduler.step at step 0"):
        check_replay(replay_of(duet(SoundFollowsPicture)), COLUMNS, generators())


def test_the_state_has_to_be_found_first():
    with pytest.raises(ValueError, match="Duet steps several latents .*find_state, .* was not called"):
        replay_of(duet()).prepare(COLUMNS, generators())


class CopiesForNothing(Duet):
    def step_sound(self, scheduler, output, t, sound):
        return sound


def test_a_copy_that_steps_nothing_is_no_second_latent():
    replay, x, conditioning = prepared(CopiesForNothing)
    assert x.shape == (2, 4, 4, 4)
    with torch.no_grad():
        made, steps = replay.memoryless_sample(COLUMNS, generators())
        assert torch.equal(replay.predict(x, 0, conditioning), steps[0].model_output)
        assert torch.equal(replay.decode(steps[-1].prev_sample, conditioning), made.images)


class CopiesOfAnotherGrid(CopiesForNothing):
    """The copy that steps nothing gets its grid after the scheduler has its own."""

    def encode_prompt(self, *args, **kwargs):
        copy.deepcopy(self.scheduler).set_timesteps(7)
        return super().encode_prompt(*args, **kwargs)


def test_a_copys_grid_is_not_that_of_the_scheduler():
    replay, _, _ = prepared(CopiesOfAnotherGrid)
    assert len(replay.timesteps) == len(replay.stds) == 4


def test_each_latent_lies_in_memory_as_it_would_by_itself():
    """Kernels may round by it, and predictions would differ in the last bit from the pipeline's own."""
    parts = [torch.rand(2, 4, 3, 3), torch.rand(2, SOUND)]
    found = separated(joined(parts), [part.shape for part in parts])
    assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))
    assert all(one.stride() == other.stride() for one, other in zip(found, parts, strict=True))


# ----------------------------------------------------------------------------------------------------------- rewards that hear


def loudness(images, prompts, audio):
    assert audio.shape == (len(images), SOUND) and audio.dtype == torch.float32
    return audio.square().mean(1)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def both(images, prompts, audio):
    return brightness(images, prompts) + loudness(images, prompts, audio)


def latents():
    return torch.randn(2, 12 + SOUND, generator=torch.Generator().manual_seed(0))


def decoder(x):
    """Latents (B, 12 + 32) → images (B, 3, 2, 2) and sounds (B, 32)."""
    return x[:, :12].view(-1, 3, 2, 2).sigmoid(), x[:, 12:].tanh()


def gradient_of(reward, x):
    return reward_gradient(x, decoder, reward, PROMPTS, {})


@pytest.mark.parametrize("function", [loudness, brightness, both], ids=lambda f: f.__name__)
def test_the_gradient_of_a_reward_is_that_in_images_and_sound(function):
    x = latents()
    found = gradient_of(WeightedReward(function), x)
    leaf = x.clone().requires_grad_()
    images, audio = decoder(leaf)
    value = function(images, PROMPTS, **({} if function is brightness else {"audio": audio}))
    torch.testing.assert_close(found.rewards, value.detach())
    torch.testing.assert_close(found.gradient, torch.autograd.grad(value.sum(), leaf)[0])


def test_weights_of_several_rewards_hold_for_both():
    x = latents()
    seen, heard = (gradient_of(WeightedReward(function), x).gradient for function in (brightness, loudness))
    found = gradient_of(WeightedReward([brightness, loudness], [2.0, -3.0]), x)
    torch.testing.assert_close(found.gradient, 2 * seen - 3 * heard)
    found = gradient_of(WeightedReward([both, loudness], [2.0, -3.0]), x)
    torch.testing.assert_close(found.gradient, 2 * seen - heard)


def test_a_sound_without_a_value_has_no_gradient():
    def of_the_first(images, prompts, audio):
        return (audio.sum(1) * torch.tensor([1.0, -1.0]) * audio.sum(1).sign()).sqrt()

    x = latents()
    found = gradient_of(WeightedReward(of_the_first), x)
    assert found.rewards[0].isfinite() and found.rewards[1].isnan()
    assert found.gradient.isfinite().all() and found.gradient[0].any() and not found.gradient[1].any()


def test_an_infinite_sound_is_not_heard():
    heard = []

    def listening(images, prompts, audio):
        heard.append(audio)
        return audio.sum(1)

    audio = torch.tensor([[0.5] * SOUND, [torch.inf] * SOUND])
    values = WeightedReward(listening)(torch.rand(2, 3, 4, 4), PROMPTS, audio=audio)["listening"]
    assert heard[0].isfinite().all()
    assert values[0] == 0.5 * SOUND and values[1].isnan()


def test_a_reward_of_something_else_is_refused():
    def constant(images, prompts, audio):
        return torch.ones(2, requires_grad=True).exp()

    with pytest.raises(ValueError, match="reward 'constant' does not depend on the images"):
        gradient_of(WeightedReward(constant), latents())


def test_a_sound_that_is_decoded_without_gradient_is_refused():
    with pytest.raises(ValueError, match="the decoded sound has no gradient in the end points"):
        reward_gradient(latents(), lambda x: (decoder(x)[0], decoder(x)[1].detach()), WeightedReward(loudness), PROMPTS, {})


def test_rewards_around_others_hand_the_sound_on():
    x = latents()
    plain = gradient_of(WeightedReward(loudness), x)
    found = gradient_of(WeightedReward(smoothed(loudness, num_copies=2)), x)
    torch.testing.assert_close(found.gradient, plain.gradient)
    assert "audio" in WeightedReward(smoothed(loudness)).require_arguments({}, with_audio=True)
    videos, audio = torch.rand(2, 5, 3, 4, 4), torch.rand(2, SOUND)
    values = WeightedReward(per_frame(both, 3))(videos, PROMPTS, audio=audio)["both"]
    expected = videos[:, [0, 2, 4]].flatten(1).mean(1) + audio.square().mean(1)
    torch.testing.assert_close(values, expected)


def test_a_clipped_gradient_is_that_of_the_pixels_alone():
    x = latents()
    with pytest.raises(ValueError, match="gradient_clipped shortens the gradient in the pixels"):
        gradient_of(WeightedReward(gradient_clipped(both, 1.0)), x)
    found = gradient_of(WeightedReward(gradient_clipped(brightness, 1e9)), x)
    torch.testing.assert_close(found.gradient, gradient_of(WeightedReward(brightness), x).gradient)


def test_threads_get_their_part_of_the_sound():
    audio = torch.rand(4, SOUND)
    reward = WeightedReward(loudness, workers=2)
    values = reward(torch.rand(4, 3, 4, 4), ["a"] * 4, audio=audio)["loudness"]
    torch.testing.assert_close(values, audio.square().mean(1))


class Ear(nn.Module):
    """A linear layer stands beside a path that needs none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SOUND, SOUND)
        self.layer.weight.data.mul_(5)

    def forward(self, images, prompts, audio):
        return (audio + self.layer(audio).tanh()).sum(1)


class EarAndEye(Ear):
    def forward(self, images, prompts, audio=None):
        return super().forward(images, prompts, audio) + brightness(images, prompts)


AROUND = {
    "bare": lambda reward: reward,
    "smoothed": lambda reward: smoothed(reward, num_copies=2),
    "summed": lambda reward: weighted_sum([reward, brightness], [1.0, 1.0]),
}


@pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND.keys())
@pytest.mark.parametrize("cls", [Ear, EarAndEye])
@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_a_quantised_reward_that_hears_is_compared_in_the_sound(caplog, rounds_inputs, cls, wrap):
    ear = cls()
    quantise(ear, rounds_inputs)
    made = Media(torch.rand(2, 3, 8, 8).round(), torch.rand(2, SOUND) - 0.5)  # black and white: differences leave the range
    warn_of_quantised_rewards(WeightedReward(wrap(ear)), lambda: made, PROMPTS, {})
    told = [message for message in caplog.messages if "differs from finite differences" in message]
    assert len(told) == rounds_inputs


def test_a_quantised_reward_around_the_sound_trains(tmp_path):
    ear = Ear()
    quantise(ear, rounds_inputs=False)
    trainer = make_trainer(tmp_path, smoothed(ear, num_copies=2))
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


# --------------------------------------------------------------------------------------------------------------- in training


def make_trainer(folder, reward, pipeline=None, **changes):
    settings = {
        "output_dir": str(folder),
        "num_inference_steps": 4,
        "reward_scale": 1e3,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "probe_base": False,
    }
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k"])
    args = AdjointMatchingConfig(**settings | changes)
    return AdjointMatchingTrainer(pipeline or duet(), reward, args, PROMPTS, peft_config=lora)


WAYS = {
    "gradient": {},
    "value": {"loss_type": "ram", "num_generations": 2},
    "efficient": {"loss_type": "efficient_adjoint_matching"},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS.keys())
def test_the_gradient_of_a_reward_that_hears_reaches_the_network(tmp_path, settings):
    trainer = make_trainer(tmp_path, loudness, **settings)
    before = {name: p.detach().clone() for name, p in trainer.denoiser.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.denoiser.named_parameters())
    moved = [name for name, p in before.items() if not torch.equal(after[name], p)]
    assert any("lora_B" in name for name in moved)
    logged = trainer.state.log_history[0]
    assert logged["rewards/loudness/mean"] == pytest.approx(logged["reward"], rel=1e-6)


def test_evaluation_probe_and_samples_hear_too(tmp_path):
    trainer = make_trainer(tmp_path, [loudness, brightness], probe_base=True)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    names = {name for line in trainer.state.log_history for name in line}
    assert {"probe/rewards/loudness/own", "probe/rewards/loudness/memoryless"} <= names
    evaluated = trainer.evaluate()
    assert 0 < evaluated["eval_rewards/loudness/mean"] < 1


def test_a_reward_that_hears_wants_a_pipeline_with_sound(tmp_path):
    with pytest.raises(ValueError, match="reward 'loudness' asks for audio=, but the pipeline makes no sound .*take audio out"):
        make_trainer(tmp_path, loudness, sd3(), pipeline_kwargs={"max_sequence_length": 8}).train()


def test_a_reward_may_do_without_the_sound(tmp_path):
    def optional(images, prompts, audio=None):
        assert audio is None
        return brightness(images, prompts)

    make_trainer(tmp_path, optional, sd3(), pipeline_kwargs={"max_sequence_length": 8}).train()


def test_a_column_may_not_have_the_name_of_the_sound(tmp_path):
    trainer = make_trainer(tmp_path, loudness)
    trainer.train_dataset = trainer.train_dataset.add_column("audio", [1, 2])
    with pytest.raises(ValueError, match="column 'audio' has the name of the sound that the pipeline makes .*rename it"):
        trainer.train()


# -------------------------------------------------------------------------------------------------------- a video with its sound


@pytest.mark.slow
def test_a_network_that_its_pipeline_guides_in_many_ways_trains_unguided(tmp_path):
    """With the pipeline's own scales: perturbed attention and isolated modalities keep things from the first step of its loop."""
    kwargs = {name: value for name, value in LTX2.items() if "scale" not in name}
    heard, rows = [], []

    def loud(images, prompts, audio):
        heard.append((images.shape, audio.shape))
        return audio.square().flatten(1).mean(1)

    trainer = make_trainer(tmp_path, loud, ltx2(), pipeline_kwargs=kwargs)
    network = trainer.pipeline.transformer
    network.register_forward_pre_hook(lambda module, args, given: rows.append(len(given["hidden_states"])), with_kwargs=True)
    trainer.train()
    assert set(rows) == {2} and len(rows) > 30
    assert set(heard) == {((2, 9, 3, 32, 64), (2, 2, 132))}
    assert trainer.state.log_history[0]["grad_norm"] > 0
