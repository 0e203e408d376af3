"""ImageReward (arXiv 2304.05977): a BLIP model fine-tuned on how people ranked the images of a prompt."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .preprocess import differentiable_preprocess
from .texts import PromptTokenizer, check_prompts
from .weights import published_file, read_weights

__all__ = ["ImageReward"]

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' test set, from their package
LENGTH = 35  # tokens of a prompt, as in training
VISION_HEAD_WIDTH = 64  # channels per attention head in every ViT of BLIP; it cannot be read from the weights
HEAD_LAYERS = ("0", "2", "4", "6", "7")  # the numbers between are dropout layers
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Weights of BLIP's contrastive loss, and a buffer.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
PUBLISHED_NAMES = {  # parts of transformers' names → the authors' names, replaced in this order
    "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
    "vision.encoder.layers": "blip.visual_encoder.blocks",
    "vision.post_layernorm": "blip.visual_encoder.norm",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "text.": "blip.text_encoder.",
    "head.": "mlp.layers.",
}


class ImageReward(nn.Module):
    """r = (head(BLIP(prompt | image)) − 0.167)/1.033, differentiable in the images; frozen, float32 unless moved by `.to(dtype)`.

    The text encoder reads the prompt and attends to the image. Its state at the first token goes through five linear layers
    without activation. The published weights run on transformers' BLIP classes.

    Range: the authors standardised it to mean 0 and deviation 1 on their test set; 98 % of images by Stable Diffusion 1.4 score
    in [−2, 2]. It was trained to predict preferences: of two images for one prompt, it prefers the first with probability
    sigmoid(1.033 (r₁ − r₂)). So with a weight of 1.033 the unit is nats.

    Args:
        model: Hub id or local folder with ImageReward.pt or ImageReward.safetensors, and med_config.json; or the path of such
            weights next to a med_config.json.
        tokenizer: Hub id or local folder of the tokenizer of BERT base, uncased.

    Raises:
        ValueError: if the files do not have the published layout, or the tokenizer has another vocabulary.
    """

    def __init__(
        self, model: str | Path = "zai-org/ImageReward", tokenizer: str | Path = "google-bert/bert-base-uncased"
    ) -> None:
        super().__init__()
        file = published_file(model, "ImageReward.safetensors", "ImageReward.pt")
        settings = json.loads(published_file(file.parent if Path(model).is_file() else model, "med_config.json").read_text())
        weights = {name: value for name, value in read_weights(file).items() if not name.startswith(UNUSED)}
        try:
            vision = _vision_config(weights)
            self.head = _head(weights)
            self.text = BlipTextModel(_text_config(settings, vision.hidden_size), add_pooling_layer=False)
        except KeyError as error:
            raise ValueError(f"{file.parent} has no {error}; pass the published weights and their med_config.json.") from None
        self.vision = BlipVisionModel(vision)
        self._load(weights, file)
        self.preprocess = partial(differentiable_preprocess, size=vision.image_size, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD)
        self.tokenize = PromptTokenizer(_blip_tokenizer(tokenizer, self.text.config.vocab_size), LENGTH, "ImageReward")
        self.requires_grad_(False).eval()

    def _load(self, weights: dict[str, Tensor], file: Path) -> None:
        published = {name: _published_name(name) for name in self.state_dict()}
        expected = {published[name]: value.shape for name, value in self.state_dict().items()}
        found = {name: value.shape for name, value in weights.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise ValueError(
                f"{file} has missing, unexpected or misshapen tensors, {len(wrong)} in all, such as {', '.join(wrong[:3])}; pass "
                "the published weights and their med_config.json."
            )
        self.load_state_dict({name: weights[published[name]] for name in published})

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """Scores, shape (B,), float32 or better.

        Args:
            images: (B, 3, H, W) in [0, 1], floating, on the model's device; resized to 224 pixels on the shorter side, and
                cropped at the centre.
            prompts: one for each image; a prompt longer than 35 tokens is cut.
            columns: ignored.

        Raises:
            ValueError: if the images have the wrong shape or range, or the number of prompts differs.
            TypeError: if the images are not floating.
        """
        check_prompts(prompts, images)
        seen = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        # The authors pad to 35 tokens. Padding to the longest prompt gives the same result, because padding is masked.
        tokens = self.tokenize(prompts).to(seen.device)
        read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return (self._scalar(read[:, 0]) - MEAN) / DEVIATION

    def _scalar(self, features: Tensor) -> Tensor:
        """The head's output, shape (B,), computed in float32 or better even if the model is in 16 bits."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        parameters = {name: value.to(dtype) for name, value in self.head.named_parameters()}
        return functional_call(self.head, parameters, features.to(dtype)).squeeze(1)


def _vision_config(weights: dict[str, Tensor]) -> BlipVisionConfig:
    tower = "blip.visual_encoder."
    width, patch = weights[f"{tower}cls_token"].shape[-1], weights[f"{tower}patch_embed.proj.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights[f"{tower}blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(name.startswith(f"{tower}blocks.") and name.endswith(".norm1.weight") for name in weights),
        num_attention_heads=width // VISION_HEAD_WIDTH,
        image_size=patch * math.isqrt(weights[f"{tower}pos_embed"].shape[1] - 1),  # − 1 for the class token
        patch_size=patch,
        layer_norm_eps=1e-6,  # timm's default, which transformers does not share
    )


def _text_config(settings: dict[str, Any], vision_width: int) -> BlipTextConfig:
    """The sizes in med_config.json except its encoder_width, as in the authors' package; `is_decoder` adds cross-attention."""
    return BlipTextConfig(**{name: settings[name] for name in TEXT_SIZES}, encoder_hidden_size=vision_width, is_decoder=True)


def _head(weights: dict[str, Tensor]) -> nn.Sequential:
    shapes = {name: weights[f"mlp.layers.{name}.weight"].shape for name in HEAD_LAYERS}
    return nn.Sequential(OrderedDict((name, nn.Linear(shape[1], shape[0])) for name, shape in shapes.items()))


def _blip_tokenizer(tokenizer: str | Path, vocabulary: int) -> Any:
    """BERT's tokenizer with the two tokens that BLIP adds, which prompts do not normally contain.

    Raises:
        ValueError: if its vocabulary is not that of the text encoder.
    """
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(loaded) != vocabulary:
        raise ValueError(
            f"tokenizer has {len(loaded)} tokens with BLIP's two, but the text encoder has {vocabulary}; pass the one of "
            "google-bert/bert-base-uncased."
        )
    return loaded


def _published_name(name: str) -> str:
    """The authors' name for a parameter of this module."""
    return reduce(lambda renamed, pair: renamed.replace(*pair), PUBLISHED_NAMES.items(), name)
