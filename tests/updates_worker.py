"""Started on two processes by test_updates.py: trainings that come to nothing, and what each process says of them."""

import logging
import sys

import torch
import torch.distributed
from datasets import IterableDataset
from peft import LoraConfig
from processes import leave
from tiny_images import flux
from tiny_pipelines import sd3
from tiny_trainer import PROMPTS, difference, make_trainer, weights


def error_of(trainer) -> str:
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return ""


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def warning_of_unread_layers(folder: str) -> str:
    """A network with layers that it does not use trains the others; what is said about it."""
    pipeline = sd3()
    block = pipeline.transformer.transformer_blocks[0]
    block.unread = torch.nn.Module()
    block.unread.to_k, block.unread.only_here = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "only_here"])
    trainer = make_trainer(folder, pipeline=pipeline, peft_config=config, per_device_train_batch_size=1)
    start, handler = weights(trainer), Warnings()
    logging.getLogger("diffusers_adjoint").addHandler(handler)
    trainer.train()
    assert difference(start, weights(trainer)) > 0
    return " ".join(message for message in handler.messages if "get no gradient" in message)


def stream():
    return IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS))


def infinitely_fast(folder: str):
    trainer = make_trainer(folder)
    trainer.args.learning_rate = float("inf")  # as a constructor's argument it is refused
    return trainer


def fused_flux():
    pipeline = flux()
    pipeline.transformer.fuse_qkv_projections()
    return pipeline


if __name__ == "__main__":
    folder = sys.argv[1]
    small = {"pipeline_kwargs": {"height": 16, "width": 16, "max_sequence_length": 8}, "guidance_scale": 3.0}
    said = {
        "a stream that ends": error_of(make_trainer(folder, rows=stream(), gradient_accumulation_steps=3)),
        "no reward": error_of(make_trainer(folder, reward=lambda images, prompts: [None] * len(images))),
        "infinite": error_of(infinitely_fast(folder)),
        "unread": warning_of_unread_layers(folder),
        "fused": error_of(make_trainer(folder, pipeline=fused_flux(), **small)),
    }
    gathered: list[dict[str, str]] = [{}, {}]
    torch.distributed.all_gather_object(gathered, said)
    if torch.distributed.get_rank() == 0:
        torch.save({case: [said[case] for said in gathered] for case in said}, f"{folder}/said.pt")
    leave()
