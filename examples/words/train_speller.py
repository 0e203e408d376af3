"""Trains the base model of `make words`: a complete CogView4Pipeline, under 6 MB, that draws the word that the prompt names.

    python examples/words/train_speller.py --output out/speller        # CPU, two hours; goes on with the phase it was in

First the autoencoder; then transformer and text encoder together by plain flow matching, in phases. In the last phase, and in one
before it, a share of the words has one wrong letter. So the base spells about half of its words right, and a reward has something
to do. CogView4 draws squares unless told otherwise: every few updates see 48 × 48 pixels, where the word
stands in the middle. `pipe(prompt)` works, and `height=16, width=48` is a third of the work.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast
from word_pictures import HEIGHT, WIDTH, draw_word, misspell, prompt, render_at_random

SEED = 0
VAE_UPDATES, VAE_BATCH, VAE_LR, VAE_KL_WEIGHT = 400, 32, 3e-3, 1e-4
BATCH, SQUARE_BATCH, SQUARE_EVERY, SQUARE_WEIGHT = 64, 16, 6, 0.25
ADAM_LR, MUON_LR, EMA_DECAY, WARM_UP, CONSTANT_SHARE = 2e-3, 0.02, 0.998, 100, 0.7
EMPTY_SHARE = 0.08  # of prompts: "" is the negative prompt of classifier-free guidance
TEXT_WIDTH, TEXT_LAYERS, TIME_WIDTH, NETWORK_WIDTH, HEADS, LAYERS, PATCH = 64, 3, 64, 96, 3, 5, 4
LATENT_CHANNELS, VAE_WIDTH = 1, 16
CHARACTERS = "abcdefghijklmnopqrstuvwxyz \"'.,-!?0123456789"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for `the word`, one for every other character; padded on the left, as GLM is."""
    pieces = ["<pad>", "<s>", "<unk>", "the word", *CHARACTERS]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split(Regex("the word|."), "isolated")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", model_max_length=64, **names)


def new_pipeline() -> CogView4Pipeline:
    """Every component that CogView4 has, with random weights."""
    tokenizer = character_tokenizer()
    text_encoder = GlmModel(
        GlmConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=TEXT_WIDTH // 4,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        )
    )
    nn.init.normal_(text_encoder.embed_tokens.weight)  # GLM's own 0.02 would leave the text silent for hundreds of updates
    vae = AutoencoderKL(
        sample_size=WIDTH,
        block_out_channels=[VAE_WIDTH],
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = CogView4Transformer2DModel(
        sample_size=WIDTH,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=NETWORK_WIDTH // HEADS,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=TIME_WIDTH,
        condition_dim=8,
        pos_embed_max_size=WIDTH // PATCH,
        rope_axes_dim=(WIDTH // PATCH, WIDTH // PATCH),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return CogView4Pipeline(tokenizer, text_encoder.eval(), vae, transformer, scheduler)


@dataclass(frozen=True)
class Phase:
    """Some updates with a learning rate that rises, rests and falls; judge a phase's end, not its middle."""

    name: str
    updates: int
    rate: float = 1.0  # times the learning rates
    shift: float = 1.0  # of σ, as in the scheduler: above 1, noisy images are seen more often, and there letters are decided
    misspelt: float = 0.0  # share of the pictures with one wrong letter


PHASES = (
    Phase("letters", 6000),
    Phase("words", 5000, shift=2.0),
    Phase("misspelt", 2500, rate=0.5, shift=2.0, misspelt=0.35),
    Phase("words again", 2500, shift=2.0),
    Phase("misspelt again", 1000, rate=0.5, shift=2.0, misspelt=0.35),
)


@dataclass
class Data:
    """Prompts and their pictures, drawn when they are asked for."""

    rng: random.Random
    misspelt: float = 0.0

    def batch(self, count: int, height: int) -> tuple[list[str], Tensor]:
        """`count` prompts and images, (count, 3, height, 48) in [-1, 1]."""
        words = [draw_word(self.rng) for _ in range(count)]
        drawn = [misspell(word, self.rng) if self.rng.random() < self.misspelt else word for word in words]
        pictures = torch.stack([render_at_random(word, self.rng, height) for word in drawn])
        prompts = ["" if self.rng.random() < EMPTY_SHARE else prompt(word) for word in words]
        return prompts, (2 * pictures - 1)[:, None].expand(-1, 3, -1, -1)


def learning_rate_schedule(optimizer: torch.optim.Optimizer, updates: int, peak: float = 1.0) -> LambdaLR:
    """Linear warm-up, constant until `CONSTANT_SHARE` of the updates, then linear to 2 % of the peak."""

    def factor(update: int) -> float:
        left = (1 - update / updates) / (1 - CONSTANT_SHARE)
        return peak * min(1.0, (update + 1) / WARM_UP) * max(0.02, min(1.0, left))

    return LambdaLR(optimizer, factor)


def train_vae(vae: AutoencoderKL, data: Data, updates: int) -> None:
    """Squared error and a little KL; sets shift and scale so that latents have mean 0 and deviation 1."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = learning_rate_schedule(optimizer, updates)
    for update in range(updates):
        _, images = data.batch(VAE_BATCH, HEIGHT)
        posterior = vae.encode(images).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, images)
        (error + VAE_KL_WEIGHT * posterior.kl().mean() / images[0].numel()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (update + 1) % 100 == 0:
            print(f"autoencoder, update {update + 1}: error of a pixel {error.sqrt().item() / 2:.4f}", flush=True)
    vae.eval().requires_grad_(False)
    latents = vae.encode(data.batch(512, HEIGHT)[1]).latent_dist.sample()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def flow_loss(pipe: CogView4Pipeline, prompts: list[str], images: Tensor, shift: float, shuffled: bool = False) -> Tensor:
    """‖v(x_σ, σ) − (noise − latents)‖², x_σ = σ noise + (1 − σ) latents, a scalar.

    σ = s u/(1 + (s − 1) u) with the shift s, and one u in each of B equal parts of (0, 1).
    """
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist.sample()
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    count = len(prompts)
    text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    if shuffled:
        text = text.roll(1, 0)
    noise, uniform = torch.randn_like(latents), (torch.randperm(count) + torch.rand(count)) / count
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    s = sigma[:, None, None, None]
    size = torch.tensor([images.shape[-2:]], dtype=torch.float32).expand(count, -1)
    velocity = pipe.transformer(
        hidden_states=s * noise + (1 - s) * latents,
        encoder_hidden_states=text,
        timestep=1000 * sigma,
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros_like(size),
    ).sample
    return F.mse_loss(velocity, noise - latents)


def flow_optimizers(networks: Sequence[nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers of transformer and text encoder, AdamW for the rest."""
    layers = (*networks[0].transformer_blocks, *networks[1].layers)
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for network in networks for p in network.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    return [adamw, torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0)]


def train_flow(pipe: CogView4Pipeline, data: Data, phase: Phase) -> None:
    """Transformer and text encoder together; leaves the moving average of the weights in the pipeline."""
    networks = (pipe.transformer, pipe.text_encoder)
    parameters = [p for network in networks for p in network.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizers = flow_optimizers(networks)
    schedules = [learning_rate_schedule(optimizer, phase.updates, phase.rate) for optimizer in optimizers]
    smooth, start = 2.0, time.perf_counter()
    for update in range(phase.updates):
        loss = flow_loss(pipe, *data.batch(BATCH, HEIGHT), phase.shift)
        loss.backward()
        if update % SQUARE_EVERY == 0:
            (SQUARE_WEIGHT * flow_loss(pipe, *data.batch(SQUARE_BATCH, WIDTH), phase.shift)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, update / (update + 20))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        smooth += 0.02 * (loss.item() - smooth)
        if (update + 1) % 100 == 0:
            seconds = (time.perf_counter() - start) / (update + 1)
            print(f"{phase.name}, update {update + 1}: loss {smooth:.4f}, {seconds:.2f} s an update", flush=True)
        if update + 1 in (200, 400, 800):
            check_text_is_read(pipe, data, update + 1)
    for parameter, value in zip(parameters, average, strict=True):
        parameter.detach().copy_(value)


@torch.no_grad()
def check_text_is_read(pipe: CogView4Pipeline, data: Data, update: int) -> None:
    """Stops a training that will not spell: by 400 updates the loss with another word's text must be clearly larger."""
    state = torch.get_rng_state()
    batch = data.batch(256, HEIGHT)
    losses = []
    for shuffled in (False, True):
        torch.manual_seed(0)  # the same noise for both
        losses.append(flow_loss(pipe, *batch, 1.0, shuffled).item())
    torch.set_rng_state(state)
    print(f"update {update}: loss {losses[0]:.4f} with the right text, {losses[1]:.4f} with another's", flush=True)
    if update >= 400 and losses[1] < 1.1 * losses[0]:
        raise RuntimeError(f"after {update} updates the text hardly matters ({losses[0]:.4f}, {losses[1]:.4f}); training stops.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder; the pipeline of each phase goes into one of its own")
    parser.add_argument("--vae-updates", type=int, default=VAE_UPDATES, help="fewer for a trial run")
    parser.add_argument("--share", type=float, default=1.0, help="of each phase's updates, less than 1 for a trial run")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a second thread waits more than it works, and on a shared machine it stops the first
    pipe = None
    for i, phase in enumerate(PHASES):
        folder = args.output / phase.name
        if folder.exists():
            pipe = CogView4Pipeline.from_pretrained(folder)
            pipe.vae.requires_grad_(False)
            continue
        torch.manual_seed(SEED + i)
        data = Data(random.Random(SEED + i), phase.misspelt)
        if pipe is None:
            pipe = new_pipeline()
            train_vae(pipe.vae, data, args.vae_updates)
        train_flow(pipe, data, replace(phase, updates=round(args.share * phase.updates)))
        unfinished = folder.with_name(f"{folder.name}.unfinished")  # a folder of the right name is a finished phase
        pipe.save_pretrained(unfinished)
        unfinished.replace(folder)


if __name__ == "__main__":
    main()
