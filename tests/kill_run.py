"""Trains a tiny pipeline, is killed again and again, also while it saves, and goes on; run by test_kill.py.

The host libraries are imported once: each run is a fork.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_trainer import PROMPTS, make_trainer
from transformers.utils import logging

KILLS = 20
SETTINGS = {
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "max_steps": 80,
    "num_inference_steps": 3,
    "num_loss_steps": 1,
    "per_device_train_batch_size": 1,
    "rows": PROMPTS + ["a tree", "a lamp", "a bird"],
    "disable_tqdm": True,
}


def run(folder: Path, resume: bool) -> None:
    """In a process of its own, to the end."""
    trainer = make_trainer(folder, **SETTINGS)
    trainer._check_before_training = lambda: None  # half of a short run's time, and it writes nothing
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder / "final"))


def fork(folder: Path, resume: bool) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the process ends here
            run(folder, resume)
            code = 0
        finally:
            os._exit(code)
    return process


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def wait_for_a_moment(folder: Path, trace: str | None, pause: float) -> None:
    """Until a new checkpoint is there, then until `trace`, of a writing or a deletion, is seen; then for the pause."""
    before, deadline = checkpoints(folder), time.monotonic() + 120
    while checkpoints(folder)[-1:] == before[-1:] and time.monotonic() < deadline:
        time.sleep(0.001)
    while trace is not None and not any(folder.glob(trace)) and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(pause)


def main(folder: Path) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    chance = random.Random(0)
    os.waitpid(fork(folder / "straight", False), 0)
    written = [path.stat().st_mtime for path in (folder / "straight").glob("checkpoint-*")]
    update = max(written) - min(written)  # seconds between the last two checkpoints
    killed = folder / "killed"
    killed.mkdir()
    report = {"newest": [], "found": [], "during": []}
    for kill in range(KILLS):
        process = fork(killed, bool(checkpoints(killed)))
        trace = (None, "_*.partial", None, "_*.deleted")[kill % 4]
        wait_for_a_moment(killed, trace, chance.uniform(0.0, 0.005 if trace else 2 * update))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        report["during"].append([path.name for path in killed.glob("_*")])
        report["newest"].append(checkpoints(killed)[-1])
        report["found"].append({str(path): sorted(p.name for p in path.iterdir()) for path in killed.glob("checkpoint-*")})
        assert os.WIFSIGNALED(status), "the run had ended before it was killed"
    _, status = os.waitpid(fork(killed, True), 0)
    report["ended"] = os.waitstatus_to_exitcode(status)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
