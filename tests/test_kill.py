"""SIGKILL at twenty moments of a run, half of them while a checkpoint is written: nothing finished is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
STATE = ["optimizer.pt", "rng_state.pth", "run.json", "scheduler.pt", "trainer_state.json"]
SHARD = "transformer/diffusion_pytorch_model-0000{}-of-00007.safetensors"
SHARDS = [SHARD.format(i) for i in range(1, 8)]
LORA = [*STATE, "pytorch_lora_weights.safetensors"]
FULL = [*STATE, *SHARDS, "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"]
FINAL = {"lora": ".", "full": "transformer"}


def weights_in(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def between_shards(files):
    return 0 < len(set(files) & set(SHARDS)) < len(SHARDS)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "whole"), [("lora", LORA), ("full", FULL)])
def test_a_run_killed_twenty_times_ends_like_one_that_was_not(tmp_path, kind, whole):
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "kill_run.py"), str(tmp_path), kind]
    subprocess.run(command, check=True, env=environment, timeout=580)
    report = json.loads((tmp_path / "report.json").read_text())
    newest = report["newest"]
    assert len(newest) == 20
    assert newest == sorted(newest)  # what was saved before a kill is there after it
    assert newest[-1] > newest[0]
    assert all(files == sorted(whole) for found in report["found"] for files in found.values())  # whole or absent
    assert sum(bool(unfinished) for unfinished in report["during"]) >= 5  # kills that hit a write or a deletion
    if kind == "full":
        partial = [files for during in report["during"] for name, files in during.items() if name.endswith(".partial")]
        assert sum(map(between_shards, partial)) >= 3
    assert report["ended"] == 0
    straight, killed = (weights_in(tmp_path / run / "final" / FINAL[kind]) for run in ("straight", "killed"))
    assert straight and straight.keys() == killed.keys()
    assert all((straight[name] == killed[name]).all() for name in straight)
