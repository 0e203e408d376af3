"""Nothing here asks the network: train, evaluate and the demo run with every socket forbidden, and without HF_HUB_OFFLINE."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipelines import sd3

ROOT = Path(__file__).parents[1]
FORBID = """
import socket, sys

def refuse(*args, **kwargs):
    print("ASKED", args[:1], file=sys.stderr, flush=True)
    raise socket.gaierror("no network in this test")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
"""
COMMANDS = """
from diffusers_adjoint.cli import main

shared = ["--pipeline_kwargs", '{"max_sequence_length": 8}']
train = ["train", "--model_name_or_path", "model", "--dataset_name", "prompts.txt", "--reward_funcs", "my_rewards.py:brightness"]
train += ["--output_dir", "out", "--use_peft", "true", "--lora_r", "2", "--num_inference_steps", "3", "--max_steps", "1"]
train += ["--per_device_train_batch_size", "2", "--report_to", "tensorboard", "--use_cpu", "true", *shared]
evaluate = ["evaluate", "--model_name_or_path", "model", "--adapter", "out", "--dataset_name", "prompts.txt"]
evaluate += ["--reward_funcs", "my_rewards.py:brightness", "--num_inference_steps", "2"]
evaluate += ["--num_generations_eval", "2", "--output_dir", "evaluation", *shared]
assert main(train) == 0
assert main(evaluate) == 0
"""
DEMO = """
import dataclasses, pathlib
import demo

task = dataclasses.replace(demo.make_task("ink"), images=4, updates=2)
demo.BASE_IMAGES = demo.TUNED_IMAGES = 20
demo.run(task, pathlib.Path("digits"))
print(demo.check_saved_lora(pathlib.Path("digits")))
"""


def run(code, folder):
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "0", "HF_DATASETS_CACHE": str(folder / "cache")}
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "examples" / "digits")])
    environment = os.environ | online | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TENSORBOARD_LOGGING_DIR": str(folder)}
    command = [sys.executable, "-c", FORBID + code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def test_a_request_would_be_seen(tmp_path):
    done = run("from huggingface_hub import model_info\nmodel_info('me/model')", tmp_path)
    assert done.returncode and "ASKED" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", [COMMANDS, DEMO], ids=["commands", "demo"])
def test_nobody_is_asked(tmp_path, code):
    sd3().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "my_rewards.py").write_text("def brightness(images, prompts, **columns):\n    return images.mean((1, 2, 3))\n")
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ASKED" not in done.stderr
