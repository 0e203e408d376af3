"""Trains the demo's base model: a complete StableDiffusion3Pipeline, 2 MB, on scikit-learn's handwritten digits.

    python examples/digits/train_base.py --output examples/digits/pipeline        # CPU, about a quarter of an hour

First the autoencoder, then the transformer together with the three text encoders, by plain flow matching. SD3 appends
`max_sequence_length` T5 tokens to its text, 256 unless told otherwise, and they cost ten times the work of the image. So the
updates see large batches with a short text and small ones with a long text: the pipeline samples well with its default
arguments, and with `max_sequence_length=1`, which is how the demo uses it.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from data import DIGIT_PROMPTS, IMAGE_SIZE, OPEN_PROMPT, digit_images
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from measure_base import measure
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

SEED = 0
VAE_UPDATES, VAE_BATCH, VAE_LR, VAE_KL_WEIGHT = 450, 64, 3e-3, 1e-3
FLOW_UPDATES, ADAM_LR, MUON_LR, EMA_DECAY = 2500, 2e-3, 0.02, 0.997
SHORT_BATCH, LONG_BATCH, LONG_WEIGHT, LONG_EVERY = 128, 8, 0.25, 4  # a sample with a long text costs ten times as much

PROMPTS = (*DIGIT_PROMPTS, OPEN_PROMPT, "")
OPEN_SHARE, EMPTY_SHARE = 0.35, 0.1  # "" is the negative prompt of classifier-free guidance
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
CLIP_LENGTH = 8  # start, three words, end, and room for a little more
CLIP_WIDTH, T5_WIDTH, WIDTH, HEADS, LAYERS = 32, 64, 48, 3, 4
VAE_CHANNELS, LATENT_CHANNELS = (8, 16, 16, 16), 4
LATENT_SIZE = IMAGE_SIZE // 2 ** (len(VAE_CHANNELS) - 1)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE: one token for each word of the prompts, bytes for any other text."""
    characters = list(bytes_to_unicode().values())
    vocabulary = {token: i for i, token in enumerate(characters + [c + "</w>" for c in characters])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        merged, *rest = [*word[:-1], word[-1] + "</w>"]
        for piece in rest:
            if (merged, piece) not in merges:
                merges.append((merged, piece))
            merged += piece
            vocabulary.setdefault(merged, len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram: one token for each word of the prompts, printable ASCII characters for any other text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS]
    pieces += [(chr(code), -10.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=256)


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=CLIP_LENGTH,
        hidden_size=CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
    )
    return CLIPTextModelWithProjection(config).eval()


def t5_text_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=T5_WIDTH // 2,
        d_ff=2 * T5_WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


def new_pipeline() -> StableDiffusion3Pipeline:
    """Every component that SD3 has, with random weights."""
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    vae = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=VAE_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * len(VAE_CHANNELS),
        up_block_types=["UpDecoderBlock2D"] * len(VAE_CHANNELS),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        pos_embed_max_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip_text_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5_text_encoder(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )


def learning_rate_schedule(optimizer: torch.optim.Optimizer, updates: int) -> LambdaLR:
    """Linear warm-up over 100 updates, then cosine decay to 1 % of the peak."""

    def factor(update: int) -> float:
        return min(1.0, (update + 1) / 100) * max(0.01, 0.5 * (1 + math.cos(math.pi * update / updates)))

    return LambdaLR(optimizer, factor)


def train_vae(vae: AutoencoderKL, images: Tensor, updates: int) -> tuple[Tensor, Tensor]:
    """Squared error + a little KL. Returns the latents' means and stds, (1797, 4, 4, 4), normalised as the pipeline expects."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = learning_rate_schedule(optimizer, updates)
    for _ in (bar := tqdm(range(updates), desc="autoencoder")):
        batch = 2 * images[torch.randint(0, len(images), (VAE_BATCH,))] - 1
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        (error + VAE_KL_WEIGHT * posterior.kl().mean() / batch[0].numel()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(rmse=f"{error.sqrt().item() / 2:.4f}")
    vae.eval().requires_grad_(False)
    posteriors = [vae.encode(2 * batch - 1).latent_dist for batch in images.split(256)]
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    shift, scale = mean.mean().item(), 1 / mean.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (mean - shift) * scale, std * scale


def prompt_indices(labels: Tensor) -> Tensor:
    """One prompt for each label: mostly the digit's own, else the open one, else the empty one."""
    draw = torch.rand(len(labels))
    is_open, is_empty = draw < OPEN_SHARE, draw > 1 - EMPTY_SHARE
    return labels.masked_fill(is_open, PROMPTS.index(OPEN_PROMPT)).masked_fill(is_empty, PROMPTS.index(""))


def flow_loss(pipe: StableDiffusion3Pipeline, latents: Tensor, labels: Tensor, text_length: int) -> Tensor:
    """‖v(x_σ, σ) − (noise − latents)‖², x_σ = σ noise + (1 − σ) latents, σ uniform; mean over everything, a scalar."""
    prompt_embeds, _, pooled_embeds, _ = pipe.encode_prompt(
        list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=text_length
    )
    prompt = prompt_indices(labels)
    noise, sigma = torch.randn_like(latents), torch.rand(len(latents))
    s = sigma[:, None, None, None]
    velocity = pipe.transformer(
        hidden_states=s * noise + (1 - s) * latents,
        timestep=1000 * sigma,
        encoder_hidden_states=prompt_embeds[prompt],
        pooled_projections=pooled_embeds[prompt],
    ).sample
    return F.mse_loss(velocity, noise - latents)


def flow_optimizers(networks: Sequence[nn.Module]) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest: after 500 updates the loss is .60 instead of .73."""
    matrices = [p for p in networks[0].transformer_blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for network in networks for p in network.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    return adamw, torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0)


def train_flow(pipe: StableDiffusion3Pipeline, mean: Tensor, std: Tensor, labels: Tensor, updates: int) -> None:
    """Transformer and text encoders together; leaves the moving average of the weights in the pipeline."""

    def loss(batch_size: int, text_length: int) -> Tensor:
        batch = torch.randint(0, len(labels), (batch_size,))
        latents = mean[batch] + std[batch] * torch.randn_like(mean[batch])
        return flow_loss(pipe, latents, labels[batch], text_length)

    networks = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    parameters = [p for network in networks for p in network.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizers = flow_optimizers(networks)
    schedules = [learning_rate_schedule(optimizer, updates) for optimizer in optimizers]
    smooth = 2.0
    for update in (bar := tqdm(range(updates), desc="flow")):
        short = loss(SHORT_BATCH, random.choice((1, 1, 1, random.randint(2, 16))))
        short.backward()
        if update % LONG_EVERY == 0:
            (LONG_WEIGHT * loss(LONG_BATCH, random.choice((256, 256, random.randint(17, 255))))).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, update / (update + 20))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        smooth += 0.02 * (short.item() - smooth)
        bar.set_postfix(loss=f"{smooth:.4f}")
    for parameter, value in zip(parameters, average, strict=True):
        parameter.detach().copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the diffusers pipeline")
    parser.add_argument("--vae-updates", type=int, default=VAE_UPDATES, help="fewer for a trial run")
    parser.add_argument("--flow-updates", type=int, default=FLOW_UPDATES, help="fewer for a trial run")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    random.seed(SEED)
    diffusers.utils.logging.set_verbosity_error()  # a text of one token is a truncated text, and each call says so
    images, labels = digit_images()
    pipe = new_pipeline()
    mean, std = train_vae(pipe.vae, images, args.vae_updates)
    train_flow(pipe, mean, std, labels, args.flow_updates)
    pipe.save_pretrained(args.output)
    measure(args.output)


if __name__ == "__main__":
    main()
