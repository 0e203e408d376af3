"""What the user is told of a run: before its first update, and of what that one took; and a run that makes one update only."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, brightness, config, difference, every_step, logged, make_trainer, weights
from tiny_videos import EXPERTS, wan22
from transformers import TrainerCallback, TrainerState

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.trainer import phases
from diffusers_adjoint.trainer.summary import describe_first_update

K = 4


class Counter(TrainerCallback):
    """Images that the networks are evaluated for in the first update, by hooks on them."""

    def __init__(self, trainer):
        self.images, self.counting = 0, False
        for network in filter(None, [trainer.denoiser.network, trainer.denoiser.frozen]):
            network.register_forward_pre_hook(self.count, with_kwargs=True)
        trainer.add_callback(self)

    def count(self, network, args, kwargs):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.images += len(x) * self.counting

    def on_step_begin(self, args, state, control, **kwargs):
        self.counting = True

    def on_step_end(self, args, state, control, **kwargs):
        self.counting = False


def told(trainer, capsys, **call):
    capsys.readouterr()
    trainer.train(**call)
    return capsys.readouterr().out.splitlines()


def evaluations_of(lines):
    (line,) = [line for line in lines if "denoiser evaluations" in line]
    found = re.fullmatch(r"denoiser evaluations: ([\d,]+) in update \d+, (\d+) an image", line)
    return [int(number.replace(",", "")) for number in found.groups()]


RAM = {"loss_type": "ram", "num_generations": 2}
WAYS = {
    "score": {"loss_kwargs": {"pairing": "score"}},
    "next": {"loss_kwargs": {"pairing": "next"}},
    "paper": {"loss_kwargs": {"pairing": "paper"}},
    "all weights": {"lora": False},
    "iterations": {"num_iterations": 3},
    "basic": {"loss_type": "basic_adjoint_matching"},
    "one step": {"loss_type": "one_step"},
    "efficient": {"loss_type": "efficient_adjoint_matching", "loss_kwargs": {"variance": [0.1, 0.2, 0.1, 0.2]}},
    "ram": RAM,
    "ram, noisings": RAM | {"loss_kwargs": {"noisings": 2}},
    "ram, plain": RAM | {"loss_kwargs": {"mode": "plain"}},
    "ram, stages": RAM | {"loss_kwargs": {"mode": "tilt_matching", "stages": 1}},
    "back-propagation": every_step("discrete_adjoint", K),
    "UNet": {"build": sd15},
}


@pytest.mark.parametrize(("way", "seed"), [*((way, 0) for way in WAYS), ("score", 1), ("score", 2)])
def test_the_evaluations_told_are_those_made(tmp_path, capsys, way, seed):
    """Of the first update, whose steps of the loss the seed draws; whatever the batch is divided into."""
    options = {"num_generations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1} | WAYS[way]
    trainer = make_trainer(tmp_path, max_steps=1, seed=seed, **options)
    counter = Counter(trainer)
    update, image = evaluations_of(told(trainer, capsys))
    assert update == counter.images > 0
    assert image == update / 4


def test_guided_evaluations_are_counted_as_the_log_counts_them(tmp_path, capsys):
    """Once, where the network is evaluated for two conditions together."""
    trainer = make_trainer(tmp_path, max_steps=1, guidance_scale=2.0, cfg_mode="full")
    counter = Counter(trainer)
    assert 2 * evaluations_of(told(trainer, capsys))[0] == counter.images


@pytest.mark.slow
def test_evaluations_of_both_denoisers_are_told(tmp_path, capsys):
    """Of Wan 2.2, whose other transformer predicts the noisy steps."""
    options = {"pipeline_kwargs": EXPERTS, "num_inference_steps": 6, "reward": lambda images, prompts: images.mean((1, 2, 3, 4))}
    trainer = make_trainer(tmp_path, wan22, max_steps=1, **options)
    counter = Counter(trainer)
    trainer.pipeline.transformer_2.register_forward_pre_hook(counter.count, with_kwargs=True)
    assert evaluations_of(told(trainer, capsys))[0] == counter.images


def test_a_rehearsal_leaves_training_as_it_is(tmp_path, monkeypatch):
    trained = make_trainer(tmp_path / "a")
    trained.train()
    other = make_trainer(tmp_path / "b")
    monkeypatch.setattr(other, "_describe", lambda state: [])
    other.train()
    assert difference(weights(trained), weights(other)) == 0.0


# ----------------------------------------------------------------------------------------------------------- what is told


def test_what_is_told_of_a_run(tmp_path, capsys):
    lines = told(make_trainer(tmp_path, num_generations=3, gradient_accumulation_steps=2, max_steps=2, rows=PROMPTS * 2), capsys)
    begin = next(i for i, line in enumerate(lines) if line.startswith("StableDiffusion3Pipeline"))
    first = next(i for i, line in enumerate(lines) if line.startswith("update 1 took"))
    network = sd3().transformer
    # Rank 2 on q, k and v of both streams and on their outputs, as diffusers trains by default: to_q, to_k, to_v, to_out.0.
    width, blocks = network.inner_dim, len(network.transformer_blocks)
    lora = 4 * blocks * 2 * 2 * width
    parts = [part for part in sd3().components.values() if isinstance(part, torch.nn.Module)]
    frozen = sum(p.numel() for part in parts for p in part.parameters())
    assert lines[begin : begin + 6] == [
        f"StableDiffusion3Pipeline: LoRA of rank 2 on the transformer (SD3Transformer2DModel), {lora} weights trained, "
        f"{frozen / 1e3:.3g} k frozen",
        "objective: adjoint_matching, λ = 50 nats per unit of reward",
        "steps: K = 4 on each path, S = 2 carry the loss",
        "images an update: 12 = 2 prompts × 3 images a prompt × 2 accumulated × 1 process; 2 updates to make",
        lines[begin + 4],  # counted above
        "devices: cpu, 1 process; float32",
    ]
    seconds = r"\d+\.\d\d s"
    phases = ", ".join(f"{name} {seconds}" for name in ("prompts", "paths and targets", "rewards", "loss", "rest"))
    assert re.fullmatch(rf"update 1 took {seconds}: {phases}; peak memory \d\.\d\d GiB of the process", lines[first])
    assert re.fullmatch(rf"1 update to go, about {seconds} at this speed, without evaluations and checkpoints", lines[first + 1])
    assert sum("took" in line for line in lines) == 1


def test_what_differs_is_told_differently(tmp_path, capsys):
    options = {"lora": False, "bf16": True, "num_iterations": 2, "max_steps": 1, "rows": PROMPTS}
    lines = "\n".join(told(make_trainer(tmp_path, **options), capsys))
    assert "all weights of the transformer (SD3Transformer2DModel), " in lines and "frozen, and a frozen copy of the" in lines
    assert "S = 2 carry the loss, in each of 2 iterations" in lines
    assert "cpu, 1 process; float32, computed in bfloat16" in lines
    assert "to go" not in lines


def test_another_process_is_silent(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.state.is_world_process_zero = False
    summary = trainer._summary
    summary.on_train_begin(trainer.args, trainer.state, trainer.control)
    summary.on_step_begin(trainer.args, trainer.state, trainer.control)
    summary.on_step_end(trainer.args, trainer.state, trainer.control)
    assert capsys.readouterr().out == ""


def test_a_run_that_goes_on_is_told_from_where_it_is(tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **options).train()
    again = make_trainer(tmp_path, max_steps=2, **options)
    counter = Counter(again)
    lines = told(again, capsys, resume_from_checkpoint=True)
    assert "; 1 update to make" in "\n".join(lines) and sum(line.startswith("update 2 took") for line in lines) == 1
    assert counter.images == evaluations_of(lines)[0] and any("in update 2, " in line for line in lines)
    assert not any("took" in line or "images an" in line for line in told(again, capsys, resume_from_checkpoint=True))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.004, "0.00 s"), (119.0, "119.00 s"), (150.0, "2.5 min"), (7199.0, "120.0 min"), (9000.0, "2.5 h")]
)
def test_durations(seconds, said):
    state = TrainerState(global_step=1, max_steps=2)
    lines = describe_first_update({"rest": seconds}, state, torch.device("cpu"))
    assert lines[0].startswith(f"update 1 took {said}: rest {said}; ") and f"about {said} at" in lines[1]


def test_phases_count_each_second_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    found = phases.Phases(torch.device("cpu"))
    with found.of("before"):
        pass
    found.begin()
    with found.of("paths"), found.of("rewards"):
        pass
    found.end()
    with found.of("after"):
        pass
    assert found.seconds == {"rest": 1.0 + 16.0, "paths": 2.0 + 8.0, "rewards": 4.0}
    assert list(found.seconds) == ["paths", "rewards", "rest"]


# --------------------------------------------------------------------------------------------------------------- dry run


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_makes_one_update_and_no_file(tmp_path, capsys):
    rows = Dataset.from_dict({"prompt": PROMPTS[:1]})
    options = {"save_strategy": "steps", "save_steps": 1, "num_images_to_log": 4, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"eval_on_start": True, "report_to": "tensorboard", "push_to_hub": True, "logging_steps": 5, "rows": PROMPTS * 2}
    trainer = make_trainer(tmp_path / "a" / "b", dry_run=True, max_steps=4, eval_dataset=rows, probe_base=True, **options)
    before = weights(trainer)
    lines = "\n".join(told(trainer, capsys))
    assert (
        "; 4 updates to make, this dry run makes one\n" in lines and "\nupdate 1 took" in lines and "\n3 updates to go" in lines
    )
    assert trainer.state.global_step == 1 and difference(weights(trainer), before) > 0
    assert len(logged(trainer, "loss")) == 1 and not logged(trainer, "eval_reward")
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.push_to_hub() is None
    assert list(tmp_path.iterdir()) == []


def test_the_update_of_a_dry_run_is_the_run_s_first(tmp_path):
    dry = make_trainer(tmp_path / "dry", dry_run=True, max_steps=3, rows=PROMPTS * 2)
    dry.train()
    run = make_trainer(tmp_path / "run", max_steps=3, rows=PROMPTS * 2)
    run.train()
    assert logged(dry, "loss") == logged(run, "loss")[:1] and logged(dry, "kl") == logged(run, "kl")[:1]


def test_a_dry_run_goes_on_from_a_checkpoint_and_leaves_it(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **options).train()
    before = files_in(tmp_path)
    dry = make_trainer(tmp_path, max_steps=3, dry_run=True, **options)
    assert dry.train(resume_from_checkpoint=True).global_step == 2
    assert files_in(tmp_path) == before


def test_a_dry_run_makes_the_checks(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        make_trainer(tmp_path / "file" / "out", dry_run=True)
    with pytest.raises(ValueError, match="return one value per image"):
        make_trainer(tmp_path, dry_run=True, reward=lambda images, prompts: images).train()


def test_the_settings_of_the_user_stay(tmp_path):
    args = config(tmp_path / "out", dry_run=True, num_images_to_log=3)
    AdjointMatchingTrainer(sd3(), brightness, args, Dataset.from_dict({"prompt": PROMPTS}), peft_config=LoraConfig(r=2))
    assert args.num_images_to_log == 3
