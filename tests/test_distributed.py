"""Two processes (gloo) do the work of one: same images, same weights, one synchronisation an update."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import adapter, train

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(("way", "loss_steps"), [("adjoint_matching", 2), ("basic_adjoint_matching", 2), ("discrete_adjoint", 4)])
def test_two_processes_give_the_weights_of_one(tmp_path, way, loss_steps):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    worker = [str(HERE / "distributed_worker.py"), str(tmp_path), way]
    subprocess.run([*command, *worker], check=True, env=environment, timeout=300)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["world_size"] == 2

    single, _, start = train(str(tmp_path), batch=4, accumulation=1, way=way)
    reference = adapter(single)
    assert all(torch.equal(start[name], result["start"][name]) for name in start)
    moved = max((reference[name] - start[name]).abs().max().item() for name in reference)
    # float32, the same four gradients averaged in another order: 1e-7 of each, and three digits for what the network makes of it
    assert moved > 0
    assert max((reference[name] - result["weights"][name]).abs().max().item() for name in reference) <= 1e-4 * moved
    rewards = [line["reward"] for line in single.state.log_history if "reward" in line]
    assert result["rewards"] == pytest.approx(rewards, rel=1e-5)
    # Spreads of a thousandth of the rewards, and squared in the target: three digits of float32 less, and one more.
    for name, logged in (("spreads", "reward_std_between"), ("targets", "target_kl_estimate")):
        assert result[name] == pytest.approx([line[logged] for line in single.state.log_history if "reward" in line], rel=1e-2)
    # Two updates of two micro-batches: only the last backward of an update synchronises.
    assert result["synchronised"] == ([False] * (2 * loss_steps - 1) + [True]) * 2
