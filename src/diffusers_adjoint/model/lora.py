"""LoRA on a diffusers denoiser: attach, switch off, save in diffusers' format, load for resuming.

If the pipeline's class cannot save a LoRA of the denoiser, the network saves it, and `network.load_lora_adapter` loads it.
Adapters that the pipeline was loaded with are not changed: they belong to the base.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, logging
from peft import LoraConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .sharding import gathered, spread_like

__all__ = ["ADAPTER", "adapter_off", "add_lora", "load_lora", "load_saved_lora", "pipeline_saves_lora", "save_lora"]

logger = logging.get_logger(__name__)

ADAPTER = "adjoint"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# Options of a LoraConfig that saving and loading preserves (tests/test_lora_files.py), and those that have no effect here.
CARRIED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"}
CARRIED |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
UNUSED = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
UNUSED |= {"lora_dropout", "init_lora_weights", "bias", "modules_to_save", "runtime_config"}
WEIGHTS_OF_A_LAYER = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")  # of a linear or convolution layer
_OTHER_TARGETS = (
    "set LoraConfig(target_modules=…) to linear or convolution layers it has, or pass peft_config=None for full fine-tuning."
)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(pipeline: DiffusionPipeline, component: str, peft_config: LoraConfig) -> list[str]:
    """Attach a LoRA adapter in float32 to the pipeline's frozen denoiser, in place.

    Dropout is set to 0, because rollout, adjoint and loss must use the same function. Without `target_modules`, the attention
    projections get a LoRA.

    Args:
        pipeline: the pipeline.
        component: name of its denoiser.
        peft_config: the LoRA.

    Returns:
        Names of the adapters that were active before. They stay active and frozen, as a part of the base.

    Raises:
        TypeError: if `peft_config` is not a LoraConfig, or its rank or lora_alpha is not a number.
        ValueError: if rank or lora_alpha would train nothing; if the network takes no adapters, has a fused one, or has none of
            the target modules; or if the adapter would change the base, or could not be loaded from its file.
    """
    network = getattr(pipeline, component)
    name = type(network).__name__
    _require_lora(peft_config)
    _require_numbers(peft_config)
    if not isinstance(network, PeftAdapterMixin):
        raise ValueError(f"{name} has no add_adapter; pass peft_config=None for full fine-tuning.")
    _require_untouched_base(peft_config)
    _require_loadable(peft_config)
    base_adapters = _active_adapters(network)
    config = copy.copy(peft_config)
    config.target_modules = config.target_modules or list(ATTENTION)
    if not isinstance(config.target_modules, str) and not _any_module(network, config.target_modules):
        raise ValueError(f"{name} has no module named {', '.join(sorted(config.target_modules))}; {_OTHER_TARGETS}")
    if config.lora_dropout:
        logger.warning(
            f"lora_dropout={config.lora_dropout} is set to 0, because rollout, adjoint and loss must use the same function."
        )
        config.lora_dropout = 0.0
    network.requires_grad_(False)
    _attach(network, config, base_adapters)
    cast_training_params(network, torch.float32)
    _switch_on(network, base_adapters)
    return base_adapters


def _attach(network: PeftAdapterMixin, config: LoraConfig, base_adapters: list[str]) -> None:
    """Call `add_adapter`, and restore the network if PEFT raises an error, possibly after it has changed some layers."""
    try:
        network.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        if not hasattr(network, "peft_config"):  # it had no adapter before
            network.unload_lora()
        else:
            network.delete_adapters(ADAPTER)
            network.set_adapter(base_adapters) if base_adapters else network.disable_adapters()
            network.requires_grad_(False)
        reason = shorten(str(error), 200, placeholder=" …").rstrip(".")
        raise ValueError(f"{type(network).__name__} cannot take this LoRA ({reason}); {_OTHER_TARGETS}") from error


def _active_adapters(network: PeftAdapterMixin) -> list[str]:
    """Names of the adapters that change the network's output now."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    name = type(network).__name__
    if any(layer.merged for layer in layers):
        raise ValueError(
            f"{name} carries a fused adapter; call unload_lora_weights() after fuse_lora(), or its own unload_lora()."
        )
    if network._hf_peft_config_loaded and ADAPTER in network.peft_config:
        raise ValueError(
            f"{name} already carries an adapter {ADAPTER!r}; call delete_adapters({ADAPTER!r}), or fuse_lora() and "
            f"unload_lora_weights() to train on top of it."
        )
    if not network._hf_peft_config_loaded or all(layer.disable_adapters for layer in layers):
        return []
    active: list[str] = network.active_adapters()
    return active


def pipeline_saves_lora(pipeline_class: type[DiffusionPipeline], component: str) -> bool:
    """Whether the pipeline can save and load a LoRA of this component; otherwise its network does."""
    method = getattr(pipeline_class, "save_lora_weights", None)
    needed = {f"{_saved_as(component)}_lora_layers", f"{_saved_as(component)}_lora_adapter_metadata"}
    return method is not None and needed <= inspect.signature(method).parameters.keys()


def _saved_as(component: str) -> str:
    """The name under which diffusers saves a component's LoRA: a second transformer's like the first's."""
    return component.removesuffix("_2")


def _require_lora(config: Any) -> None:
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise TypeError(f"peft_config is a {type(config).__name__}; pass a peft.LoraConfig, or None for full fine-tuning.")


def _require_numbers(config: LoraConfig) -> None:
    """Check ranks and lora_alpha: with bad ones PEFT fails half-way, and with lora_alpha 0 nothing is trained."""
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if not isinstance(rank, Integral):
            raise TypeError(f"LoraConfig has the rank {rank!r}; pass a whole number of 1 or more.")
        if rank < 1:
            raise ValueError(f"LoraConfig has the rank {rank!r}; pass 1 or more.")
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not isinstance(alpha, Real):
            raise TypeError(f"LoraConfig has the lora_alpha {alpha!r}; pass a number.")
        if not math.isfinite(alpha) or alpha == 0:
            raise ValueError(f"LoraConfig has the lora_alpha {alpha!r}; pass a finite number other than 0.")


def _require_loadable(config: LoraConfig) -> None:
    """Refuse options that the saved file does not contain, or with which samples of a batch depend on each other."""
    plain = LoraConfig()
    for name in {field.name for field in dataclasses.fields(LoraConfig)} - CARRIED - UNUSED:
        if (value := getattr(config, name)) != getattr(plain, name):
            raise ValueError(
                f"LoraConfig({name}={value!r}) is not supported, because the file of a saved LoRA does not contain it; "
                f"leave it out."
            )


def _require_untouched_base(config: LoraConfig) -> None:
    """Refuse options that change the network outside the adapter: without the adapter it would not be the base."""
    if config.bias != "none":
        raise ValueError(f"LoraConfig(bias={config.bias!r}) trains weights of the base itself; pass bias='none'.")
    if config.modules_to_save:
        raise ValueError(f"LoraConfig(modules_to_save={config.modules_to_save!r}) copies weights of the base; leave it out.")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) rewrites the base's weights; pass True or 'gaussian'."
        )


def _any_module(network: nn.Module, targets: list[str] | set[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for name, _ in network.named_modules() for target in targets)


@contextmanager
def adapter_off(network: PeftAdapterMixin, base_adapters: list[str]) -> Iterator[None]:
    """Within this context the network is the base: its weights and its own adapters, without the trained one."""
    if base_adapters:
        network.set_adapter(base_adapters)
    else:
        network.disable_adapters()
    try:
        yield
    finally:
        _switch_on(network, base_adapters)


def _switch_on(network: PeftAdapterMixin, base_adapters: list[str]) -> None:
    """Activate the trained adapter on top of the base's frozen adapters."""
    if not base_adapters:
        network.enable_adapters()
        return
    network.set_adapter([*base_adapters, ADAPTER])
    for name, parameter in network.named_parameters():  # PEFT makes every active adapter trainable
        parameter.requires_grad_(f".{ADAPTER}." in f".{name}.")


def save_lora(pipeline: DiffusionPipeline, component: str, folder: str | Path, *, write: bool = True) -> None:
    """Write `pytorch_lora_weights.safetensors`, with alpha, in diffusers' format.

    If `pipeline_saves_lora`, `pipeline.load_lora_weights(folder)` loads it. Otherwise it is the file of
    `network.save_lora_adapter`, and `network.load_lora_adapter(folder, prefix=None, weight_name=…)` loads it.

    The weights keep PEFT's names. diffusers has older names for attention layers only, and decides by the first name in a file
    which of the two it uses; of a UNet's file with both it would lose the attention layers.

    Args:
        pipeline: its `component` has the trained adapter.
        component: name of the denoiser, "transformer" or "unet"; "transformer_2" is read back by
            `load_lora_weights(folder, load_into_transformer_2=True)`.
        folder: created if missing.
        write: `False` on processes that only contribute their part of divided weights.

    Raises:
        OSError: if the written file does not contain the adapter's weights under their names.
    """
    network = getattr(pipeline, component)
    weights = gathered(get_peft_model_state_dict(network, adapter_name=ADAPTER), keep=write)
    if not write:
        return
    # Without the metadata diffusers assumes alpha = r, and loads the LoRA with the wrong strength without an error.
    metadata = network.peft_config[ADAPTER].to_dict()
    if pipeline_saves_lora(type(pipeline), component):
        name = _saved_as(component)
        options = {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": metadata}
        type(pipeline).save_lora_weights(str(folder), **options)
        expected = {f"{name}.{key}" for key in weights}
    else:
        _write_as_the_network(weights, metadata, folder)
        expected = set(weights)
    file = Path(folder) / WEIGHTS_NAME
    with safe_open(file, "pt") as saved:
        if set(saved.keys()) != expected:
            raise OSError(
                f"{file} does not hold the weights of the adapter under their names; the installed diffusers renames them."
            )


def _write_as_the_network(weights: dict[str, Tensor], metadata: dict[str, Any], folder: str | Path) -> None:
    """Write the file of `network.save_lora_adapter`; that method would write this process's part of divided weights only."""
    LoraBaseMixin.write_lora_layers(
        state_dict=weights,
        save_directory=str(folder),
        is_main_process=True,
        weight_name=WEIGHTS_NAME,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata=metadata,
    )


def _is_the_networks(file: Path) -> bool:
    """Whether a network saved this file and not a pipeline, which writes the adapter's settings under the component's name."""
    with safe_open(file, "pt") as saved:
        metadata = (saved.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    return metadata is not None and "r" in json.loads(metadata)


def read_lora(file: Path, unet: nn.Module | None) -> dict[str, Tensor]:
    """The weights in a file of `save_lora`; names that an earlier version changed are replaced by PEFT's.

    Args:
        file: the file. If a pipeline saved it, its names begin with the component's.
        unet: the network if it is a UNet, else `None`: the earlier version changed the names of UNets only.

    Raises:
        ValueError: if the file is missing.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no {file.name}; pass a checkpoint folder written by this trainer.")
    names = {} if unet is None else _names_by_older_ones(unet)
    return {names.get(name, name): value for name, value in load_file(file).items()}


def _names_by_older_ones(unet: nn.Module) -> dict[str, str]:
    """Name that the earlier version wrote → PEFT's name, for every weight that a LoRA of this UNet can have.

    It uses that version's own function, which cannot be inverted by a rule: it removed "processor", and had two names for a
    matrix.
    """
    modules = [name for name, _ in unet.named_modules()]
    names = [f"unet.{module}.{weight}" for module in modules for weight in WEIGHTS_OF_A_LAYER]
    older: dict[str, str] = convert_state_dict_to_diffusers({name: name for name in names})
    return older


def load_lora(network: nn.Module, component: str, folder: str | Path) -> None:
    """Load what `save_lora` wrote into the adapter that is already attached, exactly.

    Raises:
        ValueError: if the file is missing or belongs to another adapter.
    """
    file = Path(folder) / WEIGHTS_NAME
    read = read_lora(file, network if component == "unet" else None)
    prefix = "" if _is_the_networks(file) else f"{_saved_as(component)}."
    weights = {key.removeprefix(prefix): value for key, value in read.items()}
    expected = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    if weights.keys() != expected.keys() or any(weights[key].shape != expected[key].shape for key in expected):
        raise ValueError(f"{file} does not fit the trained adapter; resume with the peft_config it was trained with.")
    set_peft_model_state_dict(network, spread_like(weights, expected), adapter_name=ADAPTER)


def load_saved_lora(pipeline: DiffusionPipeline, component: str, file: Path, adapter_name: str | None = None) -> None:
    """Load a file of `save_lora`, of any version, into a pipeline by diffusers' own methods.

    Args:
        pipeline: a pipeline without this adapter.
        component: name of the denoiser that the LoRA belongs to.
        file: the file.
        adapter_name: name of the new adapter in the pipeline.

    Raises:
        ValueError: if neither the pipeline nor its network can load a LoRA.
    """
    network = getattr(pipeline, component)
    if _is_the_networks(file):
        if not isinstance(network, PeftAdapterMixin):
            raise ValueError(f"{type(network).__name__} takes no LoRA")
        network.load_lora_adapter(str(file.parent), prefix=None, weight_name=file.name, adapter_name=adapter_name)
        return
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{type(pipeline).__name__} takes no LoRA of this form, only one that its network saved")
    options: dict[str, Any] = {"load_into_transformer_2": True} if component == "transformer_2" else {}
    with tempfile.TemporaryDirectory() as folder, safe_open(file, "pt") as saved:
        names, metadata = set(saved.keys()), saved.metadata()
        weights = read_lora(file, getattr(pipeline, "unet", None))
        if weights.keys() != names:  # diffusers' reader would drop a part of them
            file = Path(folder) / WEIGHTS_NAME
            save_file(weights, file, metadata)
        options |= {"weight_name": file.name, "use_safetensors": True, "adapter_name": adapter_name}
        pipeline.load_lora_weights(str(file.parent), **options)
