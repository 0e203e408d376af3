"""Tiny, randomly initialised reward models of real transformers classes, saved as the published ones are."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_pipelines import TEXT_WIDTH, clip_config, clip_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

__all__ = ["IMAGE_SIZE", "tiny_clip"]

IMAGE_SIZE = 12


def tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPModel that sees 12 × 12 pixels and 16 tokens, its tokenizer and its image processor; returns `folder`."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_size=16,
        projection_dim=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    text = clip_config(tokenizer)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder
