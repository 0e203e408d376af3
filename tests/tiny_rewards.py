"""Tiny, randomly initialised reward models of real transformers classes, saved as the published ones are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from tiny_pipelines import CLIP_LENGTH, TEXT_WIDTH, clip_config, clip_tokenizer, t5_tokenizer
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

__all__ = [
    "CLASSES",
    "IMAGE_SIZE",
    "TinyOpenCLIP",
    "aesthetic_head",
    "brightness",
    "tiny_classifier",
    "tiny_clip",
    "tiny_open_clip",
    "tiny_siglip",
]

IMAGE_SIZE = 12
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"image_size": IMAGE_SIZE, "patch_size": 4, **TOWER}
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
CLASSES = {0: "cat", 1: "crane", 2: "dog", 3: "crane"}  # ImageNet too has two cranes


def brightness(images, prompts):
    """A reward that takes no columns; the one of `tiny_trainer` takes all."""
    return images.mean((1, 2, 3))


def clip_model() -> CLIPModel:
    vision, text = CLIPVisionConfig(**VISION, projection_dim=TEXT_WIDTH), clip_config(clip_tokenizer())
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPModel that sees 12 × 12 pixels and 16 tokens, its tokenizer and its image processor; returns `folder`."""
    torch.manual_seed(seed)
    clip_model().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE).save_pretrained(folder)
    return folder


def tiny_siglip(folder: Path, *, seed: int = 0) -> Path:
    """A SiglipModel that sees 12 × 12 pixels and 16 tokens, with the scale and bias that SigLIP starts from; returns `folder`."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = CLIP_LENGTH
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_LENGTH, "projection_size": 16, **TOWER}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    model.logit_scale.data.fill_(10.0).log_()
    model.logit_bias.data.fill_(-10.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return folder


def tiny_classifier(folder: Path, *, seed: int = 0, **config) -> Path:
    """A ViTForImageClassification that sees 12 × 12 pixels and knows `CLASSES`; returns `folder`."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(ViTConfig(**VISION, **{"id2label": CLASSES, **config}))
    nn.init.normal_(model.classifier.weight)  # the default is too small for the classes to differ
    model.save_pretrained(folder)
    ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return folder


def aesthetic_head(widths=(TEXT_WIDTH, 8, 6, 5, 4, 1), *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in the layout of sac+logos+ava1-l14-linearMSE.pth."""
    torch.manual_seed(seed)
    pairs = zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True)
    layers = {f"layers.{number}": nn.Linear(before, after) for number, before, after in pairs}
    return {f"{name}.{kind}": value for name, layer in layers.items() for kind, value in layer.state_dict().items()}


class TinyOpenCLIP(nn.Module):
    """What HPSv2 uses of open_clip's model class, around a tiny CLIPModel."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.model = clip_model()
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.visual = nn.Identity()
        self.visual.image_size = (IMAGE_SIZE, IMAGE_SIZE)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids=tokens).pooler_output


class TinyOpenCLIPTokenizer:
    """As open_clip's: `encode` without start and end, texts padded with zeros to the context length."""

    def __init__(self, name: str) -> None:
        self.tokenizer, self.context_length = clip_tokenizer(), CLIP_LENGTH

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens = torch.zeros(len(texts), CLIP_LENGTH, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = self.tokenizer(text, truncation=True, max_length=CLIP_LENGTH).input_ids
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def tiny_open_clip() -> SimpleNamespace:
    """A stand-in for the package open_clip, which the tests do not need."""
    return SimpleNamespace(
        CLIP=TinyOpenCLIP,
        get_model_config=lambda name: {"embed_dim": TEXT_WIDTH},
        get_tokenizer=TinyOpenCLIPTokenizer,
        OPENAI_DATASET_MEAN=(0.48, 0.46, 0.41),
        OPENAI_DATASET_STD=(0.27, 0.26, 0.28),
    )


class Unreached(torch.autograd.Function):
    """Mean of each image, whose author forgot the gradient."""

    @staticmethod
    def forward(ctx, images):
        return images.mean((1, 2, 3))

    @staticmethod
    def backward(ctx, factors):
        return None
