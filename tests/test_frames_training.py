"""`decode_frames` in training: what the rewards get, and that evaluation and pictures have all frames."""

from types import SimpleNamespace

import pytest
import torch
from tiny_rewards import brightness
from tiny_trainer import PROMPTS, difference, logged, make_trainer, weights
from tiny_videos import ltx, wan

from diffusers_adjoint import AdjointMatchingConfig
from diffusers_adjoint.replay.frames import FrameLayout
from diffusers_adjoint.rewards import MotionFloor, normalised, per_frame, weighted_sum
from diffusers_adjoint.trainer.checks import warn_of_whole_decodings

FRAMES = 13  # of 4 latent frames: 1, 4, 4 and 4
VIDEO = {
    "pipeline_kwargs": {"height": 16, "width": 16, "num_frames": FRAMES, "max_sequence_length": 16},
    "num_inference_steps": 3,
}
OF_LATENT_FRAME = [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


class Seen:
    """A reward of videos that notes what it was given."""

    __name__ = "seen"

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts, frame_numbers=None):
        self.calls.append((images.detach().clone(), frame_numbers))
        return images.flatten(1).mean(1)


def test_random_frames_are_those_of_an_update_and_all_are_evaluated_and_shown(tmp_path):
    seen = Seen()
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3, "num_images_to_log": 1}
    trainer = make_trainer(tmp_path, wan, seen, decode_frames="random_1", **VIDEO, **accumulated, num_generations_eval=1)
    trainer.train()
    numbers = [given[0] for _, given in seen.calls[1:]]  # the first call is the check's
    assert all(images.shape[1] == len(chosen) for (images, _), chosen in zip(seen.calls[1:], numbers, strict=True))
    assert all(chosen in OF_LATENT_FRAME for chosen in numbers)
    updates = [numbers[i : i + 2] for i in range(0, 6, 2)]
    assert all(first == second for first, second in updates)
    assert len({str(update) for update in updates}) > 1

    whole = trainer._shown.of_training().images
    assert whole.shape[:2] == (1, FRAMES)
    torch.testing.assert_close(whole[:, numbers[-1]], seen.calls[-1][0][: len(whole)], rtol=0, atol=1e-5)
    assert (tmp_path / "samples" / "train-000003.png").exists()
    seen.calls.clear()
    trainer.evaluate(PROMPTS[:1])
    assert {(images.shape[1], given) for images, given in seen.calls} == {(FRAMES, None)}


def test_what_rewards_ask_for_is_what_they_would_see_of_all(tmp_path):
    """The same weights afterwards: values and gradients are those of the whole video, to rounding."""
    reward = weighted_sum([normalised(per_frame(brightness, 2), 0.0, 2.0), per_frame(brightness, 1)], [1.0, 1.0])
    assert reward.asked_frames(FRAMES) == {0, 6, 12}
    trained = []
    for choice in ("all", "asked"):
        trainer = make_trainer(tmp_path / choice, wan, reward, decode_frames=choice, max_steps=1, **VIDEO)
        trainer.train()
        trained.append((weights(trainer), logged(trainer, "reward")))
    assert trained[1][1] == pytest.approx(trained[0][1], rel=1e-5)
    # Adam's first step has the gradient's sign alone, so what is near 0 may differ by two of them.
    assert difference(trained[0][0], trained[1][0]) < 2.1e-2
    share = [(a - trained[1][0][name]).abs().gt(1e-4).float().mean() for name, a in trained[0][0].items()]
    assert sum(share) / len(share) < 0.01


@pytest.mark.parametrize(
    ("reward", "choice", "message"),
    [
        (Seen(), "asked", r"^reward 'seen' does not tell which frames it uses, .*\.$"),
        (
            MotionFloor(0.1),
            "first",
            r"reward 'MotionFloor' failed: the 1 frames of a video contain no two neighbouring ones, .*\.$",
        ),
    ],
    ids=["asked of one that does not say", "the motion of one frame"],
)
def test_a_choice_that_the_reward_cannot_use_ends_before_training(tmp_path, reward, choice, message):
    trainer = make_trainer(tmp_path, wan, reward, decode_frames=choice, **VIDEO)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_choice_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"^decode_frames='some' is unknown; pass 'all', 'asked', 'first', or "):
        AdjointMatchingConfig(str(tmp_path), decode_frames="some")


def test_a_decoder_that_takes_a_video_whole_is_told(caplog):
    """Not where something is spared: a causal decoder's later frames, a slice's graph; or one frame is all there is."""
    replay = SimpleNamespace(pipeline=ltx())
    for layout in (None, FrameLayout((1, 8), (1, 2), False), FrameLayout((1, 8), (2,), True), FrameLayout((1,), (1,), False)):
        replay.frame_layout = layout
        warn_of_whole_decodings(replay)
    assert not caplog.messages
    replay.frame_layout = FrameLayout((1, 8), (2,), False)
    for _ in range(2):
        warn_of_whole_decodings(replay)
        replay.pipeline.vae.enable_gradient_checkpointing()
    first, second = caplog.messages
    assert first.startswith("the AutoencoderKLLTXVideo decodes a video as a whole, ")
    assert first.endswith("; if memory is short, call vae.enable_gradient_checkpointing(), which does not change the frames.")
    assert second.endswith("; if memory is short, generate fewer or smaller frames.")
