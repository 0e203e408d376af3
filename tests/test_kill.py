"""SIGKILL at twenty moments of a run, half of them while a checkpoint is written: nothing finished is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
STATE = ["optimizer.pt", "pytorch_lora_weights.safetensors", "rng_state.pth", "run.json", "scheduler.pt", "trainer_state.json"]


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_one_that_was_not(tmp_path):
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(HERE / "kill_run.py"), str(tmp_path)], check=True, env=environment, timeout=580)
    report = json.loads((tmp_path / "report.json").read_text())
    newest = report["newest"]
    assert len(newest) == 20
    assert newest == sorted(newest)  # what was saved before a kill is there after it
    assert newest[-1] > newest[0]
    assert all(files == STATE for found in report["found"] for files in found.values())  # whole or absent
    assert sum(bool(names) for names in report["during"]) >= 5  # kills that hit a write or a deletion
    assert report["ended"] == 0
    straight, killed = (load_file(tmp_path / run / "final" / STATE[1]) for run in ("straight", "killed"))
    assert straight.keys() == killed.keys()
    assert all((straight[name] == killed[name]).all() for name in straight)
