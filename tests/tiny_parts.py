"""Parts that tiny pipelines share: tokenizers without vocabulary files, text encoders, autoencoders."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import clip_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["byte_tokenizer", "clip", "flow", "projected_clip", "qwen_tokenizer", "qwen_vl", "qwen3", "randomise", "t5", "vae8"]

WIDTH = 16
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}\n{% endfor %}"  # noqa: E501


def flow(**config) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)


def byte_tokenizer(length: int = 64, *, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + list(bytes_to_unicode().values()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        model_max_length=length,
        padding_side=padding_side,
        chat_template=CHAT,
    )


def qwen_tokenizer(length: int = 256) -> Qwen2Tokenizer:
    tokens = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=length, additional_special_tokens=tokens[-2:])


def t5(length: int = 16) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Printable ASCII, one token a character; 32 wide."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config), tokenizer


def clip(length: int = 16) -> tuple[CLIPTextModel, object]:
    """32 wide."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = length
    return CLIPTextModel(_clip_config(tokenizer, length)), tokenizer


def projected_clip() -> tuple[CLIPTextModelWithProjection, object]:
    tokenizer = clip_tokenizer()
    return CLIPTextModelWithProjection(_clip_config(tokenizer, 16)), tokenizer


def _clip_config(tokenizer, length: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        projection_dim=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def qwen3(vocabulary: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def qwen_vl(vocabulary: int, **tokens) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
    }
    vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, hidden_size=WIDTH, vocab_size=vocabulary, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


def vae8(**config) -> AutoencoderKL:
    """The factor 8 between pixels and latents that some pipelines take for granted."""
    return AutoencoderKL(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )


def randomise(module: nn.Module, std: float = 0.3) -> None:
    """Weights that start at zero, or at nothing at all, would make a part of the network inert."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
