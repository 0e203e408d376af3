"""Decoding in tiles is told before training, where the images are larger than a tile."""

import pytest
import torch
from diffusers import AutoencoderTiny
from test_replay import PROMPTS, SHORT, make_replay
from tiny_images import sdxl
from tiny_pipelines import generators, sd3, sd15
from tiny_trainer import make_trainer
from tiny_videos import wan22

from diffusers_adjoint.replay import check_replay

VIDEO = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 16}


def check(pipeline, kwargs):
    check_replay(make_replay(pipeline, kwargs), {"prompt": PROMPTS}, generators())


def tile_of(vae, latents):
    """Image VAEs have one number for both sides; the tiny ones make two pixels of a latent."""
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = latents, 2 * latents
    return vae


@pytest.mark.parametrize(
    ("build", "kwargs", "dtype"),
    [(sd15, {}, torch.float32), (sd3, SHORT, torch.bfloat16), (sdxl, {}, torch.float16)],
    ids=["sd15", "sd3", "sdxl, cast up to decode"],
)
def test_an_image_larger_than_a_tile(build, kwargs, dtype, caplog):
    pipeline = build().to(dtype)
    tile_of(pipeline.vae, 4)
    before = set(vars(pipeline.vae))
    check(pipeline, kwargs)
    [message] = [message for message in caplog.messages if "tiles" in message]
    assert message.startswith("the AutoencoderKL decodes in tiles at this size, ")
    assert "; call vae.disable_tiling(), and if memory is short take vae.enable_gradient_checkpointing()" in message
    assert set(vars(pipeline.vae)) == before

    caplog.clear()
    pipeline.vae.disable_tiling()
    pipeline.vae.enable_gradient_checkpointing()
    check(pipeline, kwargs)
    assert "tiles" not in caplog.text


@pytest.mark.parametrize("latents", [8, 16])
def test_an_image_that_fits_into_a_tile(latents, caplog):
    pipeline = sd15()
    tile_of(pipeline.vae, latents)
    pipeline.vae.enable_slicing()  # harmless, as a chunk of frames is
    check(pipeline, {})
    assert "tiles" not in caplog.text


@pytest.mark.parametrize(("width", "warns"), [(16, True), (64, False)])
def test_a_video(width, warns, caplog):
    pipeline = wan22()
    pipeline.vae.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=width)
    pipeline.vae.tile_sample_stride_height = pipeline.vae.tile_sample_stride_width = 8
    check(pipeline, VIDEO)
    told = "the AutoencoderKLWan decodes in tiles at this size" in caplog.text
    assert told == warns
    assert ("if memory is short take a smaller size." in caplog.text) == warns  # it has no checkpointing


@pytest.mark.parametrize(("latents", "warns"), [(4, True), (16, False)])
def test_a_vae_that_takes_the_tiled_way_whatever_the_size(latents, warns, caplog):
    pipeline = sd15()
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=4,
    ).eval()
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = latents, 8 * latents
    check(pipeline, {})
    assert ("decodes in tiles" in caplog.text) == warns


def test_training_says_it_once(tmp_path, caplog):
    pipeline = sd3()
    tile_of(pipeline.vae, 4)
    make_trainer(tmp_path, pipeline=pipeline).train()
    assert caplog.text.count("decodes in tiles") == 1


def test_checkpointing_does_what_it_is_recommended_for():
    """In evaluation mode too: the decoder's blocks run again in the backward pass, and the images stay the same."""
    pipeline, calls = sd15(), []
    pipeline.vae.decoder.mid_block.register_forward_pre_hook(lambda *_: calls.append(1))
    replay = make_replay(pipeline, {})
    x, conditioning = replay.prepare({"prompt": PROMPTS}, generators())
    images, counts = [], []
    for checkpointed in (False, True):
        if checkpointed:
            pipeline.vae.enable_gradient_checkpointing()
        calls.clear()
        leaf = x.clone().requires_grad_()
        images.append(replay.decode(leaf, conditioning))
        images[-1].sum().backward()
        counts.append(len(calls))
    assert torch.equal(*images)
    assert counts == [1, 2]
