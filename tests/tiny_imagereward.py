"""A tiny checkpoint with random weights in the layout that ImageReward is published in: names, shapes and files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer

__all__ = ["HEADS", "IMAGE_SIZE", "LAYERS", "tiny_imagereward", "tiny_weights"]

IMAGE_SIZE, PATCH = 16, 8
VISION_WIDTH, TEXT_WIDTH, HEADS = 128, 24, 3  # two attention heads of 64 channels in the vision tower, three of 8 in the text's
LAYERS = 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "the", "sea", "red", "house", "##s", "[", "]", "enc"]
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "model_type": "bert",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + 2,  # [DEC] and [ENC] come on top, as BLIP adds them
    "encoder_width": 768,  # wrong for this vision tower, as in the published file
    "add_cross_attention": True,
}


def tiny_imagereward(folder: Path) -> Path:
    """ImageReward.pt and med_config.json in `folder`, a tokenizer of a few words in its folder "bert"; returns `folder`."""
    torch.save(tiny_weights(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder / "bert")
    return folder


def tiny_weights(*, seed: int = 0) -> dict[str, Tensor]:
    """Of unit gain, so that every part moves the score; float32."""
    random = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, scale: float = 1.0) -> None:
        weights[name] = scale * torch.randn(shape, generator=random)

    def linear(name: str, inputs: int, outputs: int) -> None:
        normal(f"{name}.weight", outputs, inputs, scale=inputs**-0.5)
        normal(f"{name}.bias", outputs, scale=0.3)

    def norm(name: str, width: int) -> None:
        normal(f"{name}.weight", width)
        normal(f"{name}.bias", width, scale=0.3)

    def attention(name: str, states: int) -> None:
        linear(f"{name}.self.query", TEXT_WIDTH, TEXT_WIDTH)
        linear(f"{name}.self.key", states, TEXT_WIDTH)
        linear(f"{name}.self.value", states, TEXT_WIDTH)
        linear(f"{name}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
        norm(f"{name}.output.LayerNorm", TEXT_WIDTH)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    normal(f"{vision}.cls_token", 1, 1, VISION_WIDTH)
    normal(f"{vision}.pos_embed", 1, 1 + (IMAGE_SIZE // PATCH) ** 2, VISION_WIDTH)
    normal(f"{vision}.patch_embed.proj.weight", VISION_WIDTH, 3, PATCH, PATCH, scale=0.1)
    normal(f"{vision}.patch_embed.proj.bias", VISION_WIDTH)
    for block in (f"{vision}.blocks.{number}" for number in range(LAYERS)):
        norm(f"{block}.norm1", VISION_WIDTH)
        linear(f"{block}.attn.qkv", VISION_WIDTH, 3 * VISION_WIDTH)
        linear(f"{block}.attn.proj", VISION_WIDTH, VISION_WIDTH)
        norm(f"{block}.norm2", VISION_WIDTH)
        linear(f"{block}.mlp.fc1", VISION_WIDTH, 96)
        linear(f"{block}.mlp.fc2", 96, VISION_WIDTH)
    norm(f"{vision}.norm", VISION_WIDTH)

    weights[f"{text}.embeddings.position_ids"] = torch.arange(MED_CONFIG["max_position_embeddings"])[None]
    normal(f"{text}.embeddings.word_embeddings.weight", MED_CONFIG["vocab_size"], TEXT_WIDTH)
    normal(f"{text}.embeddings.position_embeddings.weight", MED_CONFIG["max_position_embeddings"], TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for layer in (f"{text}.encoder.layer.{number}" for number in range(LAYERS)):
        attention(f"{layer}.attention", TEXT_WIDTH)
        attention(f"{layer}.crossattention", VISION_WIDTH)
        linear(f"{layer}.intermediate.dense", TEXT_WIDTH, MED_CONFIG["intermediate_size"])
        linear(f"{layer}.output.dense", MED_CONFIG["intermediate_size"], TEXT_WIDTH)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)

    linear("blip.vision_proj", VISION_WIDTH, 8)
    linear("blip.text_proj", TEXT_WIDTH, 8)
    widths = [TEXT_WIDTH, 20, 16, 12, 8, 1]
    for layer, number in enumerate([0, 2, 4, 6, 7]):
        linear(f"mlp.layers.{number}", widths[layer], widths[layer + 1])
    return weights
