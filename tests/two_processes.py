"""Started on two processes, DDP or FSDP2: trains a tiny pipeline, evaluates, saves, resumes, and writes what it ends with."""

import os
import sys

import torch
import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from processes import leave
from tiny_pipelines import sd3
from tiny_trainer import PROMPTS, brightness, config, logged
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from diffusers_adjoint import AdjointMatchingTrainer


class Averages(TrainerCallback):
    """gloo in older torch adds FSDP's gradients up where it is asked for their mean: let FSDP divide the sum."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def build(folder: str, *, lora: bool, batch: int, accumulation: int, **kwargs) -> AdjointMatchingTrainer:
    """Updates of four images, in the dataset's order."""
    args = config(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.01,
        probe_base=True,
        **{"optim": "sgd", "learning_rate": 0.1} | kwargs,
    )
    # accelerate has FSDP for accelerators only; nothing of it but this name stands against the CPU.
    if args.world_size > 1 and "FSDP_VERSION" in os.environ:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = Dataset.from_dict({"prompt": PROMPTS * 2})
    adapter = LoraConfig(r=2, lora_alpha=4) if lora else None
    given = (sd3(), brightness, args, rows, rows.select(range(2)))
    return AdjointMatchingTrainer(*given, callbacks=[Averages()], peft_config=adapter)


def trained(trainer: AdjointMatchingTrainer) -> dict[str, torch.Tensor]:
    parameters = {n: p.detach() for n, p in trainer.denoiser.network.named_parameters() if p.requires_grad}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in parameters.items()}


if __name__ == "__main__":
    folder, lora = sys.argv[1], sys.argv[2] == "lora"
    trainer = build(folder, lora=lora, batch=1, accumulation=2, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    result = {
        "world_size": torch.distributed.get_world_size(),
        "sharded": [n for n, p in trainer.denoiser.network.named_parameters() if isinstance(p, DTensor)],
        "weights": trained(trainer),
        "grad_norm": logged(trainer, "grad_norm"),
        "eval_reward": logged(trainer, "eval_reward"),
    }
    trainer.save_model()
    # Once more, with an optimizer that has a state to be resumed.
    adam = {"lora": lora, "batch": 1, "accumulation": 2, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    straight = build(f"{folder}/run", **adam)
    straight.train()
    resumed = build(f"{folder}/run", **adam)
    resumed.train(resume_from_checkpoint=f"{folder}/run/checkpoint-1")
    result |= {"straight": trained(straight), "resumed": trained(resumed)}
    autocast = build(folder, lora=lora, batch=1, accumulation=2, bf16=True)
    autocast.train()
    result["kl_bf16"] = logged(autocast, "kl")
    if trainer.is_world_process_zero():
        torch.save(result, f"{folder}/result.pt")
    leave()
