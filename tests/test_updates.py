"""What an update is made of and when it is none: an image that is no number costs itself, and a run that gets nowhere ends."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from processes import TORCHRUN, run_worker
from safetensors.torch import load_file
from tiny_trainer import PROMPTS, brightness, difference, every_step, logged, make_trainer, watch_targets, weights
from transformers import TrainerCallback

from diffusers_adjoint.core.matching import bounded
from diffusers_adjoint.model.chain import PipelineChain
from diffusers_adjoint.trainer.updates import UpdateCount

WAYS = ["adjoint_matching", "basic_adjoint_matching", "discrete_adjoint"]


class Scaled(torch.autograd.Function):
    """The mean of each image, whose gradient in the first one is `factor` times what it is."""

    @staticmethod
    def forward(ctx, images, factor):
        ctx.shape, ctx.factor = images.shape, factor
        return images.mean((1, 2, 3))

    @staticmethod
    def backward(ctx, gradient):
        rows = gradient.view(-1, 1, 1, 1).expand(ctx.shape) / ctx.shape[1:].numel()
        return torch.cat([rows[:1] * ctx.factor, rows[1:]]), None


def first_image(factor):
    return lambda images, prompts: Scaled.apply(images, factor)


def settings(way, **changes):
    # Plain steps, so that the weights are the sum of the gradients.
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    return {**every_step(way, 4), **plain, **changes}


@dataclass
class Alone:
    """One update in which the first image has nothing to teach: no reward gradient, and no control at the start."""

    way: str
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]

    def assert_trained(self, trainer):
        """The second image has trained `trainer`; the first one is left out and counted."""
        trainer.train()
        assert logged(trainer, "skipped") == [1.0]
        moved = difference(self.weights, self.start)
        # The same float32 terms and zeros beside them; 1e-7 of each, and three digits for what the network makes of it.
        assert moved > 0
        assert difference(weights(trainer), self.weights) <= 1e-4 * moved


@pytest.fixture(scope="module", params=WAYS)
def alone(request, tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("alone"), reward=first_image(0.0), **settings(request.param))
    start = weights(trainer)
    trainer.train()
    assert logged(trainer, "skipped") == [0.0]
    return Alone(request.param, start, weights(trainer))


@pytest.mark.parametrize("factor", [1e24, pytest.param(1e19, marks=pytest.mark.slow)])
def test_an_image_with_a_huge_gradient_costs_itself_alone(tmp_path, alone, factor):
    """The square of the adjoint overflows, or the square of that."""
    trainer = make_trainer(tmp_path, reward=first_image(factor), **settings(alone.way))
    alone.assert_trained(trainer)
    assert all(torch.isfinite(torch.tensor(logged(trainer, name))).all() for name in ("loss", "adjoint_norm", "kl", "grad_norm"))


@pytest.mark.parametrize("alone", ["adjoint_matching", "discrete_adjoint"], indirect=True)
def test_an_image_with_a_huge_gradient_stops_training_if_asked_so(tmp_path, alone):
    trainer = make_trainer(tmp_path, reward=first_image(1e24), **settings(alone.way, on_nonfinite="raise"))
    with pytest.raises(ValueError, match="1 rewards, reward gradients, losses or adjoints are .*fix the reward function"):
        trainer.train()


@pytest.mark.parametrize("alone", ["adjoint_matching", "discrete_adjoint"], indirect=True)
def test_an_image_whose_control_overflows_costs_itself_alone(tmp_path, alone, monkeypatch):
    """The model's mean of one step is huge, and so is the loss, of one image."""
    trainer = make_trainer(tmp_path, reward=first_image(0.0), **settings(alone.way))
    denoiser, forward = trainer.denoiser, trainer.denoiser.forward

    def huge(x, index, *rest):
        mean = forward(x, index, *rest)
        if index == 1 and trainer.is_in_train and not denoiser.base_active and mean.requires_grad:
            mean = mean + torch.tensor([1e25, 0.0]).view(-1, *[1] * (mean.ndim - 1))
        return mean

    monkeypatch.setattr(denoiser, "forward", huge)
    alone.assert_trained(trainer)


@pytest.mark.parametrize("alone", ["adjoint_matching", "discrete_adjoint"], indirect=True)
def test_an_image_whose_states_are_no_numbers_costs_itself_alone(tmp_path, alone, monkeypatch):
    trainer = make_trainer(tmp_path, **settings(alone.way))
    rollout = PipelineChain.rollout

    def spoilt(chain):
        path = rollout(chain)
        path.states[2:, 0] = torch.nan
        return path

    monkeypatch.setattr(PipelineChain, "rollout", spoilt)
    alone.assert_trained(trainer)


@pytest.mark.parametrize("alone", ["adjoint_matching"], indirect=True)
def test_an_image_whose_base_is_no_number_where_the_adjoint_ends_costs_itself_alone(tmp_path, alone):
    """The earliest step needs the base's mean, but no adjoint from there."""
    trainer = make_trainer(tmp_path, reward=first_image(0.0), **settings("adjoint_matching"))

    def spoil(chain, targets):
        targets.base_means[0, 0] = torch.inf

    watch_targets(trainer, spoil)
    alone.assert_trained(trainer)


def test_the_limit_is_where_a_square_overflows():
    for dtype in (torch.float32, torch.float64):
        limit = torch.tensor(torch.finfo(dtype).max, dtype=dtype).sqrt()
        values = torch.stack([limit * 0.99, -limit * 0.99, limit * 1.01, limit * 0, limit * torch.inf, limit * torch.nan])
        assert bounded(values).tolist() == values.square().isfinite().tolist() == [True, True, False, True, False, False]


# ------------------------------------------------------------------------------------------------------------- dropped updates


def at_update(trainer, number, change):
    """Applies `change` to the gradient of one weight in the updates that `number` picks."""
    parameter = next(p for p in trainer.denoiser.network.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * change if number(trainer.state.global_step) else gradient)


def test_all_images_of_a_dropped_update_are_counted(tmp_path):
    trainer = make_trainer(tmp_path, reward=first_image(1e24), max_steps=3, gradient_accumulation_steps=2)
    at_update(trainer, lambda update: update == 1, torch.nan)
    trainer.train()
    assert logged(trainer, "skipped") == [2.0, 4.0, 2.0]  # the first of two in each of two micro-batches, and once all of them


# A fused one skips its step itself.
@pytest.mark.parametrize("optim", ["adamw_torch_fused", pytest.param("adamw_torch", marks=pytest.mark.slow)])
def test_images_of_an_update_that_the_gradient_scaler_drops_are_counted(tmp_path, optim):
    trainer = make_trainer(tmp_path, max_steps=3, max_grad_norm=0.0, optim=optim)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    at_update(trainer, lambda update: update == 1, torch.inf)
    trainer.train()
    assert logged(trainer, "skipped") == [0.0, 2.0, 0.0]
    assert trainer.accelerator.scaler.get_scale() == 2.0**15  # halved once
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_a_run_of_dropped_updates_ends_with_an_error(tmp_path):
    """20 in a row, counted anew after one that was made."""

    def reward(images, prompts):
        return brightness(images, prompts) * (1.0 if trainer.state.global_step == 15 or not trainer.is_in_train else torch.nan)

    trainer = make_trainer(tmp_path, reward=reward, max_steps=100, num_inference_steps=2, num_loss_steps=1)
    with pytest.raises(ValueError, match="20 updates in a row were dropped: .*fix the reward function.*"):
        trainer.train()
    assert trainer.state.global_step == 15 + 20  # made: number 16; the one under way is not counted by the host yet


def test_a_run_whose_updates_were_all_dropped_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, reward=lambda images, prompts: [None] * len(images), max_steps=3)
    start = weights(trainer)
    with pytest.raises(ValueError, match="no update was made, because all 3 were dropped: .*fix the reward function"):
        trainer.train()
    assert difference(start, weights(trainer)) == 0.0
    assert logged(trainer, "skipped") == [2.0, 2.0, 2.0]


# ------------------------------------------------------------------------------------------------------------- infinite weights


class Faster(TrainerCallback):
    """An infinite learning rate from one update on."""

    def __init__(self, update):
        self.update = update

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if state.global_step == self.update - 1:
            for group in optimizer.param_groups:
                group["lr"] = float("inf")


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_infinite_weights_end_training_before_they_replace_good_ones(tmp_path, lora):
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "num_inference_steps": 3, "num_loss_steps": 1}
    trainer = make_trainer(tmp_path, lora=lora, max_steps=6, **saves)
    trainer.save_model()
    saved = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    written = [(tmp_path / path).read_bytes() for path in saved]
    trainer.add_callback(Faster(4))
    with pytest.raises(ValueError, match="weights are NaN or infinite after update 4 and are not saved; lower learning_rate"):
        trainer.train()
    assert not all(value.isfinite().all() for value in weights(trainer).values())
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    files = [file for name in kept for file in (tmp_path / name).rglob("*.safetensors")]
    assert files and all(value.isfinite().all() for file in files for value in load_file(file).values())
    with pytest.raises(ValueError, match="not saved"):
        trainer.save_model()
    assert written and written == [(tmp_path / path).read_bytes() for path in saved]
    resumed = make_trainer(tmp_path, lora=lora, max_steps=4, **saves)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4


# ------------------------------------------------------------------------------------------------------------------- no update


def stream(rows):
    return IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in rows))


def test_a_stream_that_ends_before_a_whole_update_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, rows=stream(PROMPTS), gradient_accumulation_steps=3, num_generations=2)
    with pytest.raises(
        ValueError, match="because the train_dataset has too few rows for the 12 images of one; add rows, or lower"
    ):
        trainer.train()


def test_a_run_that_was_finished_before_is_no_error():
    count, finished = UpdateCount(), SimpleNamespace(global_step=3, max_steps=3)
    count.require_one(finished, images=2)
    count.add(dropped=True)
    with pytest.raises(ValueError, match="all 1 were dropped"):
        count.require_one(finished, images=2)
    count.add(dropped=False)
    count.require_one(finished, images=2)


@pytest.mark.slow
def test_two_processes_end_together_with_the_same_error(tmp_path):
    run_worker(TORCHRUN, "updates_worker.py", str(tmp_path))
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    starts = {
        "a stream that ends": "no update was made, because the train_dataset has too few rows for the 12 images",
        "no reward": "no update was made, because all 2 were dropped",
        "infinite": "weights are NaN or infinite after update 1",
        "unread": "4 of 12 trained tensors",
        "fused": "no gradient reaches any to_q, to_k or to_v",
    }
    assert said.keys() == starts.keys()
    for case, (first, second) in said.items():
        assert first.startswith(starts[case]), first
        assert second == ("" if case == "unread" else first)
