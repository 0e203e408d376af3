"""A trainer of a tiny pipeline, as most tests want it."""

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_pipelines import sd3

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, RewardBackpropagationTrainer
from diffusers_adjoint.trainer.cost import CountingDenoiser

PROMPTS = ["a cat", "a dog", "a red car", "the sea"]


def brightness(images, prompts, **columns):
    return images.mean((1, 2, 3))


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "num_inference_steps": 4,
        "num_loss_steps": 2,
        "reward_scale": 50.0,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "num_images_to_log": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "probe_base": False,  # it costs more than the two updates
    }
    return AdjointMatchingConfig(**(settings | changes))


def make_trainer(
    folder,
    build=sd3,
    reward=brightness,
    lora=True,
    rows=PROMPTS,
    pipeline=None,
    peft_config=None,
    eval_dataset=None,
    method=None,
    **changes,
):
    """An `AdjointMatchingTrainer`, or with `method` a `RewardBackpropagationTrainer`."""
    parts = {
        "model": build() if pipeline is None else pipeline,
        "reward_funcs": reward,
        "args": config(folder, **({} if method is None else {"num_loss_steps": None}) | changes),
        "train_dataset": Dataset.from_dict({"prompt": rows}) if isinstance(rows, list) else rows,
        "eval_dataset": eval_dataset,
        "peft_config": (peft_config or LoraConfig(r=2, lora_alpha=4)) if lora else None,
    }
    return AdjointMatchingTrainer(**parts) if method is None else RewardBackpropagationTrainer(**parts, method=method)


def every_step(way, steps):
    """Arguments of `make_trainer` by which all steps carry the loss, of a `loss_type` or of a method of back-propagation."""
    return {"method": way} if way == "discrete_adjoint" else {"loss_type": way, "num_loss_steps": steps}


def evaluates_to(trainer, rewards):
    """Its evaluations find these rewards, one after the other, and sample nothing."""
    values = iter(rewards)
    trainer.measure = lambda dataset: ({"reward": torch.tensor([next(values)])}, None)


class Watched:
    """An objective of which a test sees, or changes, the targets."""

    def __init__(self, objective, see):
        self._objective, self._see = objective, see

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def targets(self, chain, steps, score):
        found = self._objective.targets(chain, steps, score)
        return self._see(chain, found) or found


def rehearsed(chain):
    """Whether nothing is evaluated: what an update costs is counted before the first one."""
    return isinstance(chain.denoiser, CountingDenoiser)


def watch_targets(trainer, see):
    """`see(chain, targets)` at each micro-batch; what it returns, if anything, takes the targets' place."""
    trainer.method = Watched(trainer.method, see)


def watch_chains(trainer, see):
    """`see(chain)` for each micro-batch, before it is drawn; what it returns, if anything, takes the chain's place."""
    prepare = trainer.prepare_chain

    def prepared(inputs):
        chain = prepare(inputs)
        return see(chain) or chain

    trainer.prepare_chain = prepared


def weights(trainer):
    """What is trained."""
    return {name: p.detach().clone() for name, p in trainer.denoiser.network.named_parameters() if p.requires_grad}


def logged(trainer, name):
    """The log's values of this name, in their order."""
    return [line[name] for line in trainer.state.log_history if name in line]


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)
