"""Tilt Matching in a trainer: each stage's copy is that of its beginning, and what is trained and saved is the model itself."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_trainer import difference, logged, make_trainer, watch_targets, weights

from diffusers_adjoint.model.frozen_weights import FrozenWeights
from diffusers_adjoint.trainer.stages import require_whole_weights

TILT_MATCHING = {"loss_type": "ram", "loss_kwargs": {"mode": "tilt_matching", "stages": 2}, "num_generations": 2, "max_steps": 4}


def frozen(trainer):
    with trainer.denoiser.reference():
        return weights(trainer)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_stage_s_copy_is_the_model_of_its_beginning(tmp_path, lora):
    trainer, own, copies = make_trainer(tmp_path, lora=lora, learning_rate=1e-3, **TILT_MATCHING), [], []

    def see(chain, targets):
        own.append(weights(trainer))
        copies.append(frozen(trainer))
        assert not any(t.requires_grad for t in (targets.states, targets.shifts, targets.base_means))

    watch_targets(trainer, see)
    trainer.train()
    assert all(difference(copies[update], own[begin]) == 0 for update, begin in ((0, 0), (1, 0), (2, 2), (3, 2)))
    assert all(difference(a, b) > 0 for a, b in zip(own, own[1:], strict=False))
    # The first stage's paths are the base's, the second's are those of what the first has made of it.
    assert logged(trainer, "kl")[:2] == [0, 0] and logged(trainer, "kl")[2] > 0
    assert difference(weights(trainer), own[3]) > 0


def test_the_last_weights_are_what_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, **TILT_MATCHING)
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    trained = {f"transformer.{name.replace('.adjoint.', '.')}": value for name, value in weights(trainer).items()}
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)
    assert not list(tmp_path.glob("stage*"))


def test_the_network_has_its_own_weights_again_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path)
    copy = FrozenWeights(trainer.denoiser.network, 0)
    for parameter in trainer.denoiser.network.parameters():
        parameter.data += 1.0
    own = weights(trainer)
    with pytest.raises(KeyError), copy.in_place():
        assert all(((own[name] - value) == 1.0).all() for name, value in weights(trainer).items() if not value.any())
        raise KeyError
    assert difference(own, weights(trainer)) == 0


def test_a_cast_of_the_other_weights_is_forgotten(tmp_path):
    """Autocast casts a weight once and keeps that, whatever becomes of the weight."""
    layer, x = torch.nn.Linear(3, 3), torch.ones(1, 3)
    copy = FrozenWeights(layer, 0)
    layer.weight.data += 1.0
    with torch.autocast("cpu", torch.bfloat16):
        own = layer(x)
        with copy.in_place():
            assert not torch.equal(layer(x), own)
        assert torch.equal(layer(x), own)


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["in the first stage", "at the border", "in the last"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_stop_and_resume_equals_a_straight_run(tmp_path, lora, stop):
    settings = TILT_MATCHING | {"lora": lora, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    straight = make_trainer(tmp_path, **settings)
    straight.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert difference(weights(straight), weights(resumed)) == 0.0
    assert difference(frozen(straight), frozen(resumed)) == 0.0
    assert [line.get("loss") for line in resumed.state.log_history] == [line.get("loss") for line in straight.state.log_history]


def test_a_checkpoint_without_the_stage_s_weights_or_of_other_stages_is_refused(tmp_path):
    settings = TILT_MATCHING | {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **settings).train()
    other = settings | {"max_steps": 40}
    with pytest.raises(
        ValueError, match="after 3 of 40 updates training is in stage 1 of 2, but .* frozen in stage 2; resume with"
    ):
        make_trainer(tmp_path, **other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="does not fit the trained weights"):
        FrozenWeights.load(torch.nn.Linear(2, 2), tmp_path / "checkpoint-3" / "stage_weights.safetensors")
    without = tmp_path / "plain"
    make_trainer(without, **settings | {"loss_kwargs": {"mode": "plain"}}).train()
    with pytest.raises(ValueError, match=r"holds no stage_weights.safetensors; pass a checkpoint of a run with the same stages"):
        make_trainer(tmp_path / "new", **settings).train(resume_from_checkpoint=str(without / "checkpoint-3"))


def test_a_checkpoint_of_the_model_alone_is_refused_with_the_reason(tmp_path):
    settings = TILT_MATCHING | {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    make_trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match=r"holds no stage_weights.safetensors; .* without save_only_model\."):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_training_ends_with_the_last_stage(tmp_path):
    """A second call of `train` would tilt the tilted model once more."""
    trainer = make_trainer(tmp_path, **TILT_MATCHING)
    trainer.train()
    with pytest.raises(
        ValueError, match="in stage 1 of 2, but its weights were last frozen in stage 2; .* or make a new trainer"
    ):
        trainer.train()


def test_weights_in_parts_are_not_copied():
    with pytest.raises(
        ValueError, match="stages=3 copies whole weights, which FSDP and DeepSpeed divide among processes; use DDP"
    ):
        require_whole_weights(3, divided=True)
    require_whole_weights(None, divided=True)


def test_without_stages_there_is_no_former_model(tmp_path):
    with pytest.raises(ValueError, match="no weights are frozen yet; train with loss_kwargs="):
        make_trainer(tmp_path).denoiser.reference()
