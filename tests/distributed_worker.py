"""Run under torchrun by test_distributed.py: trains a tiny pipeline on two processes and writes what rank 0 ends with."""

import os
import sys

import torch
import torch.distributed
from datasets import Dataset
from peft import LoraConfig
from tiny_pipelines import sd3

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, RewardBackpropagationTrainer
from diffusers_adjoint.trainer.reward_trainer import RewardTrainer

PROMPTS = ["a cat", "a dog", "a red car", "the sea"]


def brightness(images, prompts, **columns):
    return images.mean((1, 2, 3))


def train(folder: str, batch: int, accumulation: int, way: str) -> tuple[RewardTrainer, list[bool], dict[str, torch.Tensor]]:
    """Two updates of four images, in the dataset's order; also which forwards were set to synchronise, and the first weights."""
    args = AdjointMatchingConfig(
        output_dir=folder,
        num_inference_steps=4,
        loss_type="adjoint_matching" if way == "discrete_adjoint" else way,
        num_loss_steps=None if way == "discrete_adjoint" else 2,
        reward_scale=50.0,
        max_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer_class = RewardBackpropagationTrainer if way == "discrete_adjoint" else AdjointMatchingTrainer
    trainer = trainer_class(
        sd3(), brightness, args, Dataset.from_dict({"prompt": PROMPTS * 2}), peft_config=LoraConfig(r=2, lora_alpha=4)
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
    start = adapter(trainer)
    trainer.train()
    return trainer, synchronised, start


def adapter(trainer: RewardTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.denoiser.network.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    folder, way = sys.argv[1:]
    trainer, synchronised, start = train(folder, batch=1, accumulation=2, way=way)
    if trainer.is_world_process_zero():
        result = {
            "world_size": torch.distributed.get_world_size(),
            "start": start,
            "weights": adapter(trainer),
            "synchronised": synchronised,
            "rewards": [line["reward"] for line in trainer.state.log_history if "reward" in line],
            "spreads": [line["reward_std_between"] for line in trainer.state.log_history if "reward" in line],
            "targets": [line["target_kl_estimate"] for line in trainer.state.log_history if "reward" in line],
        }
        torch.save(result, f"{folder}/result.pt")
    # Everything is written. While Python winds up, torch aborts about one process in fifty here ("terminate called …").
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
