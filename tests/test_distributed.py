"""Two processes (gloo) do the work of one: same images, same weights, one synchronisation an update."""

import pytest
import torch
from distributed_worker import train
from processes import TORCHRUN, run_worker
from tiny_trainer import difference, logged, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "loss_steps", "iterations"),
    [
        ("adjoint_matching", 2, 1),
        ("adjoint_matching", 2, 2),
        ("basic_adjoint_matching", 2, 1),
        ("efficient_adjoint_matching", 2, 1),
        ("one_step", 2, 1),
        ("ram", 2, 1),
        ("target_kl", 2, 1),
        ("discrete_adjoint", 4, 1),
    ],
)
def test_two_processes_give_the_weights_of_one(tmp_path, way, loss_steps, iterations):
    run_worker(TORCHRUN, "distributed_worker.py", str(tmp_path), way, str(iterations))
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["world_size"] == 2

    single, _, start = train(str(tmp_path), batch=4, accumulation=1, way=way, iterations=iterations)
    reference = weights(single)
    assert difference(start, result["start"]) == 0
    moved = difference(reference, start)
    # float32, the same four gradients averaged in another order: 1e-7 of each, and three digits for what the network makes of it
    assert moved > 0
    assert difference(reference, result["weights"]) <= 1e-4 * moved
    assert result["rewards"] == pytest.approx(logged(single, "reward"), rel=1e-5)
    # Spreads of a thousandth of the rewards, and squared in the target: three digits of float32 less, and one more.
    for name, column in (("spreads", "reward_std_between"), ("targets", "target_kl_estimate")):
        assert result[name] == pytest.approx([line[column] for line in single.state.log_history if "reward" in line], rel=1e-2)
    # λ follows a KL that the two have measured together, and is the same number on both.
    assert result["scales"][0] == result["scales"][1] == pytest.approx(single.reward_scale, rel=1e-4)
    assert (single.reward_scale < logged(single, "reward_scale")[0]) if way == "target_kl" else single.reward_scale == 50.0
    # Two updates of two micro-batches: only the last backward pass before a step of the optimizer synchronises.
    assert result["synchronised"] == ([False] * (2 * loss_steps - 1) + [True]) * 2 * iterations
