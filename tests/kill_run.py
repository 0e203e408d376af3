"""Trains a tiny pipeline, is killed again and again, also while it saves, and goes on; run by test_kill.py.

    python kill_run.py FOLDER lora|full

The host libraries are imported once: each run is a fork.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from tiny_pipelines import sd3
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
# What of a checkpoint is being written or deleted when the kill comes; None for an update.
TRACES = {
    "lora": (None, "_*.partial", None, "_*.deleted"),
    "full": (None, "_*.partial/transformer/*-00001-of-*", "_*.partial/transformer/*-00004-of-*", "_*.deleted"),
}


def run(folder: Path, kind: str, resume: bool) -> None:
    """In a process of its own, to the end."""
    pipeline = sd3()
    if kind == "full":  # seven shards, with a pause after each, in which a kill can come
        save, save_file = pipeline.transformer.save_pretrained, safetensors.torch.save_file
        pipeline.transformer.save_pretrained = functools.partial(save, max_shard_size="20KB")
        safetensors.torch.save_file = lambda *args, **kwargs: (save_file(*args, **kwargs), time.sleep(0.01))
    trainer = make_trainer(folder, pipeline=pipeline, lora=kind == "lora", **SETTINGS)
    trainer.check_first_row = lambda: None  # half of a short run's time, and it writes nothing
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder / "final"))


def fork(folder: Path, kind: str, resume: bool) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the process ends here
            run(folder, kind, resume)
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


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def main(folder: Path, kind: str) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    chance = random.Random(0)
    os.waitpid(fork(folder / "straight", kind, False), 0)
    written = [path.stat().st_mtime for path in (folder / "straight").glob("checkpoint-*")]
    update = max(written) - min(written)  # seconds between the last two checkpoints
    killed = folder / "killed"
    killed.mkdir()
    report = {"newest": [], "found": [], "during": []}
    for kill in range(KILLS):
        process = fork(killed, kind, bool(checkpoints(killed)))
        trace = TRACES[kind][kill % 4]
        wait_for_a_moment(killed, trace, chance.uniform(0.0, 0.005 if trace else 2 * update))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        report["during"].append({path.name: files(path) for path in killed.glob("_*")})
        report["newest"].append(checkpoints(killed)[-1])
        report["found"].append({str(path): files(path) for path in killed.glob("checkpoint-*")})
        assert os.WIFSIGNALED(status), "the run had ended before it was killed"
    _, status = os.waitpid(fork(killed, kind, True), 0)
    report["ended"] = os.waitstatus_to_exitcode(status)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
