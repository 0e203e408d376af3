"""Bad input is refused before any rollout, in one sentence that names the value and the cure."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from diffusers import DDPMPipeline, DDPMScheduler, LCMScheduler, UNet2DModel
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from test_quantised import quantised
from tiny_pipelines import sd3, sd15
from tiny_trainer import brightness
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import diffusers_adjoint.model.chain
from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer
from diffusers_adjoint.cli import main
from diffusers_adjoint.model.lora import add_lora
from diffusers_adjoint.rewards import PickScore


def detached(images, prompts, **columns):
    return brightness(images.detach(), prompts)


def one_number(images, prompts, **columns):
    return images.mean()


def python_float(images, prompts, **columns):
    return [0.5] * len(images)


PARAMETER = torch.zeros(1, requires_grad=True)


def own_parameter(images, prompts, **columns):
    return PARAMETER.expand(len(images))


def positional(pixels, prompts):
    return pixels.mean((1, 2, 3))


def prompts_only():
    return Dataset.from_dict({"prompt": ["a cat", "a dog"]})


def sd15_with(scheduler):
    pipeline = sd15()
    pipeline.scheduler = scheduler
    return pipeline


def stored_as(dtype):
    """Computes in float32."""
    pipeline = sd3()
    pipeline.transformer.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)
    return pipeline


def sd3_with_adapter(name="style"):
    pipeline = sd3()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
    return pipeline


def text_adapter():
    pipeline = sd3()
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return pipeline


def sd3_with_fused_adapter():
    pipeline = sd3_with_adapter()
    pipeline.fuse_lora()
    return pipeline


def unconditional():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def streamed_rows(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@dataclass
class Case:
    """What a user passes wrongly, and what the sentence must say: the value, then the cure."""

    says: str
    cure: str
    args: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    cli: list[str] = field(default_factory=list)  # options of `diffusers-adjoint train`, in place of the rest
    error: type[Exception] = ValueError


def other_arguments(images, prompts, label):
    return brightness(images, prompts)


class NoStart(DDPMPipeline):
    """A call in whose module no noise is drawn."""

    def __call__(self, batch_size=1, generator=None, num_inference_steps=4, output_type="pt", return_dict=True):
        return (torch.zeros(batch_size, 3, 8, 8),)


def no_start():
    return NoStart(**unconditional().components)


def without(name):
    pipeline = sd3()
    setattr(pipeline, name, None)
    return pipeline


def wrapped(wrap):
    """A pipeline whose transformer is inside something else."""
    pipeline = sd3()
    pipeline.transformer = wrap(pipeline.transformer)
    return pipeline


def distributed(wrap):
    """Done by the only process of a group."""

    def inner(network):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            return wrap(network)
        finally:
            torch.distributed.destroy_process_group()

    return inner


def older_fsdp(network):
    """As it holds a network; making one needs an accelerator."""
    holder = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(holder)
    holder._fsdp_wrapped_module = network
    return holder


def with_compiled_block(network):
    network.transformer_blocks[0] = torch.compile(network.transformer_blocks[0], backend="eager")
    return network


def lora(**kwargs):
    return LoraConfig(r=2, **kwargs)


MODEL, DATA = ["--model_name_or_path", "pipeline"], ["--dataset_name", "prompts.txt"]
REWARD = ["--reward_funcs", "math:sqrt"]

BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
CASES = {
    "misspelt metric": Case(
        "metric_for_best_model='eval_rewards'",
        "pass 'eval_reward' if that is meant",
        BEST | {"metric_for_best_model": "eval_rewards"},
        {"eval_dataset": prompts_only()},
    ),
    "metric of one of several datasets": Case(
        "metric_for_best_model='eval_reward'",
        "another of eval_seen_reward,",
        BEST | {"metric_for_best_model": "eval_reward"},
        {"eval_dataset": {"seen": prompts_only(), "new": prompts_only()}},
    ),
    "LoHa": Case("peft_config is a LoHaConfig", "pass a peft.LoraConfig", trainer={"peft_config": LoHaConfig()}, error=TypeError),
    "IA3": Case("peft_config is a IA3Config", "pass a peft.LoraConfig", trainer={"peft_config": IA3Config()}, error=TypeError),
    "AdaLoRA": Case(
        "peft_config is a AdaLoraConfig",
        "pass a peft.LoraConfig",
        trainer={"peft_config": AdaLoraConfig(total_step=10)},
        error=TypeError,
    ),
    "peft_config a dict": Case(
        "peft_config is a dict", "pass a peft.LoraConfig", trainer={"peft_config": {"r": 2}}, error=TypeError
    ),
    "target_parameters": Case(
        "LoraConfig(target_parameters=['weight'])", "leave it out", trainer={"peft_config": lora(target_parameters=["weight"])}
    ),
    "lora_bias": Case("LoraConfig(lora_bias=True)", "leave it out", trainer={"peft_config": lora(lora_bias=True)}),
    "a PeftModel": Case(
        "the transformer is a PeftModel",
        "transformer.unload()",
        trainer={"model": lambda: wrapped(lambda network: get_peft_model(network, lora(target_modules=["to_q"])))},
    ),
    "a compiled network": Case(
        "the transformer is compiled",
        "torch_compile=True",
        trainer={"model": lambda: wrapped(lambda network: torch.compile(network, backend="eager"))},
    ),
    "a compiled block": Case(
        "the transformer is compiled", "torch_compile=True", trainer={"model": lambda: wrapped(with_compiled_block)}
    ),
    "a network in DataParallel": Case(
        "the transformer is inside a DataParallel",
        "the network itself, transformer.module, and start the script by accelerate launch",
        trainer={"model": lambda: wrapped(torch.nn.DataParallel)},
    ),
    "a network in DDP": Case(
        "the transformer is inside a DistributedDataParallel",
        "the network itself, transformer.module, and start the script by accelerate launch",
        trainer={"model": lambda: wrapped(distributed(DistributedDataParallel)), "peft_config": None},
    ),
    "a network of FSDP": Case(
        "the transformer is divided by FSDP",
        "load the pipeline anew",
        trainer={"model": lambda: wrapped(distributed(lambda n: fully_shard(n, mesh=init_device_mesh("cpu", (1,)))))},
    ),
    "a network of the older FSDP": Case(
        "the transformer is divided by FSDP", "load the pipeline anew", trainer={"model": lambda: wrapped(older_fsdp)}
    ),
    "K below 2": Case("num_inference_steps=1", "at least 2", {"num_inference_steps": 1}),
    "S above K": Case("num_loss_steps=9", "pass 1 to 4", {"num_loss_steps": 9}),
    "S zero": Case("num_loss_steps=0", "pass 1 to 4", {"num_loss_steps": 0}),
    "paper needs more steps": Case("num_loss_steps=1", "at least 2", {"loss_step_selection": "paper", "num_loss_steps": 1}),
    "unknown integrator": Case("'heun'", "'ancestral'", {"integrator": "heun"}),
    "unknown cfg_mode": Case("cfg_mode='both'", "'rollout'", {"cfg_mode": "both"}),
    "unknown selection": Case("'random'", "'uniform'", {"loss_step_selection": "random"}),
    "unknown objective": Case("loss_type='reinforce'", "'adjoint_matching'", {"loss_type": "reinforce"}),
    "unknown pairing": Case("'previous'", "'next'", {"loss_kwargs": {"pairing": "previous"}}),
    "unknown option": Case("'paring'", "pass 'pairing'", {"loss_kwargs": {"paring": "next"}}),
    "options that are no dict": Case("loss_kwargs is a list", "pass a dict", {"loss_kwargs": ["next"]}, error=TypeError),
    "an option by a number": Case("loss_kwargs has 3", "pass 'pairing'", {"loss_kwargs": {3: "next", "paring": 1}}),
    "options cut short": Case("loss_kwargs is not JSON", "pass a dict", {"loss_kwargs": '{"pairing": '}),
    "Python for JSON": Case("pipeline_kwargs is not JSON", 'like {"name": "value"}', {"pipeline_kwargs": "{'height': 8}"}),
    "an option that has moved": Case("adjoint_pairing has moved", "loss_kwargs={'pairing'", {"adjoint_pairing": "paper"}),
    "an objective that has moved": Case(
        "loss_type='discrete_adjoint' has moved", "or --method discrete_adjoint", {"loss_type": "discrete_adjoint"}
    ),
    "unknown on_nonfinite": Case("'ignore'", "'skip'", {"on_nonfinite": "ignore"}),
    "negative scale": Case("reward_scale=-1.0", "≥ 0", {"reward_scale": -1.0}),
    "scale beyond all floats": Case("reward_scale has a whole number larger", "below 1.8e+308", {"reward_scale": 10**400}),
    "guidance beyond all floats": Case("guidance_scale has a whole number", "below 1.8e+308", {"guidance_scale": 10**400}),
    "clip with more digits than Python prints": Case("loss_clip has a whole number", "below 1.8e+308", {"loss_clip": 10**5000}),
    "a weight beyond all floats": Case("reward_weights has a whole number", "below 1.8e+308", {"reward_weights": [-(10**400)]}),
    "a rate beyond all floats": Case("learning_rate has a whole number", "below 1.8e+308", {"learning_rate": 10**400}),
    "epochs beyond all floats": Case(
        "num_train_epochs has a whole number", "below 1.8e+308", {"max_steps": -1, "num_train_epochs": 10**400}
    ),
    "scale not a number": Case("reward_scale=nan", "≥ 0", {"reward_scale": float("nan")}),
    "a scale and a budget": Case(
        "target_kl=1.0 and reward_scale=5.0 both set λ", "only one of them", {"reward_scale": 5.0, "target_kl": 1.0}
    ),
    "no budget": Case("target_kl=0.0 is not a KL to reach", "nats above 0", {"reward_scale": None, "target_kl": 0.0}),
    "a budget below 0": Case("target_kl=-1.0 is not a KL to reach", "nats above 0", {"reward_scale": None, "target_kl": -1.0}),
    "a budget without end": Case("target_kl=inf", "finite number", {"reward_scale": None, "target_kl": float("inf")}),
    "a budget that is no number": Case("target_kl=nan", "finite number", {"reward_scale": None, "target_kl": float("nan")}),
    "a bool for a budget": Case(
        "target_kl=True is of type bool", "a number or None", {"reward_scale": None, "target_kl": True}, error=TypeError
    ),
    "a budget as text": Case(
        "target_kl='1' is of type str", "a number or None", {"reward_scale": None, "target_kl": "1"}, error=TypeError
    ),
    "a budget of another law": Case(
        "loss_type='one_step' with these options converges to another one",
        "pass reward_scale",
        {"reward_scale": None, "target_kl": 1.0, "loss_type": "one_step"},
    ),
    "a budget of guided paths": Case(
        "cfg_mode='rollout' draws guided paths",
        "reward_scale instead of target_kl",
        {"reward_scale": None, "target_kl": 1.0, "cfg_mode": "rollout", "guidance_scale": 2.0},
    ),
    "guidance below 1": Case("guidance_scale=0.5", "pass 1", {"guidance_scale": 0.5}),
    "no generations": Case("num_generations=0", "at least 1", {"num_generations": 0}),
    "no image in evaluation": Case("num_generations_eval=0", "at least 1", {"num_generations_eval": 0}),
    "no image to log": Case("num_images_to_log=-1", "pass 0 for none", {"num_images_to_log": -1}),
    "model_init_kwargs not a dict": Case("model_init_kwargs", "dict", {"model_init_kwargs": "float16"}, error=TypeError),
    "clip everything": Case("loss_clip=0.0", "positive", {"loss_clip": 0.0}),
    "pipeline_kwargs not a dict": Case("pipeline_kwargs", "dict", {"pipeline_kwargs": "height"}, error=TypeError),
    "unknown pipeline argument": Case("'hight'", "", {"pipeline_kwargs": {"hight": 32}}),
    "scale as text": Case("reward_scale='10' is of type str", "a number", {"reward_scale": "10"}, error=TypeError),
    "K as text": Case("num_inference_steps='20'", "a whole number", {"num_inference_steps": "20"}, error=TypeError),
    "half an image": Case("num_generations=2.5 is of type float", "a whole number", {"num_generations": 2.5}, error=TypeError),
    "optional number as text": Case("loss_clip='1'", "a number or None", {"loss_clip": "1"}, error=TypeError),
    "a bool for a number": Case("num_generations=True", "whole number", {"num_generations": True}, error=TypeError),
    "text for a bool": Case("probe_base='false' is of type str", "True or False", {"probe_base": "false"}, error=TypeError),
    "a number for text": Case("integrator=1 is of type int", "text or None", {"integrator": 1}, error=TypeError),
    "a number of the host as text": Case("max_steps='2' is of type str", "a whole number", {"max_steps": "2"}, error=TypeError),
    "an accumulation as text": Case(
        "gradient_accumulation_steps='2'", "a whole number", {"gradient_accumulation_steps": "2"}, error=TypeError
    ),
    "a share of an update": Case("max_steps=1.5 is of type float", "a whole number", {"max_steps": 1.5}, error=TypeError),
    "a share of a batch": Case(
        "gradient_accumulation_steps=2.5", "a whole number", {"gradient_accumulation_steps": 2.5}, error=TypeError
    ),
    "a fractional seed": Case("seed=1.5 is of type float", "a whole number", {"seed": 1.5}, error=TypeError),
    "a bool for a seed": Case("seed=True is of type bool", "a whole number", {"seed": True}, error=TypeError),
    "a share of a checkpoint": Case("save_total_limit=1.5", "a whole number or None", {"save_total_limit": 1.5}, error=TypeError),
    "nothing for a number of the host": Case("max_grad_norm=None", "a number", {"max_grad_norm": None}, error=TypeError),
    "no prompt in a batch": Case("per_device_train_batch_size=0", "at least 1", {"per_device_train_batch_size": 0}),
    "no prompt in a batch of evaluation": Case("per_device_eval_batch_size=-1", "at least 1", {"per_device_eval_batch_size": -1}),
    "a seed below 0": Case("seed=-1", "from 0 to 4294967295", {"seed": -1}),
    "a seed of 33 bits": Case("seed=4294967296", "from 0 to 4294967295", {"seed": 2**32}),
    "workers below 0": Case("dataloader_num_workers=-1", "pass 0 for none", {"dataloader_num_workers": -1}),
    "a negative rate": Case("learning_rate=-0.1", "finite number ≥ 0", {"learning_rate": -0.1}),
    "an infinite rate": Case("learning_rate=inf", "finite number ≥ 0", {"learning_rate": float("inf")}),
    "epochs without end": Case(
        "num_train_epochs=inf would never end", "or max_steps", {"max_steps": -1, "num_train_epochs": float("inf")}
    ),
    "a share of more than all": Case("logging_steps=2.5", "number below 1", {"logging_steps": 2.5}),
    "a log line never": Case("logging_steps=inf", "number below 1", {"logging_steps": float("inf")}),
    "learning rate as text": Case("learning_rate='1e-4'", "a number", {"learning_rate": "1e-4"}, error=TypeError),
    "weights as text": Case("reward_weights='1.0'", "a list of numbers or None", {"reward_weights": "1.0"}, error=TypeError),
    "weights in a tuple": Case(
        "reward_weights=(1.0,) is of type tuple", "a list of numbers", {"reward_weights": (1.0,)}, error=TypeError
    ),
    "a weight as text": Case(
        "reward_weights=['1.0'] is of type list of str", "a list of numbers", {"reward_weights": ["1.0"]}, error=TypeError
    ),
    "no folder": Case("output_dir=''", "output_dir='out'", {"output_dir": ""}),
    "a blank folder": Case("output_dir='  '", "output_dir='out'", {"output_dir": "  "}),
    "a number for a folder": Case("output_dir=1 is of type int", "a folder", {"output_dir": 1}, error=TypeError),
    "output_dir is a file": Case("output_dir=", "folder you may write to", {"output_dir": "FILE"}),
    "no prompt column": Case("['caption']", "'prompt' column", trainer={"train_dataset": Dataset.from_dict({"caption": ["a"]})}),
    "no prompt in streamed rows": Case(
        "['caption']", "'prompt' column", trainer={"train_dataset": streamed_rows([{"caption": "a"}])}
    ),
    "empty dataset": Case("no row", "at least one", trainer={"train_dataset": Dataset.from_dict({"prompt": []})}),
    "prompt not a string": Case("int", "string", trainer={"train_dataset": Dataset.from_dict({"prompt": [1, 2]})}),
    "no dataset": Case("train_dataset is missing", "a row for each prompt", trainer={"train_dataset": None}),
    "detached reward": Case("'detached' is not differentiable", "remove", trainer={"reward_funcs": detached}),
    "one reward for all": Case("'one_number' returned shape ()", "(2,)", trainer={"reward_funcs": one_number}),
    "reward returns a list": Case("'python_float'", "tensor", trainer={"reward_funcs": python_float}, error=TypeError),
    "reward not callable": Case("0.5", "callables", trainer={"reward_funcs": [brightness, 0.5]}, error=TypeError),
    "a class of rewards": Case(
        "the class PickScore", "an instance, PickScore()", trainer={"reward_funcs": PickScore}, error=TypeError
    ),
    "no reward": Case("reward_funcs is empty", "at least one", trainer={"reward_funcs": []}),
    "weights do not match": Case("2 entries for 1", "one each", {"reward_weights": [1.0, 2.0]}),
    "model of another kind": Case("Linear", "DiffusionPipeline", trainer={"model": torch.nn.Linear(1, 1)}, error=TypeError),
    "few-step scheduler": Case(
        "LCMScheduler", "use a model that is sampled with", trainer={"model": lambda: sd15_with(LCMScheduler())}
    ),
    "LoRA without attention": Case(
        "no_such_layer", "target_modules", trainer={"peft_config": lora(target_modules=["no_such_layer"])}
    ),
    "LoRA of a regex for no layer": Case(
        "SD3Transformer2DModel cannot take this LoRA", "target_modules", trainer={"peft_config": lora(target_modules="no_such.*")}
    ),
    "LoRA of a norm": Case(
        "module AdaLayerNormZero(", "linear or convolution", trainer={"peft_config": lora(target_modules=["norm1"])}
    ),
    "LoRA of rank 0": Case("rank 0", "1 or more", trainer={"peft_config": LoraConfig(r=0)}),
    "LoRA of a broken rank": Case("rank 2.5", "a whole number", trainer={"peft_config": LoraConfig(r=2.5)}, error=TypeError),
    "LoRA of a rank in text": Case(
        "rank '4'", "a whole number", trainer={"peft_config": lora(rank_pattern={"to_q": "4"})}, error=TypeError
    ),
    "LoRA of no strength": Case("lora_alpha 0", "other than 0", trainer={"peft_config": lora(lora_alpha=0)}),
    "LoRA of a strength in text": Case(
        "lora_alpha '8'", "a number", trainer={"peft_config": lora(alpha_pattern={"to_q": "8"})}, error=TypeError
    ),
    "no place for a state": Case("NoStart has no prepare_latents", "pass a pipeline", trainer={"model": no_start}),
    "no scheduler": Case("has no scheduler", "scheduler.step", trainer={"model": lambda: without("scheduler")}),
    "guidance without guidance": Case(
        "takes no guidance_scale", "leave it at 1", {"guidance_scale": 3.0}, {"model": unconditional, "peft_config": None}
    ),
    "no such denoiser": Case("no denoiser 'transformer_2'", "one of transformer", {"trained_component": "transformer_2"}),
    "resolution not divisible": Case("divisible", "17", {"pipeline_kwargs": {"height": 17, "width": 16}}),
    "misspelt column": Case(
        "'negativ_prompt'",
        "'negative_prompt'",
        trainer={"train_dataset": Dataset.from_dict({"prompt": ["a"], "negativ_prompt": ["b"]})},
    ),
    "column for all samples": Case(
        "'height'", "pipeline_kwargs", trainer={"train_dataset": Dataset.from_dict({"prompt": ["a"], "height": [32]})}
    ),
    "column that is an option": Case(
        "'num_inference_steps'",
        "rename",
        trainer={"train_dataset": Dataset.from_dict({"prompt": ["a"], "num_inference_steps": [5]})},
    ),
    "no prompt in the evaluation": Case(
        "rows of the eval_dataset have columns ['caption']",
        "'prompt' column",
        trainer={"eval_dataset": streamed_rows([{"caption": "a"}])},
    ),
    "evaluation without a column": Case(
        "eval_dataset has no column 'negative_prompt'",
        "add it",
        trainer={
            "train_dataset": Dataset.from_dict({"prompt": ["a"], "negative_prompt": ["b"]}),
            "eval_dataset": Dataset.from_dict({"prompt": ["a"]}),
        },
    ),
    "misspelt column of the evaluation": Case(
        "'negativ_prompt'",
        "'negative_prompt'",
        trainer={"eval_dataset": Dataset.from_dict({"prompt": ["a"], "negativ_prompt": ["b"]})},
    ),
    "callback": Case("'callback_on_step_end'", "remove it", {"pipeline_kwargs": {"callback_on_step_end": print}}),
    "adapter of ours there already": Case(
        "already carries an adapter 'adjoint'", "fuse_lora", trainer={"model": lambda: sd3_with_adapter("adjoint")}
    ),
    "fused adapter": Case("carries a fused adapter", "unload_lora_weights()", trainer={"model": sd3_with_fused_adapter}),
    "all weights below an adapter": Case(
        "has adapters", "unload_lora_weights()", trainer={"model": sd3_with_adapter, "peft_config": None}
    ),
    "LoRA on biases": Case("bias='all'", "bias='none'", trainer={"peft_config": lora(bias="all")}),
    "LoRA and saved modules": Case(
        "modules_to_save", "leave it out", trainer={"peft_config": lora(modules_to_save=["proj_out"])}
    ),
    "LoRA that rewrites the base": Case(
        "init_lora_weights='pissa'", "'gaussian'", trainer={"peft_config": lora(init_lora_weights="pissa")}
    ),
    "all weights of a bf16 network": Case(
        "torch.bfloat16", "float32", trainer={"model": lambda: sd3().to(torch.bfloat16), "peft_config": None}
    ),
    "all weights, stored in 16 bits": Case(
        "torch.bfloat16", "float32", trainer={"model": lambda: stored_as(torch.bfloat16), "peft_config": None}
    ),
    "all weights, stored in 8 bits": Case(
        "holds weights of torch.float8_e4m3fn",
        "pass a peft_config",
        trainer={"model": lambda: stored_as(torch.float8_e4m3fn), "peft_config": None},
    ),
    "all weights, quantised": Case(
        "holds weights of torch.int8",
        "pass a peft_config",
        trainer={"model": lambda: quantised(rounds_inputs=False), "peft_config": None},
    ),
    "column named as an argument": Case(
        "'images'", "rename", trainer={"train_dataset": Dataset.from_dict({"prompt": ["a"], "images": ["b"]})}
    ),
    "reward without the columns": Case(
        "'other_arguments' cannot be called",
        "the missing columns",
        trainer={"reward_funcs": other_arguments, "train_dataset": Dataset.from_dict({"prompt": ["a"], "target": [1]})},
    ),
    "checkpoint without weights": Case(
        "holds no pytorch_lora_weights.safetensors", "checkpoint folder", train={"resume_from_checkpoint": "FOLDER"}
    ),
    "full checkpoint without weights": Case(
        "holds no transformer", "checkpoint folder", trainer={"peft_config": None}, train={"resume_from_checkpoint": "FOLDER"}
    ),
    "checkpoint without progress": Case(
        "holds no trainer_state.json", "checkpoint folder", train={"resume_from_checkpoint": "WEIGHTS"}
    ),
    "a number to resume": Case(
        "resume_from_checkpoint=3 is of type int", "pass a folder", train={"resume_from_checkpoint": 3}, error=TypeError
    ),
    "no name to resume": Case("resume_from_checkpoint=''", "pass a checkpoint folder", train={"resume_from_checkpoint": ""}),
    "a folder that no system can have": Case("cannot be written", "may write to", {"output_dir": "a\0b"}),
    "nothing to resume": Case("holds no checkpoint", "None to start a new run", train={"resume_from_checkpoint": True}),
    "reward of something else": Case(
        "'own_parameter' does not depend on the images", "compute it from them", trainer={"reward_funcs": own_parameter}
    ),
    "reward of something else beside another": Case(
        "'own_parameter' does not depend on the images",
        "compute it from them",
        trainer={"reward_funcs": [brightness, own_parameter]},
    ),
    "reward is not a function of images=": Case("'positional' cannot be called", "images=", trainer={"reward_funcs": positional}),
    "weight not a number": Case("reward_weights=[nan]", "finite", {"reward_weights": [float("nan")]}),
    "guidance not a number": Case("guidance_scale=nan", "pass 1", {"guidance_scale": float("nan")}),
    "no accumulation": Case("gradient_accumulation_steps=0", "at least 1", {"gradient_accumulation_steps": 0}),
    "no update": Case("max_steps=0 makes no update", "positive", {"max_steps": 0}),
    "no epoch": Case("num_train_epochs=0 makes no update", "positive", {"max_steps": -1, "num_train_epochs": 0}),
    "no whole batch": Case(
        "2 rows, fewer than the 4 of a batch",
        "lower per_device_train_batch_size",
        {"dataloader_drop_last": True, "max_steps": -1},
    ),
    "a LoRA scale that checkpointed layers lose": Case(
        "cannot be trained with gradient checkpointing",
        "set lora_alpha instead",
        {"gradient_checkpointing": True, "pipeline_kwargs": {"joint_attention_kwargs": {"scale": 0.5}}},
    ),
    "columns taken away": Case("remove_unused_columns=True", "leave it out", {"remove_unused_columns": True}),
    "an empty cell": Case(
        "prompt 1 is of type NoneType",
        "a string in each row",
        trainer={"train_dataset": Dataset.from_dict({"prompt": ["a", None]})},
    ),
    "one of several evaluations without prompts": Case(
        "['caption']",
        "'prompt' column",
        trainer={"eval_dataset": {"good": prompts_only(), "bad": Dataset.from_dict({"caption": ["a"]})}},
    ),
    "adapter of a text encoder below all weights": Case(
        "the text_encoder has adapters", "unload_lora_weights()", trainer={"model": text_adapter, "peft_config": None}
    ),
    "CLI: no model": Case(
        "model_name_or_path is missing", "folder of a diffusers pipeline", cli=["--dataset_name", "prompts.txt"]
    ),
    "CLI: unknown option": Case("unknown options --lerning_rate", "--help-all lists", cli=[*MODEL, "--lerning_rate", "1"]),
    "CLI: not a number": Case("invalid float value: 'big'", "--learning_rate", cli=[*MODEL, "--learning_rate", "big"]),
    "CLI: unknown mode": Case("invalid choice: 'both'", "'none', 'rollout', 'full'", cli=[*MODEL, "--cfg_mode", "both"]),
    "CLI: bad setting": Case("num_inference_steps=1 is too few", "at least 2", cli=[*MODEL, "--num_inference_steps", "1"]),
    "CLI: no recipe": Case("No such file", "missing.yaml", cli=["--config", "missing.yaml"]),
    "CLI: language model's option": Case("load_in_4bit", "leave it out", cli=[*MODEL, "--load_in_4bit", "true"]),
    "CLI: unknown dtype": Case("dtype='auto'", "bfloat16", cli=[*MODEL, "--dtype", "auto"]),
    "CLI: no reward": Case("reward_funcs is missing", "PickScore", cli=[*MODEL, *DATA]),
    "CLI: unknown reward": Case("reward 'Beauty'", "module:function", cli=[*MODEL, *DATA, "--reward_funcs", "Beauty"]),
    "CLI: no such reward module": Case("no module 'nowhere'", "file.py", cli=[*MODEL, *DATA, "--reward_funcs", "nowhere:f"]),
    "CLI: no dataset": Case("dataset_name is missing", "file of prompts", cli=[*MODEL, *REWARD]),
    "CLI: missing prompts": Case("'gone.txt' does not exist", "pass a file", cli=[*MODEL, *REWARD, "--dataset_name", "gone.txt"]),
    "CLI: missing model": Case(
        "model_name_or_path='nowhere' cannot be loaded",
        "name or folder of a pipeline",
        cli=[MODEL[0], "nowhere", *DATA, *REWARD],
    ),
}


def refused_by_the_command(options, capsys):
    """What is said instead of a traceback; the exit status is that of a bad option, 2, or of a bad input, 1."""
    try:
        status = main(["train", *options])
    except SystemExit as end:
        status = end.code
    assert status in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert "error: " in said[-1] and not any("Traceback" in line for line in said)
    return said[-1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_refused_before_any_rollout_in_one_sentence(tmp_path, case, monkeypatch, capsys):
    def rollout(*args, **kwargs):
        raise AssertionError("a rollout was started")

    monkeypatch.setattr(diffusers_adjoint.model.chain, "sample_trajectory", rollout)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "pytorch_lora_weights.safetensors").touch()
    if case.cli:
        sentence = refused_by_the_command(case.cli, capsys)
        assert case.says in sentence and case.cure in sentence
        return
    settings = {
        "output_dir": str(tmp_path / "out"),
        "num_inference_steps": 4,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    settings |= case.args
    if settings["output_dir"] == "FILE":
        settings["output_dir"] = str(tmp_path / "file")
    folders = {"FOLDER": str(tmp_path / "folder"), "WEIGHTS": str(tmp_path / "weights")}
    train = {name: folders.get(value, value) for name, value in case.train.items()}
    given = {"model": sd3, "reward_funcs": brightness, "train_dataset": prompts_only(), "peft_config": lora()} | case.trainer
    if callable(given["model"]) and not isinstance(given["model"], torch.nn.Module):
        given["model"] = given["model"]()

    with pytest.raises(case.error) as caught:
        AdjointMatchingTrainer(args=AdjointMatchingConfig(**settings), **given).train(**train)
    sentence = str(caught.value)
    assert case.says in sentence and case.cure in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_lora_is_refused_where_none_can_go():
    with pytest.raises(ValueError, match="UNet2DModel has no add_adapter; pass peft_config=None"):
        add_lora(unconditional(), "unet", lora())


@pytest.mark.parametrize("args", [TrainingArguments("out", use_cpu=True, report_to="none"), {"output_dir": "out"}, "out"])
def test_settings_of_another_kind_are_refused(args):
    with pytest.raises(TypeError, match=f"^args is of type {type(args).__name__}; pass an AdjointMatchingConfig, .*\\.$"):
        AdjointMatchingTrainer(sd3(), brightness, args, prompts_only(), peft_config=lora())


def test_the_same_call_without_a_mistake_trains(tmp_path):
    """So that the cases above fail for their own reason."""
    args = AdjointMatchingConfig(output_dir=str(tmp_path), num_inference_steps=4, max_steps=1, report_to="none", use_cpu=True)
    trainer = AdjointMatchingTrainer(sd3(), brightness, args, prompts_only(), peft_config=lora())
    assert trainer.train().global_step == 1
