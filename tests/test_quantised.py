"""Quantised bases: weights alone train, quantised activations are refused by name."""

import pytest
import torch
from peft import LoraConfig
from test_replay_selfcheck import check, expect
from tiny_pipelines import sd3
from tiny_trainer import make_trainer, weights
from torch import nn

from diffusers_adjoint.model.lora import add_lora
from diffusers_adjoint.replay.quantised import quantisation_of
from diffusers_adjoint.rewards import gradient_clipped
from diffusers_adjoint.rewards.quantised import gradient_error


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


def quantise(network, rounds_inputs):
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(layer, rounds_inputs))


def quantised(rounds_inputs):
    pipeline = sd3()
    quantise(pipeline.transformer, rounds_inputs)
    return pipeline


def test_quantised_weights_pass():
    check(quantised(rounds_inputs=False))


def test_quantised_activations_are_named():
    expect(
        r"differs from finite differences by [\d.]+%; load its transformer unquantised .it holds weights of torch.int8., or in a "
        "scheme with a gradient, such as torchao's Int8WeightOnlyConfig",
        quantised(rounds_inputs=True),
    )


@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_a_quantised_decoder(rounds_inputs):
    """Its attention is linear layers, and quantised with them; convolutions beside it keep a gradient."""
    pipeline = sd3()
    attention = pipeline.vae.decoder.mid_block.attentions[0]
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight.data.mul_(5)  # random weights hardly use it
    quantise(attention, rounds_inputs)
    if not rounds_inputs:
        check(pipeline)
        return
    expect(
        r"decodes with a derivative that differs from finite differences by [\d.]+%; load its vae unquantised .it holds weights "
        r"of torch.int8.",
        pipeline,
    )


class Scores(nn.Module):
    """A reward whose linear layer stands beside a path that needs none, as in a network with skip connections."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.layer.weight.data.mul_(5)  # random weights hardly do anything
        self.ahead = torch.randn(16, generator=torch.Generator().manual_seed(3))

    def forward(self, images, prompts):
        rows = images.mean((1, 2))
        return (rows + self.layer(rows).tanh()) @ self.ahead


@pytest.mark.parametrize("wrap", [lambda reward: reward, lambda reward: gradient_clipped(reward, 1e-3)], ids=["bare", "clipped"])
@pytest.mark.parametrize("rounds_inputs", [None, False, True])
def test_a_quantised_reward(tmp_path, caplog, rounds_inputs, wrap):
    reward = Scores()
    if rounds_inputs is not None:
        quantise(reward, rounds_inputs)
    make_trainer(tmp_path, reward=wrap(reward), max_steps=1).train()
    told = [message for message in caplog.messages if "differs from finite differences" in message]
    assert len(told) == (rounds_inputs is True)
    if told:
        assert told[0].startswith("reward ") and "holds weights of torch.int8" in told[0]
        assert "; load it unquantised, or with quantised weights only" in told[0]


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 2, 3, 8, 8), (1, 2, 64)])
def test_the_error_of_a_gradient(shape):
    """Against what is known: a quadratic loses nothing, half of a sum loses its share."""
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    a, b = a.cumsum(-1).cumsum(-2), b.cumsum(-1).cumsum(-2)
    x = torch.rand(shape, dtype=torch.float64)
    assert gradient_error(lambda x: (a * x).sum() + (b * x).sum().square(), x) < 1e-9  # central differences are exact here
    assert gradient_error(lambda x: 0 * (x * a).sum() + (b * x.detach()).sum(), x) == pytest.approx(1.0)
    assert gradient_error(lambda x: (a * x).sum() + (b * x.detach()).sum(), x) > 0.2


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
