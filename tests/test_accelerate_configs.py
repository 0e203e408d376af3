"""The files in examples/accelerate_configs: accelerate reads them, and starts what they say."""

from pathlib import Path

import pytest
import torch
import two_processes
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from processes import TESTS, run_worker
from tiny_pipelines import sd3
from tiny_trainer import logged

CONFIGS = TESTS.parent / "examples" / "accelerate_configs"
EXPECTED = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "multi_node": DistributedType.MULTI_GPU,
}


def launch(config: str, *command: str) -> dict:
    """Two processes on the CPU, by the file and two overrides: `--cpu` would quietly start a single one."""
    arguments = ["launch", "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2"]
    run_worker(["accelerate.commands.accelerate_cli", *arguments], *command)
    return torch.load(Path(command[1]) / "result.pt", weights_only=True)


def largest_difference(weights: dict, reference: dict) -> float:
    assert weights.keys() == reference.keys()
    return max((weights[name] - reference[name]).abs().max().item() for name in reference)


def test_there_is_a_file_for_each():
    assert {path.stem for path in CONFIGS.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == EXPECTED[name]
    assert config.mixed_precision == "no"
    assert config.num_processes % config.num_machines == 0
    assert (config.num_machines > 1) == (name == "multi_node")
    # accelerate takes misspelt settings of FSDP and DeepSpeed without a word.
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert (config.fsdp_config | config.deepspeed_config).keys() <= known.keys()
    assert bool(config.fsdp_config) == (name == "fsdp2") and bool(config.deepspeed_config) == (name == "deepspeed_zero2")


@pytest.mark.slow
@pytest.mark.parametrize(("config", "what"), [("ddp", "lora"), ("fsdp2", "lora"), ("fsdp2", "full")])
def test_two_processes_give_the_weights_of_one(tmp_path, config, what):
    result = launch(config, "two_processes.py", str(tmp_path), what)
    single = two_processes.build(
        str(tmp_path / "single"), lora=what == "lora", batch=4, accumulation=1, eval_strategy="steps", eval_steps=1
    )
    start = two_processes.trained(single)
    single.train()
    reference = two_processes.trained(single)
    assert result["world_size"] == 2
    assert result["sharded"] == ([name for name, _ in single.denoiser.network.named_parameters()] if config == "fsdp2" else [])
    # float32: the same gradients averaged in another order
    assert largest_difference(reference, start) > 1e-5 > 10 * largest_difference(result["weights"], reference)
    assert result["grad_norm"] == pytest.approx(logged(single, "grad_norm"), rel=1e-3)
    assert result["eval_reward"][1:] == pytest.approx(logged(single, "eval_reward"), rel=1e-5)
    assert largest_difference(result["resumed"], result["straight"]) == 0

    if what == "lora":
        pipeline = sd3()
        pipeline.load_lora_weights(str(tmp_path))
    else:
        pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    saved = {name.replace("default_0", "adjoint"): value for name, value in pipeline.transformer.named_parameters()}
    assert largest_difference({name: saved[name] for name in reference}, result["weights"]) == 0

    # States and means stay in float32 under autocast: rounded to bfloat16 they would lose most of so small a control.
    # The same images one by one: in a batch, bfloat16 rounds otherwise.
    autocast = two_processes.build(str(tmp_path / "bf16"), lora=what == "lora", batch=1, accumulation=4, bf16=True)
    autocast.train()
    assert result["kl_bf16"] == pytest.approx(logged(autocast, "kl"), rel=0.05)
    checkpoint = {path.name for path in (tmp_path / "run" / "checkpoint-1").iterdir()}
    assert not any("fsdp" in name for name in checkpoint)  # the base's weights are not in it
