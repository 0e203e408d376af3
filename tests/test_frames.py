"""Some frames of a video: the same as in a decoding of all, with the same gradient, and no more decoded than they need."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLMagvit
from test_replay import PROMPTS, SHORT, make_replay
from tiny_conditioned import FAMILIES
from tiny_pipelines import generators, sd3
from tiny_videos import cogvideox, ltx, mochi, wan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from work_memory import peak_memory

from diffusers_adjoint.replay.frames import ChosenFrames, FrameChoice, FrameLayout
from diffusers_adjoint.replay.slices import measuring

VIDEO = {"height": 16, "width": 32, "max_sequence_length": 16}
LTX = {**VIDEO, "height": 32, "width": 64}
# (builder, arguments, frames of each latent frame, beginnings, whether its decoder is called for one slice after the other)
DECODERS = {
    "slices of one": (wan, {**VIDEO, "num_frames": 13}, (1, 4, 4, 4), (1, 2, 3, 4), True),
    "slices of two, the first of three": (cogvideox, {**VIDEO, "num_frames": 17}, (1, 4, 4, 4, 4), (3, 5), True),
    "slices of two": (cogvideox, {**VIDEO, "num_frames": 16}, (4, 4, 4, 4), (2, 4), True),
    "causal, in one call": (mochi, {**VIDEO, "num_frames": 13}, (1, 6, 6), (1, 2, 3), False),
    "each frame from all": (ltx, {**LTX, "num_frames": 25}, (1, 8, 8, 8), (4,), False),
}
SLOW = {"slices of two", "causal, in one call"}
decoders = pytest.mark.parametrize(
    ("build", "kwargs", "sizes", "beginnings", "sliced"),
    [pytest.param(*row, marks=pytest.mark.slow if name in SLOW else (), id=name) for name, row in DECODERS.items()],
)


def decoder_of(pipeline, kwargs, *, find=True):
    replay = make_replay(pipeline, kwargs)
    x, conditioning = replay.prepare({"prompt": PROMPTS}, generators())
    if find:
        replay.find_frames(x, conditioning)
    return replay, x, conditioning


def gradient(replay, x, conditioning, frames):
    """Of a random functional of these frames; the frames; the functional's weights."""
    leaf = x.clone().requires_grad_()
    decoded = replay.decode(leaf, conditioning, frames)
    weights = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad((decoded * weights).sum(), leaf)[0], decoded.detach(), weights


@decoders
def test_chosen_frames_are_those_of_the_whole(build, kwargs, sizes, beginnings, sliced):
    """And so is the gradient, in the latents of all frames: of those before the chosen ones it reaches through the caches."""
    pipeline = build()
    before = set(vars(pipeline.vae))
    plain, x, conditioning = decoder_of(pipeline, kwargs, find=False)
    leaf = x.clone().requires_grad_()
    whole = plain.decode(leaf, conditioning)
    replay = decoder_of(pipeline, kwargs)[0]
    assert replay.frame_layout == FrameLayout(sizes, beginnings, sliced)
    for latent_frames in ([1], [0, len(sizes) - 1]):
        frames = list(replay.frame_layout.frames_of(latent_frames))
        found, shown, weights = gradient(replay, x, conditioning, frames)
        (expected,) = torch.autograd.grad((whole[:, frames] * weights).sum(), leaf, retain_graph=True)
        # Rounding: a kernel may sum in another order where the video is shorter.
        torch.testing.assert_close(shown, whole.detach()[:, frames], rtol=0, atol=1e-5)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert set(vars(pipeline.vae)) == before


def test_a_frame_has_a_gradient_in_the_latents_before_it_and_none_in_those_after_it():
    replay, x, conditioning = decoder_of(wan(), DECODERS["slices of one"][1])
    of_each = gradient(replay, x, conditioning, replay.frame_layout.frames_of([2]))[0].movedim(2, 0).flatten(1).norm(dim=1)
    assert [bool(norm > 0) for norm in of_each] == [True, True, True, False]


def test_no_slice_after_the_last_chosen_one_is_decoded():
    pipeline = wan()
    replay, x, conditioning = decoder_of(pipeline, DECODERS["slices of one"][1])
    slices = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda *_: slices.append(1))
    for latent_frames, count in (([0], 1), ([2], 3), ([0, 3], 4)):
        slices.clear()
        with torch.no_grad():
            replay.decode(x, conditioning, replay.frame_layout.frames_of(latent_frames))
        assert len(slices) == count
    slices.clear()
    gradient(replay, x, conditioning, replay.frame_layout.frames_of([2]))
    assert len(slices) == 2 * 3  # once more in the backward pass


@pytest.mark.parametrize("name", ["slices of one", pytest.param("slices of two", marks=pytest.mark.slow)])
def test_a_slices_graph_is_made_in_the_backward_pass(name):
    """So that one at a time is held, and what the slices hand on; of four slices or two, their latents being as large."""
    build, kwargs, *_ = DECODERS[name]
    pipeline, peaks = build(), []
    for find in (False, True):
        replay, x, conditioning = decoder_of(pipeline, kwargs, find=find)
        peaks.append(peak_memory(lambda: gradient(replay, x, conditioning, None)))  # noqa: B023, called at once
    assert peaks[1] < 0.7 * peaks[0]


def test_samples_that_a_vae_decodes_one_by_one():
    pipeline = wan()
    pipeline.vae.enable_slicing()
    kwargs = {**VIDEO, "num_frames": 9}
    replay, x, conditioning = decoder_of(pipeline, kwargs)
    assert replay.frame_layout == FrameLayout((1, 4, 4), (1, 2, 3), True)
    frames = list(replay.frame_layout.frames_of([1]))
    leaf = x.clone().requires_grad_()
    whole = decoder_of(wan(), kwargs, find=False)[0].decode(leaf, conditioning)
    found, _, weights = gradient(replay, x, conditioning, frames)
    (expected,) = torch.autograd.grad((whole[:, frames] * weights).sum(), leaf)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_video_of_one_latent_frame():
    replay, x, conditioning = decoder_of(wan(), {**VIDEO, "num_frames": 1})
    assert replay.frame_layout == FrameLayout((1,), (1,), False)
    assert replay.decode(x, conditioning, (0,)).shape[1] == 1


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_images_have_no_frames():
    with pytest.raises(ValueError, match=r"^decode_frames chooses .* StableDiffusion3Pipeline decodes none; leave it out\.$"):
        decoder_of(sd3(), SHORT)


def test_frames_that_are_decoded_as_images_cannot_be_chosen():
    [row] = [row for row in FAMILIES if row.name == "Stable Video Diffusion"]
    replay = make_replay(row.build(), row.kwargs)
    x, conditioning = replay.prepare(row.columns, generators())
    with pytest.raises(ValueError, match=r"^decode_frames chooses .* StableVideoDiffusionPipeline decodes none; leave it out\.$"):
        replay.find_frames(x, conditioning)


def test_a_decoder_with_a_memory_is_refused_and_left_without_it():
    torch.manual_seed(0)
    vae = AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8, 8],
        down_block_types=["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 2, "SpatialDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 2, "SpatialUpBlock3D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    ).eval()
    z = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        before = vae.decode(z).sample
        with pytest.raises(ValueError, match=r"^the AutoencoderKLMagvit of A remembers .*; leave decode_frames out.$"):
            measuring("A", [])(vae)(z)
        assert torch.equal(vae.decode(z).sample, before)


def test_a_pipeline_that_drops_frames_is_refused():
    pipeline = wan()
    process = pipeline.video_processor.postprocess_video
    pipeline.video_processor = SimpleNamespace(postprocess_video=lambda video, **kwargs: process(video, **kwargs)[:, 1:])
    with pytest.raises(ValueError, match=r"^WanPipeline changes the frames that its VAE decodes, .*; leave decode_frames out.$"):
        decoder_of(pipeline, DECODERS["slices of one"][1])


def test_videos_of_another_length_are_refused():
    pipeline = wan()
    replay, _, _ = decoder_of(pipeline, {**VIDEO, "num_frames": 13})
    longer, x, conditioning = decoder_of(pipeline, {**VIDEO, "num_frames": 17}, find=False)
    longer.frame_layout = replay.frame_layout
    with pytest.raises(ValueError, match=r"^a video has 5 latent frames where the first one had 4; make .*\.$"):
        longer.decode(x, conditioning)


# ------------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("text", "of", "chosen"),
    [
        ("first", 5, [0]),
        ("even_1", 5, [2]),
        ("even_2", 13, [3, 9]),
        ("even_3", 3, [0, 1, 2]),
        ("even_9", 4, [0, 1, 2, 3]),
        ("random_9", 4, [0, 1, 2, 3]),
        ("all", 3, [0, 1, 2]),
    ],
)
def test_choice(text, of, chosen):
    assert FrameChoice.of(text).latent_frames(of, torch.Generator()) == chosen


def test_random_latent_frames_are_all_as_likely():
    generator, counts, draws = torch.Generator().manual_seed(0), torch.zeros(5), 2000
    for _ in range(draws):
        chosen = FrameChoice.of("random_2").latent_frames(5, generator)
        assert chosen == sorted(set(chosen))
        counts[chosen] += 1
    # A count has the standard deviation √(2000 · 0.4 · 0.6) = 22; five of them are met once in a million draws.
    assert (counts - draws * 2 / 5).abs().max() < 5 * 22


@pytest.mark.parametrize("text", ["", "last", "random", "random_0", "even_", "even_1.5", "random_-1", "2"])
def test_no_choice(text):
    with pytest.raises(ValueError, match=r"^decode_frames='.*' is unknown; pass 'all', 'asked', 'first', or "):
        FrameChoice.of(text)


def test_frames_in_their_place():
    frames = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    shown = ChosenFrames((1, 3), 5, in_place=True).shown(frames)
    assert torch.equal(shown[:, [1, 3]], frames)
    assert torch.equal(shown[:, [0, 2, 4]], torch.full((2, 3, 3, 4, 4), 0.5, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(shown.sum(), frames)[0], torch.ones_like(frames))
    assert ChosenFrames((1, 3), 5).shown(frames) is frames
