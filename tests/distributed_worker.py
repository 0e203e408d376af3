"""Run under torchrun by test_distributed.py: trains a tiny pipeline on two processes and writes what rank 0 ends with."""

import sys

import torch
import torch.distributed
from processes import leave
from tiny_trainer import PROMPTS, every_step, logged, make_trainer, weights

from diffusers_adjoint.trainer.reward_trainer import RewardTrainer

# Steps so large that the second update has spent the budget, and λ falls.
BUDGET = {"target_kl": 1e-3, "reward_scale": None, "learning_rate": 30.0}


def train(
    folder: str, batch: int, accumulation: int, way: str, iterations: int
) -> tuple[RewardTrainer, list[bool], dict[str, torch.Tensor]]:
    """Two updates of four prompts, in the dataset's order; also which forwards were set to synchronise, and the first weights."""
    trainer = make_trainer(
        folder,
        rows=PROMPTS * 2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        optim="sgd",
        max_grad_norm=0.0,
        probe_base=True,
        num_iterations=iterations,
        num_generations=2 if way == "ram" else 1,
        **{"learning_rate": 1e-3} | (BUDGET if way == "target_kl" else every_step(way, 2)),
    )
    synchronised: list[bool] = []
    original = trainer.training_step

    def spy(model, *rest):
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            hook = model.register_forward_pre_hook(lambda m, args: synchronised.append(m.require_backward_grad_sync))
            result = original(model, *rest)
            hook.remove()
            return result
        return original(model, *rest)

    trainer.training_step = spy
    start = weights(trainer)
    trainer.train()
    return trainer, synchronised, start


if __name__ == "__main__":
    folder, way, iterations = sys.argv[1:]
    trainer, synchronised, start = train(folder, batch=1, accumulation=2, way=way, iterations=int(iterations))
    scales: list[float] = [0.0, 0.0]
    torch.distributed.all_gather_object(scales, trainer.reward_scale)
    if trainer.is_world_process_zero():
        result = {
            "scales": scales,
            "world_size": torch.distributed.get_world_size(),
            "start": start,
            "weights": weights(trainer),
            "synchronised": synchronised,
            "rewards": logged(trainer, "reward"),
            "spreads": logged(trainer, "reward_std_between"),
            "targets": [line["target_kl_estimate"] for line in trainer.state.log_history if "reward" in line],
        }
        torch.save(result, f"{folder}/result.pt")
    leave()
