"""The paper's objectives on a real pipeline, and what the trainer says of leftover memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import sd3
from tiny_trainer import PROMPTS, config, difference, every_step, make_trainer, watch_targets, weights

import diffusers_adjoint.trainer.reward_trainer
from diffusers_adjoint import objectives
from diffusers_adjoint.objectives import OBJECTIVES, Targets, papers, targets
from diffusers_adjoint.objectives.papers import ADJOINT_MATCHING, Paper
from diffusers_adjoint.soc import correlation
from diffusers_adjoint.trainer.sample_log import announce_memory

K = 4
DIGITS = Path(__file__).parents[1] / "examples/digits/pipeline"
SAME_GRADIENT = ["basic_adjoint_matching", "discrete_adjoint"]


def one_update(folder, way: str, lora: bool, **changes):
    """Weights before and after one plain gradient step of a model that differs from its base, in float64."""
    settings = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 1} | every_step(way, K) | changes
    trainer = make_trainer(folder, pipeline=sd3().to(torch.float64), lora=lora, **settings)
    trainer.check_first_row = lambda: None  # seconds, and the same every time
    generator = torch.Generator().manual_seed(7)
    for parameter in trainer.denoiser.network.parameters():
        if parameter.requires_grad:
            parameter.data += (0.3 if lora else 0.05) * torch.randn(parameter.shape, generator=generator).to(parameter)
    start = weights(trainer)
    trainer.train()
    return start, weights(trainer), trainer.state.log_history[0]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_ways_make_the_same_update_and_the_lean_adjoint_another(tmp_path, lora):
    """Prop. 2 through pipeline, scheduler, adapter and optimizer."""
    runs = {way: one_update(tmp_path / way, way, lora) for way in ["adjoint_matching", *SAME_GRADIENT]}
    start, reference, log = runs["basic_adjoint_matching"]
    moved = difference(reference, start)
    assert moved > 0 and log["kl"] > 0
    for loss_type in SAME_GRADIENT:
        assert all(torch.equal(runs[loss_type][0][name], start[name]) for name in start)
        # States, adjoints and adapter are float32 whatever the network is: 1e-7 of each value, over four steps.
        assert difference(runs[loss_type][1], reference) < 1e-4 * moved
        assert runs[loss_type][2]["kl"] == pytest.approx(log["kl"], rel=1e-4)
        assert runs[loss_type][2]["adjoint_norm"] > 0
    assert difference(runs["adjoint_matching"][1], reference) > 0.02 * moved


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("loss_type", ["basic_adjoint_matching", "discrete_adjoint", "efficient_adjoint_matching", "one_step"])
def test_splitting_the_batch_changes_nothing(tmp_path, loss_type, lora):
    # The last step starts with less noise than it asks the base's score at, and carries no loss.
    options = {"num_loss_steps": K - 1} if loss_type == "efficient_adjoint_matching" else {}
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = one_update(tmp_path / "whole", loss_type, lora, per_device_train_batch_size=4, **options)
    split = one_update(tmp_path / "split", loss_type, lora, **halves, **options)
    moved = difference(whole[1], whole[0])
    assert 0 < difference(whole[1], split[1]) + 1e-12 < 1e-4 * moved


class Counter:
    """Forward passes of the network by kind: (adapter on or off, without a graph or with one)."""

    def __init__(self, trainer):
        self.seen: dict[tuple[str, str], int] = {}
        self.denoiser = trainer.denoiser
        trainer.denoiser.network.register_forward_pre_hook(self.count)

    def count(self, *_):
        kind = ("base" if self.denoiser.base_active else "model", "graph" if torch.is_grad_enabled() else "forward")
        self.seen[kind] = self.seen.get(kind, 0) + 1


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # Rollout K − 1, adjoint K − 1 with a graph and one without, all K steps in the loss.
        (
            "adjoint_matching",
            {("model", "forward"): K - 1, ("base", "graph"): K - 1, ("base", "forward"): 1, ("model", "graph"): K},
        ),
        (
            "basic_adjoint_matching",
            {("model", "forward"): K - 1, ("base", "graph"): K - 1, ("base", "forward"): 1, ("model", "graph"): 2 * K - 1},
        ),
        # Each step once more, for weights and states together.
        ("discrete_adjoint", {("model", "forward"): K - 1, ("base", "graph"): K, ("model", "graph"): K}),
    ],
)
def test_evaluations_of_one_update(tmp_path, monkeypatch, loss_type, expected):
    trainer = make_trainer(tmp_path, max_steps=1, **every_step(loss_type, K))
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)  # the start-up check has its own evaluations
    counter = Counter(trainer)
    trainer.train()
    assert counter.seen == expected


def no_reward_for_the_first(images, prompts, **columns):
    values = images.mean((1, 2, 3))
    return [None if prompt == PROMPTS[0] else value for prompt, value in zip(prompts, values, strict=True)]


def test_an_image_without_reward_teaches_nothing(tmp_path):
    """Not even the cost of its control: back-propagation leaves out what the adjoint's loss leaves out."""
    options = {"reward": no_reward_for_the_first, "train_sampling_strategy": "sequential", "rows": PROMPTS[:2]}
    start, reference, log = one_update(tmp_path / "basic", "basic_adjoint_matching", True, **options)
    _, after, discrete_log = one_update(tmp_path / "discrete", "discrete_adjoint", True, **options)
    assert log["skipped"] == discrete_log["skipped"] == 1
    moved = difference(reference, start)
    assert moved > 0 and difference(after, reference) < 1e-4 * moved
    with pytest.raises(ValueError, match="pass on_nonfinite='skip'"):
        one_update(tmp_path / "raise", "discrete_adjoint", True, on_nonfinite="raise", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss_type": "reinforce"},
            "loss_type='reinforce' is unknown; pass one of 'adjoint_matching', 'basic_adjoint_matching'",
        ),
        (
            {"loss_kwargs": {"paring": "next"}},
            "loss_kwargs has 'paring', which loss_type='adjoint_matching' does not take; pass 'pairing'",
        ),
        ({"loss_kwargs": {"pairing": "previous"}}, "pairing='previous' is unknown; pass 'score', 'next' or 'paper'"),
        ({"adjoint_pairing": "paper"}, r"adjoint_pairing has moved; pass loss_kwargs=\{'pairing': 'paper'\} instead"),
        ({"loss_type": "continuous_adjoint"}, "loss_type='continuous_adjoint' has moved; .*'basic_adjoint_matching'"),
        ({"loss_type": "discrete_adjoint"}, r"train with RewardBackpropagationTrainer\(method='discrete_adjoint'\)"),
    ],
)
def test_what_no_objective_has_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "reinforce"}, "method='reinforce' is unknown; pass one of 'discrete_adjoint'"),
        ({"num_loss_steps": 2}, "num_loss_steps=2 has no meaning for method='discrete_adjoint'"),
        ({"loss_clip": 1.0}, "loss_clip=1.0 has no meaning"),
        ({"target_kl": 1.0, "reward_scale": None}, "target_kl=1 is for AdjointMatchingTrainer; pass reward_scale"),
        ({"loss_type": "basic_adjoint_matching"}, "loss_type='basic_adjoint_matching' has no meaning"),
        ({"loss_kwargs": {"pairing": "paper"}}, "loss_kwargs={'pairing': 'paper'} has no meaning"),
        ({"loss_step_selection": "paper"}, "loss_step_selection='paper' has no meaning"),
        ({"num_iterations": 2}, "num_iterations=2 has no meaning"),
    ],
)
def test_what_back_propagation_does_not_have_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{"method": "discrete_adjoint"} | changes)


@pytest.mark.parametrize("loss_type", SAME_GRADIENT)
def test_layers_checkpointed_across_a_switch_of_the_adapter_are_refused(tmp_path, loss_type):
    with pytest.raises(ValueError, match="switches the adapter within a step.*pass gradient_checkpointing=False"):
        make_trainer(tmp_path, gradient_checkpointing=True, **every_step(loss_type, K))
    make_trainer(
        tmp_path, gradient_checkpointing=True, lora=False, **every_step(loss_type, K)
    )  # two networks: nothing is switched


def test_checkpointing_that_the_user_has_switched_on_is_seen(tmp_path):
    pipeline = sd3()
    pipeline.transformer.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="switches the adapter within a step"):
        make_trainer(tmp_path, pipeline=pipeline, loss_type="basic_adjoint_matching")


def test_the_gradient_scaler_does_not_go_with_back_propagation(tmp_path):
    with pytest.raises(ValueError, match="method='discrete_adjoint' does not work with fp16=True"):
        make_trainer(tmp_path, fp16=True, **every_step("discrete_adjoint", K))


@pytest.mark.parametrize("loss_type", ["efficient_adjoint_matching", "one_step"])
def test_images_without_a_finite_reward_are_left_out_or_stop_the_run(tmp_path, loss_type):
    options = {"reward": not_a_number_for_the_first, "train_sampling_strategy": "sequential", "rows": PROMPTS[:2]}
    start, after, log = one_update(tmp_path / "skip", loss_type, True, **options, num_loss_steps=2)
    assert log["skipped"] == 1 and difference(start, after) > 0 and all(value.isfinite().all() for value in after.values())
    with pytest.raises(ValueError, match="pass on_nonfinite='skip'"):
        one_update(tmp_path / "raise", loss_type, True, on_nonfinite="raise", **options, num_loss_steps=2)


def not_a_number_for_the_first(images, prompts, **columns):
    values = images.mean((1, 2, 3))
    return torch.stack([math.nan * v if prompt == PROMPTS[0] else v for prompt, v in zip(prompts, values, strict=True)])


@pytest.mark.parametrize("loss_type", ["basic_adjoint_matching", "efficient_adjoint_matching", "one_step", "ram"])
def test_a_card_cites_the_paper_of_its_objective(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, max_steps=1, loss_type=loss_type, num_generations=2)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    paper = OBJECTIVES[loss_type]().paper
    assert f"https://arxiv.org/abs/{paper.arxiv}" in text and paper.bibtex in text
    assert f"| `loss_type` | {loss_type} |" in text
    assert ("The method is biased" in text) != OBJECTIVES[loss_type]().tilts


def test_the_card_of_back_propagation_says_so(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, **every_step("discrete_adjoint", K))
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "made with [the discrete adjoint](https://arxiv.org/abs/2409.08861)" in text
    assert "| `method` | discrete_adjoint |" in text and "`reward_scale`" in text
    assert "`loss_type`" not in text and "`loss_step_selection`" not in text


@dataclass(frozen=True)
class ByNumbers:
    """A toy of an objective that asks only for the value of a reward: every step is pushed by it."""

    strength: float = 1.0

    needs_gradient: ClassVar[bool] = False
    switches_adapter: ClassVar[bool] = False
    scores_end_points: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    tilts: ClassVar[bool] = False
    paper: ClassVar[Paper] = ADJOINT_MATCHING

    def integrator(self, predicts_scores):
        return "posterior"

    def scales(self, chain):
        return chain.stds

    def targets(self, chain, steps, score):
        path, chosen = chain.rollout(), list(steps.indices)
        scored = score(chain.end_point(path, of="model").state)
        base_means = torch.stack([chain.base_mean(k, path.states[k]).detach() for k in chosen])
        shifts = self.strength * scored.exponent.view(1, -1, 1, 1, 1).expand_as(base_means)
        return Targets(path.states[chosen], steps, shifts, base_means, path.stds[chosen], scored)


def test_an_objective_without_need_of_a_gradient_takes_any_reward(tmp_path, monkeypatch):
    """The start check, the step and the card ask the objective."""
    monkeypatch.setitem(OBJECTIVES, "by_numbers", ByNumbers)

    def rounded(images, prompts, **columns):
        assert not images.requires_grad
        return (images.mean((1, 2, 3)) * 255).round()

    trainer = make_trainer(tmp_path, reward=rounded, loss_type="by_numbers", loss_kwargs={"strength": 0.002})
    start = weights(trainer)
    trainer.train()
    assert difference(weights(trainer), start) > 0
    assert "adjoint_norm" not in trainer.state.log_history[0]
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "which tunes a model to a reward." in card and "The method is biased" in card
    # And Adjoint Matching still refuses it.
    with pytest.raises(ValueError, match="reward 'detached' is not differentiable in the images"):
        make_trainer(tmp_path / "other", reward=detached).train()


def detached(images, prompts, **columns):
    return (images.mean((1, 2, 3)) * 255).round().detach()


def test_the_objective_that_contributing_shows_trains(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {name: value for module in (objectives, papers, targets) for name, value in vars(module).items()}
    names |= {"torch": torch, "Tensor": torch.Tensor, "dataclass": dataclass, "ClassVar": ClassVar, "Callable": Callable}
    exec(block, names)  # noqa: S102
    monkeypatch.setitem(OBJECTIVES, "nudge", names["Nudge"])
    trainer = make_trainer(tmp_path, loss_type="nudge", loss_kwargs={"strength": 2.0})
    start, seen = weights(trainer), []
    watch_targets(trainer, lambda chain, found: seen.append(found))
    trainer.train()
    assert difference(weights(trainer), start) > 0
    for found in seen:
        expected = torch.stack([2.0 * scale**2 * found.scored.tilt for scale in found.scales])
        assert torch.equal(found.shifts, expected)


# ---------------------------------------------------------------------------------------------------------------- leftover memory


def test_leftover_memory_is_announced_once_from_all_images_of_the_first_update(tmp_path, monkeypatch):
    announced = []
    monkeypatch.setattr(diffusers_adjoint.trainer.reward_trainer, "announce_memory", announced.append)
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.train()
    assert [len(memory) for memory in announced] == [4]
    assert all(-1 <= value <= 1 for value in announced[0])
    assert not any("memory" in name for line in trainer.state.log_history for name in line)


def test_what_is_no_end_point_says_nothing_of_memory(tmp_path, monkeypatch):
    """The one-step adjoint scores clean predictions in the middle of paths."""
    announced = []
    monkeypatch.setattr(diffusers_adjoint.trainer.reward_trainer, "announce_memory", announced.append)
    make_trainer(tmp_path, max_steps=1, loss_type="one_step").train()
    assert announced == []


def test_the_end_points_of_a_trained_pipeline_do_not_remember_their_noise(tmp_path, monkeypatch):
    """The digits pipeline on memoryless paths, and, for the measure itself, on its own deterministic ones."""
    announced = []
    monkeypatch.setattr(diffusers_adjoint.trainer.reward_trainer, "announce_memory", announced.append)
    pipe = DiffusionPipeline.from_pretrained(DIGITS)
    options = {"max_steps": 1, "num_inference_steps": 10, "num_generations": 32, "per_device_train_batch_size": 1}
    trainer = make_trainer(tmp_path, pipeline=pipe, rows=["zero"], pipeline_kwargs={"max_sequence_length": 1}, **options)
    trainer.train()
    memory = announced[0]
    # 32 images: a standard error of a few hundredths.
    assert abs(memory.mean()) < 4 * memory.std() / math.sqrt(len(memory)) + 0.02

    # The same pipeline without noise: its images are functions of their latents.
    start = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    fresh = DiffusionPipeline.from_pretrained(DIGITS)
    fresh.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "latent"}
    end = fresh(["zero"] * 32, latents=start.clone(), **call).images
    assert correlation(start, end) > 0.15  # .25, with a standard error of 1/√2048 = .02; more is not linear, and not seen


def test_what_is_said_of_leftover_memory(caplog, capsys):
    for values, said, warned in (([0.01, 0.03], "0.02 ± 0.01", False), ([0.5, 0.7], "0.6 ± 0.1", True), ([0.9], "0.9.", True)):
        caplog.clear()
        announce_memory(torch.tensor(values))
        assert said in capsys.readouterr().out  # information, of every healthy run
        assert [word in caplog.text for word in ("the tilt is biased", "random weights")] == [warned] * 2
    caplog.clear()
    announce_memory(torch.tensor([]))
    assert not caplog.text and not capsys.readouterr().out
