"""Quantised bases: weights alone train, quantised activations are refused by name."""

import pytest
import torch
from peft import LoraConfig
from test_replay_selfcheck import check, expect
from tiny_pipelines import sd3
from tiny_trainer import make_trainer, weights
from torch import nn

from diffusers_adjoint.lora import add_lora
from diffusers_adjoint.replay.quantised import quantisation_of


class Int8Linear(nn.Module):
    """A linear layer of int8 weights; with `rounds_inputs` its inputs are rounded to int8 too, as dynamic quantisation does."""

    def __init__(self, linear, rounds_inputs):
        super().__init__()
        self.in_features, self.out_features, self.rounds_inputs = linear.in_features, linear.out_features, rounds_inputs
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        if self.rounds_inputs:
            step = x.detach().abs().amax() / 127
            x = (x / step).round() * step
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantised(rounds_inputs):
    pipeline = sd3()
    for module in list(pipeline.transformer.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(layer, rounds_inputs))
    return pipeline


def test_quantised_weights_pass():
    check(quantised(rounds_inputs=False))


def test_quantised_activations_are_named():
    expect(
        r"differs from finite differences by [\d.]+%; load its transformer unquantised .it holds weights of torch.int8., or in a "
        "scheme with a gradient, such as torchao's Int8WeightOnlyConfig",
        quantised(rounds_inputs=True),
    )


class Packed(torch.Tensor):
    """A tensor class of a quantisation library."""

    @classmethod
    def of(cls, values):
        return values.as_subclass(cls)


def holding(weight, **options):
    network = nn.Linear(2, 2)
    network.weight = nn.Parameter(weight, requires_grad=False)
    for name, value in options.items():
        setattr(network, name, value)
    return nn.Sequential(nn.Linear(2, 2), network)


class ConfigOfGPTQ:
    quantization_config = {"quant_method": "gptq"}


@pytest.mark.parametrize(
    ("network", "stored"),
    [
        (holding(Packed.of(torch.ones(2, 2))), "weights of class Packed"),
        (holding(torch.ones(2, 2, dtype=torch.uint8)), "weights of torch.uint8"),
        (holding(torch.ones(2, 2).to(torch.float8_e4m3fn)), "weights of torch.float8_e4m3fn"),
        (holding(torch.ones(2, 2), config=ConfigOfGPTQ()), "weights quantised as its quantization_config says"),
    ],
)
def test_what_counts_as_quantised(network, stored):
    assert quantisation_of(network) == stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not(dtype):
    pipeline = sd3().to(dtype)
    add_lora(pipeline, "transformer", LoraConfig(r=2))
    assert quantisation_of(pipeline.transformer) is None
    assert quantisation_of(pipeline.text_encoder) is None  # its buffers hold integers


SCHEMES = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao(scheme, tmp_path):
    """The rows of docs/pipelines.md, where torchao is installed."""
    quantization = pytest.importorskip("torchao.quantization")

    def build():
        pipeline = sd3()
        quantization.quantize_(pipeline.transformer, getattr(quantization, scheme)())
        return pipeline

    if "Dynamic" in scheme:
        expect(r"differs from finite differences by [\d.]+%; load its transformer unquantised", build())
        return
    pipeline = build()
    trainer = make_trainer(tmp_path, pipeline=pipeline)
    trainer.train()
    assert all(value.any() for name, value in weights(trainer).items() if "lora_B" in name)
    trainer.save_model(tmp_path)
    fresh = build()
    fresh.load_lora_weights(tmp_path)
    state = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500.0])}
    state |= {"encoder_hidden_states": torch.randn(1, 3, 32), "pooled_projections": torch.randn(1, 64)}
    with torch.no_grad():
        tuned, loaded, base = (
            network(**state).sample for network in (pipeline.transformer, fresh.transformer, build().transformer)
        )
        pipeline.transformer.disable_adapters()
        assert torch.equal(pipeline.transformer(**state).sample, base)
    assert torch.equal(loaded, tuned)
    assert (tuned - base).abs().max() > 1e-4
