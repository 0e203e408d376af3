"""A picture, a card, or a tracker's number that cannot be written is a warning: training goes on, and weights are saved."""

import pytest
from tiny_trainer import difference, make_trainer, weights
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

SHORT = {"num_inference_steps": 3, "num_loss_steps": 1, "num_images_to_log": 8}


def warnings_in(caplog, what):
    return [line.getMessage() for line in caplog.records if what in line.getMessage()]


def test_training_goes_on_without_a_folder_for_pictures(tmp_path, caplog):
    plain = make_trainer(tmp_path / "plain", **SHORT)
    plain.train()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("a file in the folder's place")
    trainer = make_trainer(tmp_path / "run", **SHORT)
    assert trainer.train().global_step == 2
    assert difference(weights(plain), weights(trainer)) == 0.0
    lines = warnings_in(caplog, "could not be written")
    assert len(lines) == 2 and lines[0].startswith("samples/train-000001.png could not be written (FileExistsError")


class Refusing(SummaryWriter):
    def add_image(self, *args, **kwargs):
        raise ConnectionError("no route")


def test_training_goes_on_without_a_tracker(tmp_path, caplog):
    seen = []

    class Accepting(SummaryWriter):
        def add_image(self, name, *args, **kwargs):
            seen.append(name)

    trainer = make_trainer(tmp_path, **SHORT)
    for i, kind in enumerate((Refusing, Accepting)):
        trainer.add_callback(TensorBoardCallback(kind(tmp_path / str(i))))
    assert trainer.train().global_step == 2
    assert seen == ["train/samples"] * 2  # one tracker's trouble is not the next one's
    assert warnings_in(caplog, "train/samples could not be written to TensorBoardCallback (ConnectionError: no route)")


class Full(SummaryWriter):
    def add_scalar(self, *args, **kwargs):
        raise OSError(28, "No space left on device")


def test_training_goes_on_without_its_numbers_in_a_tracker(tmp_path, caplog):
    plain = make_trainer(tmp_path / "plain", **SHORT)
    plain.train()
    trainer = make_trainer(tmp_path / "run", **SHORT)
    trainer.add_callback(TensorBoardCallback(Full(tmp_path / "tracker")))
    assert trainer.train().global_step == 2
    assert difference(weights(plain), weights(trainer)) == 0.0
    lines = warnings_in(caplog, "TensorBoardCallback.on_log has failed (OSError: [Errno 28] No space left on device).")
    assert len(lines) == 3  # two updates, and the summary


def test_a_tracker_that_cannot_start_ends_training_before_its_first_update(tmp_path, monkeypatch):
    (tmp_path / "tracker").write_text("a file in the folder's place")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tracker"))
    trainer = make_trainer(tmp_path / "run", report_to="tensorboard", **SHORT)
    with pytest.raises(FileExistsError):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_error_of_the_users_own_callback_is_the_users(tmp_path):
    class Own(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            raise OSError("mine")

    trainer = make_trainer(tmp_path, **SHORT)
    trainer.add_callback(Own())
    with pytest.raises(OSError, match="mine"):
        trainer.train()


def test_an_interrupt_is_no_trouble_of_a_tracker(tmp_path):
    class Interrupting(SummaryWriter):
        def add_image(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, **SHORT)
    trainer.add_callback(TensorBoardCallback(Interrupting(tmp_path / "runs")))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_the_weights_are_saved_without_a_card(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **SHORT)
    (tmp_path / "README.md").mkdir()
    trainer.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    assert len(warnings_in(caplog, "README.md could not be written (IsADirectoryError")) == 1
    with pytest.raises(OSError):  # who asks for the card alone hears that there is none
        trainer.create_model_card()
