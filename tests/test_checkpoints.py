"""Checkpoints are whole or absent, and going on from one gives the run that was not stopped, bit for bit."""

import signal
import threading

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, brightness, difference, evaluates_to, make_trainer, weights
from transformers import TrainerCallback

import diffusers_adjoint.trainer.host

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1e-3}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def checkpoints(folder):
    """And what is half written or half deleted."""
    return [name for name in names(folder) if name.startswith(("checkpoint-", "_"))]


@pytest.mark.parametrize(
    ("build", "lora", "stop", "settings"),
    [
        (sd3, True, 2, {}),
        (sd15, True, 3, {}),  # within an epoch
        (sd3, False, 1, {}),
        (sd3, True, 2, {"method": "discrete_adjoint"}),
        (sd3, True, 2, {"num_iterations": 2}),
        (sd3, True, 2, {"loss_type": "ram", "num_generations": 2}),
        (sd3, True, 2, {"loss_type": "efficient_adjoint_matching"}),
        (sd3, True, 2, {"loss_type": "one_step"}),
        (sd3, True, 3, {"num_generations": 2, "optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 2}),
    ],
    ids=["sd3", "sd15", "full", "back-propagation", "two iterations", "ram", "efficient", "one step", "other optimizer"],
)
def test_stop_and_resume_equals_a_straight_run(tmp_path, build, lora, stop, settings):
    settings = STEPS | {"lora": lora, "max_steps": 4, "per_device_train_batch_size": 1} | settings
    settings |= {"gradient_accumulation_steps": 2, "rows": PROMPTS + ["a tree", "a lamp"]}  # three updates an epoch
    straight = make_trainer(tmp_path / "straight", build, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", build, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    assert difference(weights(straight), weights(resumed)) == 0.0
    history = [(line["step"], line.get("loss"), line.get("reward")) for line in straight.state.log_history]
    assert [(line["step"], line.get("loss"), line.get("reward")) for line in resumed.state.log_history][:4] == history[:4]
    stopped_early = make_trainer(tmp_path / "early", build, **(settings | {"max_steps": stop, "save_strategy": "no"}))
    stopped_early.train()
    assert difference(weights(straight), weights(stopped_early)) > 0  # the updates after the checkpoint did something


def test_a_streamed_dataset_resumes(tmp_path):
    def trainer(folder):
        rows = IterableDataset.from_generator(lambda: ({"prompt": f"number {i}"} for i in range(20)))
        return make_trainer(folder, rows=rows, **STEPS)

    straight = trainer(tmp_path / "straight")
    straight.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert difference(weights(straight), weights(resumed)) == 0.0


def test_resume_true_takes_the_newest_whole_checkpoint(tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    (tmp_path / "_checkpoint-4.partial").mkdir()  # what a kill leaves
    (tmp_path / "_checkpoint-1.deleted").mkdir()
    again = make_trainer(tmp_path, **STEPS)
    started = []
    again.add_callback(FirstStep(started))
    again.train(resume_from_checkpoint=True)
    assert started == [2]
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    with pytest.raises(ValueError, match="holds no checkpoint; pass resume_from_checkpoint=None"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


class FirstStep(TrainerCallback):
    def __init__(self, started):
        self.started = started

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.started:
            self.started.append(state.global_step)


def test_what_a_checkpoint_holds(tmp_path):
    make_trainer(tmp_path / "lora", **STEPS | {"max_steps": 1}).train()
    weights, state = "pytorch_lora_weights.safetensors", ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    always = ["run.json", "trainer_state.json"]
    assert names(tmp_path / "lora" / "checkpoint-1") == sorted([weights, *state, *always])
    make_trainer(tmp_path / "only", save_only_model=True, **STEPS | {"max_steps": 1}).train()
    assert names(tmp_path / "only" / "checkpoint-1") == sorted([weights, *always])
    make_trainer(tmp_path / "full", lora=False, **STEPS | {"max_steps": 1}).train()
    assert names(tmp_path / "full" / "checkpoint-1") == sorted(["transformer", *state, *always])


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:1]}),
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        **STEPS | {"max_steps": 4},
    )
    evaluates_to(trainer, [1.0, 3.0, 2.0, 0.0])
    kept = {}

    class Keeping(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            kept[state.global_step] = weights(trainer)

    trainer.add_callback(Keeping())
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert difference(weights(trainer), kept[2]) == 0.0
    assert difference(weights(trainer), kept[4]) > 0


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **STEPS)
    save = torch.save

    def full(*args):
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")
        save(*args)

    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space left"):
        disk.setattr(torch, "save", full)
        trainer.train()
    assert [name for name in checkpoints(tmp_path) if not name.startswith("_")] == ["checkpoint-1"]
    again = make_trainer(tmp_path, **STEPS)
    again.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_save_that_fails_leaves_the_saved_model(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    before = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    trainer.train()

    def full(pipeline, component, folder, *, write):
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers_adjoint.trainer.host, "save_lora", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_saving_twice_replaces_the_whole_pipeline(tmp_path):
    trainer = make_trainer(tmp_path, lora=False)
    trainer.save_model()
    trainer.train()
    trainer.save_model()
    loaded = type(trainer.pipeline).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(sd3().scheduler)
    assert all(torch.equal(p, weights(trainer)[name]) for name, p in loaded.transformer.named_parameters())
    assert not [name for name in names(tmp_path) if name.startswith("_")]


# ------------------------------------------------------------------------------------------------------------------ interruption


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupted_run_saves_and_goes_on(tmp_path, number, error):
    settings = STEPS | {"save_strategy": "no"}
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.train()
    sent = []

    def interrupting(images, prompts, **columns):
        if trainer.state.global_step == 1 and not sent:  # in the middle of the second update
            sent.append(number)
            signal.raise_signal(number)
        return brightness(images, prompts)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path / "run", reward=interrupting, save_on_interrupt=True, **settings)
    with pytest.raises(error) as caught:
        trainer.train()
    if error is KeyboardInterrupt:
        assert "after update 2; train(resume_from_checkpoint=True) resumes" in str(caught.value)
    else:
        assert caught.value.code == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(straight), weights(resumed)) == 0.0


def test_the_second_signal_acts_at_once(tmp_path):
    def interrupting(images, prompts, **columns):
        if trainer.is_in_train:
            signal.raise_signal(signal.SIGINT)
        return brightness(images, prompts)

    # Four images in two micro-batches: the second one gets the second signal.
    trainer = make_trainer(tmp_path, reward=interrupting, save_on_interrupt=True, gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 0
    assert checkpoints(tmp_path) == []


def test_without_the_option_a_signal_is_the_users(tmp_path):
    def interrupting(images, prompts, **columns):
        if trainer.is_in_train:
            signal.raise_signal(signal.SIGINT)
        return brightness(images, prompts)

    trainer = make_trainer(tmp_path, reward=interrupting)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 0


def test_signals_need_the_main_thread(tmp_path):
    trainer, errors = make_trainer(tmp_path, save_on_interrupt=True), []

    def run():
        try:
            trainer.train()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]


def test_another_adapter_does_not_fit(tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    other = make_trainer(tmp_path, peft_config=LoraConfig(r=3), **STEPS)
    with pytest.raises(ValueError, match="resume with the peft_config it was trained with"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_is_kept_whatever_an_earlier_run_left(tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    make_trainer(tmp_path, save_total_limit=1, **STEPS | {"max_steps": 2}).train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path):
    make_trainer(tmp_path, **STEPS | {"max_steps": 1}).train()
    (tmp_path / "checkpoint-1").rename(tmp_path / "_checkpoint-1.replaced")
    (tmp_path / "_checkpoint-1.partial").mkdir()
    started = []
    again = make_trainer(tmp_path, **STEPS)
    again.add_callback(FirstStep(started))
    again.train(resume_from_checkpoint=True)
    assert started == [1]
    make_trainer(tmp_path, **STEPS | {"max_steps": 1}).train()  # writes checkpoint-1 anew
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_an_interrupt_saves_whatever_is_best(tmp_path, strategy):
    def interrupting(images, prompts, **columns):
        if trainer.is_in_train and trainer.state.global_step == 1 and not torch.is_inference_mode_enabled():
            signal.raise_signal(signal.SIGTERM)
        return brightness(images, prompts)

    trainer = make_trainer(
        tmp_path,
        reward=interrupting,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:1]}),
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        save_on_interrupt=True,
        **STEPS | {"save_strategy": strategy, "max_steps": 4},
    )
    evaluates_to(trainer, [1.0, 0.0, 0.0])  # the first is the best
    with pytest.raises(SystemExit):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_the_end_of_training_deletes_neither_the_last_checkpoint_nor_a_folder_of_the_user_s(tmp_path):
    """The host's own clean-up would, with a limit of one."""
    (tmp_path / "checkpoint-7-keep").mkdir()
    (tmp_path / "checkpoint-7-keep" / "notes").write_text("mine")
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    rows = Dataset.from_dict({"prompt": PROMPTS[:1]})
    trainer = make_trainer(tmp_path, eval_dataset=rows, save_total_limit=1, max_steps=3, **best)
    evaluates_to(trainer, [0.0, 1.0, 0.0])  # the second is the best
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-7-keep"]
    assert (tmp_path / "checkpoint-7-keep" / "notes").read_text() == "mine"
    assert trainer.args.save_total_limit == 1


def test_a_signal_after_the_last_update_lets_the_script_go_on(tmp_path):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    trainer = make_trainer(tmp_path, save_on_interrupt=True)
    trainer.add_callback(Late())
    assert trainer.train().global_step == 2


def test_a_stream_that_ends_within_an_update_leaves_no_gradient(tmp_path):
    rows = IterableDataset.from_generator(lambda: ({"prompt": f"number {i}"} for i in range(6)))
    present = []

    class Gradients(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            present.append(any(p.grad is not None for p in trainer.denoiser.network.parameters()))

    trainer = make_trainer(tmp_path, rows=rows, gradient_accumulation_steps=2, max_steps=3)
    trainer.add_callback(Gradients())
    trainer.train()
    assert present == [False] * 3
