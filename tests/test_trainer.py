"""The trainer on tiny pipelines of the real classes: what it evaluates, what it moves, and what must not depend on what."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from tiny_conditioned import picture, wan22_from_image
from tiny_images import flux
from tiny_pipelines import sample, sd3, sd15
from tiny_trainer import PROMPTS, brightness, config, difference, make_trainer, watch_chains, watch_targets, weights
from transformers import TrainerCallback, TrainingArguments

import diffusers_adjoint.trainer.adjoint_matching
import diffusers_adjoint.trainer.regress
import diffusers_adjoint.trainer.target_kl
from diffusers_adjoint import AdjointMatchingTrainer, LossSteps, Trajectory, choose_loss_steps, clip_loss, lean_adjoint
from diffusers_adjoint.core.matching import path_kl
from diffusers_adjoint.model.chain import PipelineChain
from diffusers_adjoint.model.randomness import Stream, seeded_generator, stacked_noise
from diffusers_adjoint.rewards import WeightedReward
from diffusers_adjoint.trainer.regress import regress
from diffusers_adjoint.trainer.updates import Updates


def weights_after_updates(trainer):
    """A list that grows by what is trained, whenever an update was made."""
    seen = []

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights(trainer))

    trainer.add_callback(Weights())
    return seen


@pytest.fixture(params=[sd3, sd15], ids=["sd3", "sd15"])
def build(request):
    return request.param


# ---------------------------------------------------------------------------------------------------------- what training does


def test_training_moves_the_adapter_and_nothing_else(tmp_path, build):
    pipeline = build()
    trainer = make_trainer(tmp_path, pipeline=pipeline)
    before = {name: p.detach().clone() for name, p in all_parameters(pipeline).items()}
    trainer.train()
    after = all_parameters(pipeline)
    adapters = {name for name in after if "lora_" in name}
    assert {name for name, p in after.items() if not torch.equal(p.detach(), before[name])} == adapters
    assert len(adapters) == len(weights(trainer)) > 0
    assert all(p.grad is None for name, p in after.items() if name not in adapters)


def all_parameters(pipeline):
    """Every parameter of every component, by component and name."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}


def test_base_is_the_untouched_network_bit_for_bit(tmp_path, build):
    trainer = make_trainer(tmp_path, build)
    start, conditioning = trainer.replay.prepare({"prompt": PROMPTS[:2]}, [torch.Generator().manual_seed(i) for i in (0, 1)])
    untouched = make_trainer(tmp_path, build, lora=False)
    _, same_conditioning = untouched.replay.prepare({"prompt": PROMPTS[:2]}, [torch.Generator().manual_seed(i) for i in (0, 1)])
    trainer.train()
    with torch.no_grad():
        tuned = trainer.denoiser(start, 1, conditioning)
        with trainer.denoiser.base():
            base = trainer.denoiser(start, 1, conditioning)
        reference = untouched.denoiser(start, 1, same_conditioning)
    assert torch.equal(base, reference)
    assert not torch.equal(tuned, base)


def test_zero_reward_scale_leaves_the_model_where_it_is(tmp_path, build):
    trainer = make_trainer(tmp_path, build, reward_scale=0.0)
    before = weights(trainer)
    trainer.train()
    assert difference(before, weights(trainer)) == 0.0  # the control starts at zero, so loss and gradient are exactly zero


def test_the_reward_rises(tmp_path):
    # λ·std(r) ≈ 2.7, so the target lies 2.7 standard deviations up
    trainer = make_trainer(tmp_path, lora=False, max_steps=16, rows=PROMPTS * 8, num_generations=2, reward_scale=1000.0)
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    # Same prompts, new noise: the gain must exceed what 4 × 4 images move by chance, measured as their standard deviation.
    spread = trainer.state.log_history[0]["reward_std"] / 4
    assert sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4 > 2 * spread


def test_full_fine_tuning_trains_against_a_frozen_copy(tmp_path, build):
    trainer = make_trainer(tmp_path, build, lora=False, learning_rate=1e-3)
    frozen = copy.deepcopy(trainer.denoiser.frozen.state_dict())
    before = weights(trainer)
    trainer.train()
    assert difference(before, weights(trainer)) > 0
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.denoiser.frozen.state_dict().items())


# ------------------------------------------------------------------------------------------------------------------ what it costs


class Counter:
    """Counts forwards of the denoiser: without gradient, with gradient in the input, with gradient in the weights."""

    def __init__(self, network):
        self.rollout = self.adjoint = self.loss = 0
        network.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, network, args, kwargs):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if not torch.is_grad_enabled():
            self.rollout += 1
        elif x.requires_grad:
            self.adjoint += 1
        else:
            self.loss += 1


@pytest.mark.parametrize("pairing", ["score", "next", "paper"])
def test_denoiser_evaluations_of_one_update(tmp_path, build, pairing, monkeypatch):
    steps = 6
    trainer = make_trainer(
        tmp_path, build, max_steps=1, num_inference_steps=steps, num_loss_steps=2, loss_kwargs={"pairing": pairing}
    )
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)  # the start-up check has its own evaluations
    counter = Counter(trainer.denoiser.network)
    chosen = {}
    original = trainer.choose_steps
    monkeypatch.setattr(trainer, "choose_steps", lambda chain, *_: chosen.setdefault("steps", original(chain)))
    trainer.train()
    earliest = chosen["steps"].indices[0]
    # Pure noise is paired with the next adjoint, whatever the pairing.
    of_next = pairing == "next" or (pairing == "score" and trainer.replay.times[earliest] < 0.02)
    base_with_graph = steps - 1 - earliest if of_next else steps - earliest
    base_forward = 1 if of_next else 0
    assert counter.rollout == (steps - 1) + base_forward
    assert counter.adjoint == base_with_graph
    assert counter.loss == 2


def test_with_only_the_last_step_chosen_the_base_is_evaluated_once(tmp_path, monkeypatch):
    """The one that gives the end point."""
    trainer = make_trainer(tmp_path, max_steps=1, num_inference_steps=5, num_loss_steps=1)
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)
    monkeypatch.setattr(trainer, "choose_steps", lambda chain, *_: LossSteps((4,), (0.2,)))
    counter = Counter(trainer.denoiser.network)
    trainer.train()
    assert (counter.rollout, counter.adjoint, counter.loss) == (4, 1, 1)


def test_text_is_encoded_once_a_rollout(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=3)
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)
    calls = []
    trainer.pipeline.text_encoder.register_forward_hook(lambda *a: calls.append(1))
    trainer.train()
    assert len(calls) == 3


# ------------------------------------------------------------------------------------------------------------------- invariances


def change(run, start):
    """Largest change of a weight, to measure differences against."""
    return max((run[name] - start[name]).abs().max().item() for name in run)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Relative to the largest change of a weight. The sums are the same, in another order: float32 keeps 1e-7 of each, and three
    # digits are for what the network makes of it; float64 the same further down.
    [(torch.float32, 1e-4), (torch.float64, 1e-10)],
)
def test_accumulation_and_batch_split_change_nothing(tmp_path, dtype, tolerance):
    def run(batch, accumulation, generations=1, rows=PROMPTS):
        trainer = make_trainer(
            tmp_path,
            pipeline=sd3().to(dtype),
            rows=rows * 2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            num_generations=generations,
            optim="sgd",  # Adam divides by the gradient's size and would turn rounding into steps
            learning_rate=1e-3,
            max_grad_norm=0.0,
        )
        trainer.denoiser.network.to(dtype)
        start = weights(trainer)
        trainer.train()
        return weights(trainer), start

    whole, start = run(4, 1)
    assert change(whole, start) > 0
    allowed = tolerance * change(whole, start)
    assert difference(whole, run(1, 4)[0]) <= allowed
    assert difference(whole, run(2, 2)[0]) <= allowed
    # Two images of each of two prompts, against the four prompts written out.
    pairs = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert difference(run(2, 1, generations=2, rows=PROMPTS[:2])[0], run(4, 1, rows=pairs)[0]) <= allowed


# transformers 5.23 renamed it, and keeps the old name with a warning.
CHECKPOINTING = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(TrainingArguments, name)]


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_gradient_checkpointing_changes_memory_not_weights(name, tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    checkpointed = make_trainer(tmp_path, **{name: True})
    checkpointed.train()
    assert checkpointed.denoiser.network.is_gradient_checkpointing
    assert difference(weights(plain), weights(checkpointed)) <= 1e-6  # recomputed activations, same numbers up to rounding


def test_a_sliced_or_tiled_decoder_trains(tmp_path):
    plain = make_trainer(tmp_path, optim="sgd", max_grad_norm=0.0)
    start = weights(plain)
    plain.train()
    sliced = make_trainer(tmp_path, optim="sgd", max_grad_norm=0.0)
    sliced.pipeline.vae.enable_slicing()
    sliced.train()
    # One image at a time through the decoder: the same float32 numbers from another loop order.
    assert difference(weights(plain), weights(sliced)) <= 1e-4 * difference(weights(plain), start)
    tiled = make_trainer(tmp_path, optim="sgd", max_grad_norm=0.0)
    tiled.pipeline.vae.enable_tiling()
    tiled.pipeline.vae.tile_sample_min_size, tiled.pipeline.vae.tile_latent_min_size = 8, 4
    tiled.train()
    assert (
        difference(weights(tiled), start) > 0
    )  # and the check at the start has compared images and derivative with the pipeline's
    assert difference(weights(plain), weights(tiled)) > 0  # tiles do not see each other


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_compiled_denoiser_gives_the_same_weights(tmp_path, lora):
    plain = make_trainer(tmp_path, lora=lora)
    start = weights(plain)
    plain.train()
    compiled = make_trainer(tmp_path, lora=lora, torch_compile=True, torch_compile_backend="eager")
    compiled.train()
    assert compiled.denoiser.network._compiled_call_impl is not None
    assert difference(weights(plain), weights(compiled)) == 0.0  # traced, and run by the same kernels
    assert difference(weights(plain), start) > 0
    compiled.save_model()
    assert torch.equal(sample(compiled.pipeline), sample(plain.pipeline))


# ------------------------------------------------------------------------------------------------------------- saving, precision


def test_saved_lora_gives_the_trained_output_in_a_fresh_pipeline(tmp_path, build):
    trainer = make_trainer(tmp_path, build)
    trainer.train()
    trainer.save_model()
    trained = sample(trainer.pipeline)
    fresh = build()
    base = sample(fresh)
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(sample(fresh), trained)  # alpha = 2 r: a lost alpha would scale the change and show here
    assert not torch.equal(base, trained)


def test_saved_full_weights_give_the_trained_output(tmp_path, build):
    trainer = make_trainer(tmp_path, build, lora=False, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    fresh = build()
    base = sample(fresh)
    component = trainer.replay.component
    network = type(getattr(fresh, component)).from_pretrained(tmp_path / component)
    fresh.register_modules(**{component: network})
    trained = sample(trainer.pipeline)
    assert torch.equal(sample(fresh), trained)
    assert not torch.equal(base, trained)


def test_the_pipeline_keeps_its_own_scheduler(tmp_path, build):
    pipeline = build()
    scheduler = pipeline.scheduler
    trainer = make_trainer(tmp_path, pipeline=pipeline)
    trainer.train()
    assert trainer.pipeline is pipeline
    assert pipeline.scheduler is scheduler


def test_bf16_network_keeps_fp32_states_and_adapters(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, pipeline=sd3().to(torch.bfloat16), max_steps=1)
    seen = {}
    watch_targets(trainer, lambda chain, targets: seen.update(states=targets.states.dtype, shifts=targets.shifts.dtype))
    trainer.train()
    assert seen == {"states": torch.float32, "shifts": torch.float32}
    assert {p.dtype for p in weights(trainer).values()} == {torch.float32}
    frozen = [p.dtype for p in trainer.denoiser.network.parameters() if not p.requires_grad]
    assert set(frozen) == {torch.bfloat16}


def test_bf16_base_is_the_untouched_network_and_its_lora_reloads(tmp_path):
    trainer = make_trainer(tmp_path, pipeline=sd3().to(torch.bfloat16), reward_scale=1000.0, max_steps=4)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    start, conditioning = trainer.replay.prepare({"prompt": PROMPTS[:2]}, generators)
    untouched = sd3().to(torch.bfloat16).transformer.eval()
    with torch.no_grad():
        reference = trainer.replay.predict(start, 1, conditioning, denoiser=untouched)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        with trainer.denoiser.base():
            assert torch.equal(trainer.replay.predict(start, 1, conditioning), reference)
        trained = trainer.replay.predict(start, 1, conditioning).float()
        fresh = sd3().to(torch.bfloat16)
        fresh.load_lora_weights(tmp_path)
        loaded = trainer.replay.predict(start, 1, conditioning, denoiser=fresh.transformer).float()
    # diffusers rounds the loaded adapter to bf16, three digits of the change; the base would be off by all of it.
    assert (loaded - trained).norm() <= 0.3 * (trained - reference.float()).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_a_16_bit_network(tmp_path, dtype):
    """The gradient of a mean over a large image is far below what float16 can tell from zero."""

    def tiny(images, prompts, **columns):
        return brightness(images, prompts) * 1e-7

    def adjoint(pipeline):
        trainer = make_trainer(tmp_path, pipeline=pipeline, reward=tiny, reward_scale=1.0)
        start, conditioning = trainer.replay.prepare({"prompt": PROMPTS[:2]}, [torch.Generator().manual_seed(i) for i in (0, 1)])
        start = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))  # older torch draws others in 16 bits
        noise = [torch.Generator().manual_seed(i) for i in (2, 3)]
        chain = PipelineChain(trainer.denoiser, trainer.guidance, start, conditioning, noise, {"prompt": PROMPTS[:2]})
        path = chain.rollout()
        with chain.base():
            end = chain.end_point(path, of="base")
            return lean_adjoint(chain.base_mean, path, -trainer.scorer(chain)(end.state).tilt, 1, end=end).adjoints[1:]

    exact, rounded = adjoint(sd3()), adjoint(sd3().to(dtype))
    error = (rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 0.1  # bfloat16 keeps two digits of each product, float16 three; rounded to nothing it would be 1


# ------------------------------------------------------------------------------------------------------------------------ logging


def ink(images, prompts, **columns):
    return 1 - images.mean((1, 2, 3))


def test_logged_metrics(tmp_path):
    trainer = make_trainer(tmp_path, reward=[brightness, ink], reward_weights=[2.0, 1.0])
    trainer.train()
    line = trainer.state.log_history[0]
    expected = {"reward", "reward_std_between", "kl", "loss", "adjoint_norm", "grad_norm", "evaluations_per_second", "skipped"}
    expected |= {f"rewards/{name}/{what}" for name in ("brightness", "ink") for what in ("mean", "std")}
    assert expected <= line.keys()
    assert line["reward"] == pytest.approx(2 * line["rewards/brightness/mean"] + line["rewards/ink/mean"], rel=1e-5)
    assert line["kl"] == 0.0  # before the first update the model is the base
    assert trainer.state.log_history[1]["kl"] > 0


def test_first_loss_is_the_norm_of_the_scaled_adjoint(tmp_path, monkeypatch):
    """At θ = base the control is zero, so the loss of "next" is Σ ½‖s_k ã_{k+1}‖², averaged over the batch (T10)."""
    trainer = make_trainer(
        tmp_path, max_steps=1, num_loss_steps=4, loss_kwargs={"pairing": "next"}
    )  # all steps: the targets have the whole path
    seen = {}

    def see(chain, targets):
        path = Trajectory(targets.states, trainer.replay.timesteps, trainer.replay.stds)
        with chain.base():
            end = chain.end_point(path, of="base")
            adjoints = lean_adjoint(chain.base_mean, path, -targets.scored.tilt, end=end).adjoints
        steps = targets.steps.indices
        terms = [0.5 * (path.stds[k] * adjoints[k + 1]).flatten(1).square().sum(1).mean() for k in steps]
        seen["expected"] = sum(terms).item()

    watch_targets(trainer, see)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(seen["expected"], rel=1e-4)  # the log rounds nothing but floats


def test_columns_reach_the_reward(tmp_path):
    seen = []

    def reward(images, prompts, target):
        seen.append((list(prompts), list(target)))
        return -(images.mean((1, 2, 3)) - images.new_tensor(target)).square()

    rows = {"prompt": PROMPTS, "target": [0.1, 0.2, 0.3, 0.4]}
    trainer = AdjointMatchingTrainer(
        sd3(), reward, config(tmp_path, num_generations=2), Dataset.from_dict(rows), peft_config=LoraConfig(r=2)
    )
    trainer.train()
    pairs = dict(zip(rows["prompt"], rows["target"], strict=True))
    prompts, targets = seen[-1]
    assert len(prompts) == 4 and prompts[0] == prompts[1]
    assert targets == [pairs[prompt] for prompt in prompts]


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_nonfinite_samples_are_left_out_and_counted(tmp_path, where):
    def spoilt(mean):
        return mean * torch.nan if where == "value" else (mean * 0).sqrt()  # value 0, derivative 0 · ∞

    def reward(images, prompts, **columns):
        means = images.mean((1, 2, 3))
        return torch.stack([spoilt(m) if prompt == "a dog" else m for m, prompt in zip(means, prompts, strict=True)])

    trainer = make_trainer(tmp_path, reward=reward, rows=PROMPTS[:2], max_steps=2)
    trainer.train()
    assert [line["skipped"] for line in trainer.state.log_history if "skipped" in line] == [1.0, 1.0]
    assert all(p.isfinite().all() for p in weights(trainer).values())
    stopping = make_trainer(tmp_path, reward=reward, rows=PROMPTS[:2], on_nonfinite="raise")
    with pytest.raises(ValueError, match="NaN or infinite"):
        stopping.train()


def test_none_is_no_reward(tmp_path):
    def reward(images, prompts, **columns):
        means = images.mean((1, 2, 3))
        return [None if prompt == "a dog" else mean for mean, prompt in zip(means, prompts, strict=True)]

    def nan_reward(images, prompts, **columns):
        return torch.stack([m * torch.nan if p == "a dog" else m for m, p in zip(images.mean((1, 2, 3)), prompts, strict=True)])

    trainer = make_trainer(tmp_path, reward=reward, rows=PROMPTS[:2])
    trainer.train()
    assert [line["skipped"] for line in trainer.state.log_history if "skipped" in line] == [1.0, 1.0]
    same = make_trainer(tmp_path, reward=nan_reward, rows=PROMPTS[:2])
    same.train()
    assert difference(weights(trainer), weights(same)) == 0.0


def test_an_update_without_a_finite_image_is_skipped(tmp_path):
    """Adam must not go on by its momentum, nor weight decay by itself."""

    def reward(images, prompts, **columns):
        mean = images.mean((1, 2, 3))
        return mean * torch.nan if trainer.state.global_step == 1 and trainer.is_in_train else mean

    trainer = make_trainer(tmp_path, reward=reward, max_steps=3, weight_decay=0.1, gradient_accumulation_steps=2)
    seen = weights_after_updates(trainer)
    trainer.train()
    assert difference(seen[0], seen[1]) == 0.0
    assert difference(seen[1], seen[2]) > 0
    assert [line["skipped"] for line in trainer.state.log_history if "skipped" in line] == [0.0, 4.0, 0.0]


def test_a_gradient_that_is_no_number_skips_the_update(tmp_path):
    """An image with such conditioning is masked, but the network's derivative at it is NaN, and so is NaN times zero."""
    trainer = make_trainer(tmp_path, max_steps=3)

    def one_entry(gradient):
        if trainer.state.global_step == 1:
            gradient = gradient.clone()
            gradient[0, 1] = torch.nan
        return gradient

    next(p for p in trainer.denoiser.network.parameters() if p.requires_grad).register_hook(one_entry)
    seen = weights_after_updates(trainer)
    trainer.train()
    assert difference(seen[0], seen[1]) == 0.0
    assert difference(seen[1], seen[2]) > 0 and all(p.isfinite().all() for p in seen[2].values())
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    updates = Updates(trainer.accelerator)
    assert not updates.can_step(model)  # no image trains
    updates.keep(torch.tensor([True, False]))
    assert updates.can_step(model)
    model.weight.grad[0, 1] = torch.nan
    assert not updates.can_step(model)


def test_a_flat_reward_is_told(tmp_path, caplog):
    make_trainer(tmp_path, reward=lambda images, prompts: (images * 255).round().mean((1, 2, 3)), max_steps=1).train()
    assert "exactly 0 on the first row, as after rounding" in caplog.text


def test_a_weight_of_zero_logs_only_and_names_are_told_apart(tmp_path):
    def broken(images, prompts):
        return images.mean((1, 2, 3)) * torch.nan

    functions = [brightness, broken]
    trainer = make_trainer(tmp_path, reward=functions, reward_weights=[1.0, 0.0], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["skipped"] == 0.0
    same = [lambda images, prompts, value=value: images.mean((1, 2, 3)) * value for value in (1.0, 10.0, 100.0)]
    for function, name in zip(same, ("r_2", "r", "r"), strict=True):
        function.__name__ = name
    reward = WeightedReward(same)
    values = reward(torch.ones(1, 3, 2, 2), [""])
    assert reward.total(values).item() == 111.0


def test_a_gradient_scaler_skips_an_update_by_itself(tmp_path):
    """Of an update without a reward: momentum does not move the weights, and the scaler finds the gradients it insists on."""

    def reward(images, prompts):
        return [None] * len(images) if trainer.state.global_step == 1 else brightness(images, prompts)

    trainer = make_trainer(tmp_path, reward=reward, max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    seen = weights_after_updates(trainer)
    trainer.train()
    assert difference(seen[0], seen[1]) == 0.0
    assert difference(seen[1], seen[2]) > 0


def test_logged_kl_is_the_path_kl_of_the_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, reward_scale=1000.0, num_loss_steps=4, learning_rate=0.05)  # all steps: no estimate
    expected, seen = [], []

    def see(chain, targets):
        path = Trajectory(targets.states, trainer.replay.timesteps, trainer.replay.posterior_stds)
        seen.append((chain, targets))
        expected.append(path_kl(chain.mean, chain.base_mean, path).mean().item())

    watch_targets(trainer, see)
    trainer.train()
    logged = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert expected[-1] > 0
    assert logged == pytest.approx(expected, rel=1e-5)  # float32 sums of the same terms

    # One step in four, each over its inclusion probability: the four estimates average to the whole.
    chain, targets = seen[-1]
    options = {"share": 1.0, "loss_clip": None, "require": lambda keep: keep, "backward": lambda loss: None}
    options |= {"synchronised": lambda last: nullcontext()}
    everything, estimates = targets.scored.usable, []
    for k in range(4):
        one = {name: getattr(targets, name)[k : k + 1] for name in ("states", "shifts", "base_means", "scales")}
        part = replace(targets, steps=LossSteps((k,), (0.25,)), **one)
        estimates.append(regress(chain.mean, part, everything, **options).kl)
    whole = regress(chain.mean, targets, everything, **options).kl
    torch.testing.assert_close(torch.stack(estimates).mean(0), whole, rtol=1e-4, atol=0)


def test_the_tilt_is_announced_once_from_all_images_of_the_first_update(tmp_path, monkeypatch):
    announced = []
    monkeypatch.setattr(
        diffusers_adjoint.trainer.target_kl, "announce_tilt", lambda scale, rewards: announced.append((scale, rewards))
    )
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_generations": 2}
    make_trainer(tmp_path, rows=PROMPTS * 2, **options).train()
    assert [(scale, rewards.shape) for scale, rewards in announced] == [(50.0, (4, 2))]


def test_a_streamed_dataset_trains(tmp_path):
    rows = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS))
    trainer = AdjointMatchingTrainer(sd3(), brightness, config(tmp_path), rows, peft_config=LoraConfig(r=2))
    assert trainer.train().global_step == 2


def test_options_reach_what_they_steer(tmp_path, monkeypatch):
    seen = {}

    def clip(loss, threshold):
        seen["loss_clip"] = threshold
        return clip_loss(loss, threshold)

    def choose(stds, count, selection, generator):
        seen.update(num_loss_steps=count, loss_step_selection=selection)
        return choose_loss_steps(stds, count, selection, generator)

    monkeypatch.setattr(diffusers_adjoint.trainer.regress, "clip_loss", clip)
    monkeypatch.setattr(diffusers_adjoint.trainer.adjoint_matching, "choose_loss_steps", choose)
    options = {"loss_clip": 7.0, "num_loss_steps": 3, "loss_step_selection": "paper"}
    trainer = make_trainer(tmp_path, integrator="euler", pipeline_kwargs={"height": 32, "width": 32}, **options)
    trainer.train()
    assert seen == options
    assert trainer.replay.scheduler.config.integrator == "euler"
    _, conditioning = trainer.replay.prepare({"prompt": ["a cat"]}, [torch.Generator()])
    assert conditioning.start.shape[-2:] == (16, 16)  # 32 pixels at a VAE factor of 2


def test_a_pipeline_is_loaded_from_a_folder_with_its_arguments(tmp_path):
    sd3().save_pretrained(tmp_path / "pipeline")
    args = config(tmp_path, model_init_kwargs={"dtype": torch.float64})
    trainer = AdjointMatchingTrainer(str(tmp_path / "pipeline"), brightness, args, peft_config=LoraConfig(r=2))
    assert trainer.pipeline.vae.dtype == torch.float64


def test_random_numbers_belong_to_seed_update_sample_and_stream():
    def draw(*key):
        return torch.randn(4, generator=seeded_generator(*key))

    key = (1, 2, 3, Stream.START)
    assert torch.equal(draw(*key), draw(*key))
    others = [(0, 2, 3, Stream.START), (1, 0, 3, Stream.START), (1, 2, 0, Stream.START), (1, 2, 3, Stream.STEP_NOISE)]
    assert not any(torch.equal(draw(*key), draw(*other)) for other in others)


def test_updates_start_from_different_noise(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, rows=PROMPTS[:1] * 2, per_device_train_batch_size=1)
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)
    starts, noises = [], []

    def see(chain):
        starts.append(chain.start)
        noises.append(stacked_noise(chain.start, [generator.clone_state() for generator in chain.noise]))

    watch_chains(trainer, see)
    trainer.train()
    drawn = starts + noises  # x_0 and first step noise of two updates of one prompt
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("where", ["adjoint", "state"])
def test_an_adjoint_or_path_that_overflows_is_left_out(tmp_path, monkeypatch, where):
    """The reward is fine, but the sweep through the base blows up for one image of two."""
    expected = []

    def overflowing(trainer):
        def spoil(chain, targets):
            targets.shifts[:, 0] = torch.inf
            other = [0.5 * (shift[1] / scale).square().sum() for shift, scale in zip(targets.shifts, targets.scales, strict=True)]
            expected.append(sum(other).item() / 2)  # at θ = base, the mean over two images of which one counts nothing
            if where == "state":
                targets.states[:, 0] = torch.nan
                targets.base_means[:, 0] = torch.nan

        watch_targets(trainer, spoil)
        return trainer

    last_excluded = {"num_loss_steps": 3, "max_steps": 1}  # the last step's own adjoint is the reward's, and finite
    trainer = overflowing(make_trainer(tmp_path, **last_excluded))
    before = weights(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["skipped"] == 1.0
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected[0], rel=1e-4)
    assert all(p.isfinite().all() for p in weights(trainer).values())
    assert difference(before, weights(trainer)) > 0  # the other image trained
    with pytest.raises(ValueError, match="adjoints are NaN or infinite"):
        overflowing(make_trainer(tmp_path, on_nonfinite="raise", **last_excluded)).train()


# ----------------------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("mode", "rollout_rows", "loss_rows"), [("rollout", 2, 1), ("none", 1, 1), ("full", 2, 2)], ids=lambda v: str(v)
)
def test_guidance_acts_where_cfg_mode_says(tmp_path, build, mode, rollout_rows, loss_rows, monkeypatch):
    trainer = make_trainer(tmp_path, build, max_steps=1, guidance_scale=4.0, cfg_mode=mode)
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)
    rows = {True: set(), False: set()}

    def count(network, args, kwargs):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rows[torch.is_grad_enabled()].add(len(x) // 2)

    trainer.denoiser.network.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert rows[True] == {loss_rows}
    assert rollout_rows in rows[False] and rows[False] <= {rollout_rows, loss_rows}


@pytest.mark.parametrize(
    ("guidance_scale", "mode", "name"),
    [(4.0, "rollout", "kl_unguided"), (4.0, "none", "kl"), (4.0, "full", "kl"), (1.0, "rollout", "kl")],
)
def test_the_kl_of_another_model_than_the_sampled_one_has_another_name(tmp_path, guidance_scale, mode, name):
    trainer = make_trainer(tmp_path, max_steps=1, guidance_scale=guidance_scale, cfg_mode=mode)
    trainer.train()
    assert {"kl", "kl_unguided"} & trainer.state.log_history[0].keys() == {name}


# ----------------------------------------------------------------------------------------------------- columns, text encoders


def test_columns_reach_the_pipeline_and_the_rewards(tmp_path):
    seen = []

    def reward(images, prompts, negative_prompt):
        seen.append((prompts, negative_prompt))
        return brightness(images, prompts)

    def train(folder, negative):
        rows = Dataset.from_dict(
            {"prompt": PROMPTS, "negative_prompt": [f"{negative} {i}" for i in range(4)], "id": [1, 2, 3, 4]}
        )
        trainer = AdjointMatchingTrainer(
            sd3(), reward, config(folder, guidance_scale=4.0, cfg_mode="full"), rows, rows, peft_config=LoraConfig(r=2)
        )
        trainer.train()
        return weights(trainer), trainer.evaluate()["eval_reward"]

    dull, dull_evaluation = train(tmp_path / "a", "dull")
    for prompts, negatives in seen[1:]:
        assert [PROMPTS.index(prompt) for prompt in prompts] == [int(negative[-1]) for negative in negatives]
    dark, dark_evaluation = train(tmp_path / "b", "dark")
    assert difference(dull, dark) > 1e-6
    assert dull_evaluation != dark_evaluation


def test_text_encoders_are_on_the_device_while_they_encode(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=2, offload_text_encoders=True, probe_base=True)
    plain = make_trainer(tmp_path, max_steps=2)
    trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS[:1]})
    away = {}

    def watch(name, encoder, move):
        def to(device):
            away[name] = str(device) == "cpu"
            return move(device)

        monkeypatch.setattr(encoder, "to", to)

    events = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(trainer.pipeline, name)
        watch(name, encoder, encoder.to)
        encoder.register_forward_hook(lambda *_, name=name: events.append(("encode", away[name])))
    trainer.denoiser.network.register_forward_hook(lambda *_: events.append(("denoise", all(away.values()))))
    # Two names of the CPU, the device and where the encoders wait.
    monkeypatch.setattr(trainer.args, "_setup_devices", torch.device("cpu", 0), raising=False)
    trainer.train()
    plain.train()
    trainer.evaluate()
    assert difference(weights(trainer), weights(plain)) == 0.0
    assert set(events) == {("encode", False), ("denoise", True)}
    assert all(away.values())


def test_a_pipeline_that_takes_one_image_trains_one_sample_at_a_time(tmp_path):
    """The check at the start must not use more samples than training does."""

    def middle(images, prompts, image):
        assert images.shape[:3] == (1, 5, 3)  # a video
        return images.mean((1, 2, 3, 4))

    rows = [{"prompt": prompt, "image": picture(number)} for number, prompt in enumerate(PROMPTS)]
    args = config(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_loss_steps=1,
        pipeline_kwargs={"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16},
        per_device_eval_batch_size=1,
    )
    trainer = AdjointMatchingTrainer(wan22_from_image(), middle, args, rows, rows[:2], peft_config=LoraConfig(r=2))
    before = weights(trainer)
    trainer.train()
    assert difference(weights(trainer), before) > 0
    assert 0 < trainer.evaluate()["eval_reward"] < 1


def test_a_distilled_guidance_of_one_is_told(tmp_path, caplog):
    make_trainer(tmp_path, pipeline=flux(), pipeline_kwargs={"max_sequence_length": 8})
    assert "takes the guidance scale as an input of its network" in caplog.text
