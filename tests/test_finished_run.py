"""A run that already has all its updates makes none when it is started again, and does what comes after training."""

import math

import pytest
from datasets import Dataset
from tiny_trainer import PROMPTS, brightness, difference, evaluates_to, make_trainer, weights
from transformers import TrainerCallback

SHORT = {"save_strategy": "steps", "save_steps": 1, "num_inference_steps": 3, "num_loss_steps": 1, "learning_rate": 1e-3}
WITHIN_AN_EPOCH = {"max_steps": 3, "per_device_train_batch_size": 1}  # of four updates
AT_ITS_END = {"max_steps": 4, "per_device_train_batch_size": 1}
BY_EPOCHS = {"max_steps": -1, "num_train_epochs": 1.5}  # three updates of two images


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append("step")

    def on_save(self, args, state, control, **kwargs):
        self.seen.append("save")

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append("evaluate")

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("end")


@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        pytest.param(WITHIN_AN_EPOCH, True, id="within an epoch"),
        pytest.param(BY_EPOCHS, True, id="by epochs"),
        pytest.param(AT_ITS_END, True, id="at its end", marks=pytest.mark.slow),
        pytest.param(WITHIN_AN_EPOCH, False, id="all weights", marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_stays_finished(tmp_path, settings, lora, caplog):
    first = make_trainer(tmp_path, lora=lora, **SHORT | settings)
    steps = first.train().global_step
    assert steps == (4 if settings is AT_ITS_END else 3)
    calls = []

    def reward(images, prompts, **columns):
        calls.append(prompts)
        return brightness(images, prompts)

    for _ in range(2):
        again = make_trainer(tmp_path, reward=reward, lora=lora, **SHORT | settings)
        assert difference(weights(first), weights(again)) > 0
        events = Events()
        again.add_callback(events)
        caplog.clear()
        output = again.train(resume_from_checkpoint=True)
        assert (output.global_step, again.state.global_step) == (steps, steps)
        assert math.isnan(output.training_loss) and math.isnan(output.metrics["train_loss"])  # the mean over no update
        assert difference(weights(first), weights(again)) == 0.0
        assert events.seen == ["end"]
        assert calls == [] and again.denoiser.evaluations == 0
        assert again.state.log_history == first.state.log_history[:steps]  # the lines of the updates, and no loss of 0
        assert f"checkpoint-{steps} already has all {steps} updates of this run" in caplog.text


@pytest.mark.slow
def test_it_goes_on_when_more_updates_are_asked_for(tmp_path):
    straight = make_trainer(tmp_path / "straight", **SHORT | AT_ITS_END)
    straight.train()
    make_trainer(tmp_path / "run", **SHORT | WITHIN_AN_EPOCH).train()
    make_trainer(tmp_path / "run", **SHORT | WITHIN_AN_EPOCH).train(resume_from_checkpoint=True)
    longer = make_trainer(tmp_path / "run", **SHORT | AT_ITS_END)
    output = longer.train(resume_from_checkpoint=True)
    assert output.global_step == 4 and math.isfinite(output.training_loss)
    assert difference(weights(straight), weights(longer)) == 0.0


def test_what_comes_after_training_is_repeated(tmp_path):
    """The best weights are loaded, and nothing is evaluated for it: not at the start, not at the end of the epoch."""

    def trainer():
        made = make_trainer(
            tmp_path,
            eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:1]}),
            eval_strategy="epoch",
            eval_on_start=True,
            load_best_model_at_end=True,
            **SHORT | {"max_steps": 2, "save_strategy": "epoch", "per_device_train_batch_size": 4},
        )
        evaluates_to(made, [0.0, 2.0, 1.0])  # at the start, and after each of two epochs of one update
        return made

    first = trainer()
    first.train()
    again, events = trainer(), Events()
    again.add_callback(events)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert difference(weights(first), weights(again)) == 0.0
    assert events.seen == ["end"]
    last = make_trainer(tmp_path, **SHORT | {"max_steps": 2, "per_device_train_batch_size": 4})
    last.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(weights(last), weights(again)) > 0  # the best are not the last


@pytest.mark.parametrize("updates", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_best_of_a_folder_that_was_moved_is_found(tmp_path, updates):
    """Finished or not, it is the checkpoint of its number beside the others; one of another run is not."""

    def trainer(folder, scores, **changes):
        settings = SHORT | {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
        rows = Dataset.from_dict({"prompt": PROMPTS[:1]})
        made = make_trainer(tmp_path / folder, eval_dataset=rows, **settings | changes)
        evaluates_to(made, scores)
        return made

    first = trainer("run", [2.0, 1.0])
    first.train()
    trainer("other", [1.0], max_steps=1, seed=7).train()
    there = trainer("other", [0.0], max_steps=updates)
    there.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert there.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    assert difference(weights(first), weights(there)) == 0.0
    (tmp_path / "run").rename(tmp_path / "moved")
    again = trainer("moved", [0.0], max_steps=updates)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-1")
    assert difference(weights(first), weights(again)) == 0.0
