"""A second trainer in a folder is refused, and a killed one leaves no lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_trainer import make_trainer
from transformers import TrainerCallback

from diffusers_adjoint.trainer.lock import only_trainer

SHORT = {"max_steps": 1, "num_inference_steps": 3, "num_loss_steps": 1}


@pytest.fixture
def in_a_child():
    """Calls a function in a forked process, which then waits to be killed; returns when the call has."""
    started = []

    def start(action):
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                action(lambda: os.write(writer, b"x"))
            finally:
                os._exit(1)
        os.close(writer)
        started.append(process)
        assert os.read(reader, 1) == b"x"
        os.close(reader)
        return process

    yield start
    for process in started:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def hold(folder):
    def action(tell):
        with only_trainer(folder):
            tell()
            time.sleep(600)

    return action


def test_a_held_folder_is_refused_and_a_killed_holder_leaves_no_lock(tmp_path, in_a_child):
    process = in_a_child(hold(tmp_path))
    trainer = make_trainer(tmp_path, **SHORT)
    with pytest.raises(ValueError, match=r"is in use by another trainer; pass another output_dir"):
        trainer.train()
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert trainer.train().global_step == 1


def test_a_worker_that_outlives_its_trainer_does_not_keep_the_folder(tmp_path, in_a_child):
    with only_trainer(tmp_path):
        in_a_child(lambda tell: (tell(), time.sleep(600)))
    with only_trainer(tmp_path):  # refused, if the worker had the file open still
        assert (tmp_path / ".diffusers-adjoint.lock").read_bytes() == b""


def test_one_folder_after_the_other_and_two_at_once(tmp_path):
    (tmp_path / "other").mkdir()
    again = only_trainer(tmp_path)
    with only_trainer(tmp_path), only_trainer(tmp_path / "other"), pytest.raises(ValueError, match="in use"), again:
        raise AssertionError("entered a locked folder")
    with pytest.raises(RuntimeError, match="mine"), only_trainer(tmp_path):
        raise RuntimeError("mine")
    with only_trainer(tmp_path):
        assert os.access(tmp_path, os.W_OK)


def test_the_folder_is_held_while_training_lasts_and_no_longer(tmp_path):
    refused = []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="in use") as caught:
                make_trainer(tmp_path, **SHORT).train()
            refused.append(caught)

    first = make_trainer(tmp_path, **SHORT)
    first.add_callback(Second())
    first.train()
    assert len(refused) == 1
    make_trainer(tmp_path, **SHORT).train()
    first.train()


def test_training_that_fails_gives_the_folder_back(tmp_path):
    def broken(images, prompts, **columns):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        make_trainer(tmp_path, reward=broken, **SHORT).train()
    make_trainer(tmp_path, **SHORT).train()


def test_a_file_system_that_cannot_lock_is_one_warning(tmp_path, monkeypatch, caplog):
    def cannot(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    assert make_trainer(tmp_path, **SHORT).train().global_step == 1
    lines = [line.getMessage() for line in caplog.records if "cannot be locked" in line.getMessage()]
    assert len(lines) == 1 and "(No locks available); start no second trainer there." in lines[0]


HOLDER = """
import sys, time
from tiny_trainer import make_trainer
from transformers import TrainerCallback

class Wait(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        open(sys.argv[1] + "/started", "w").close()
        time.sleep(600)

trainer = make_trainer(sys.argv[1] + "/run", max_steps=1, num_inference_steps=3, num_loss_steps=1, disable_tqdm=True)
trainer.add_callback(Wait())
trainer.train()
"""


@pytest.mark.slow
def test_two_processes_one_folder(tmp_path):
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "started").exists()
        second = make_trainer(tmp_path / "run", **SHORT)
        with pytest.raises(ValueError, match="in use by another trainer"):
            second.train()
    finally:
        process.kill()
        process.wait()
    assert second.train().global_step == 1
