"""Rewards and features by name: what is found, shared, refused."""

import pytest
import torch
from tiny_rewards import tiny_clip
from transformers import AutoTokenizer, ViTConfig, ViTModel

from diffusers_adjoint import rewards
from diffusers_adjoint.cli.loading import load_features, load_rewards
from diffusers_adjoint.metrics import features

CPU = torch.device("cpu")
MINE = """
from __future__ import annotations

from dataclasses import dataclass

from diffusers_adjoint.rewards import CLIPScore, PickScore


@dataclass
class Options:  # looks its annotations up in its module
    weight: float = 1.0


class Clip(CLIPScore):
    def __init__(self):
        super().__init__("clip")


class Broken:
    def __init__(self):
        raise TypeError("a mistake of its own")


class Refusing:
    def __init__(self):
        raise ValueError("no\\nway.")


first, second = PickScore("clip", "clip"), PickScore("other", "clip")


def features(images):
    return images.mean((2, 3))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_clip(tmp_path / "clip")
    tiny_clip(tmp_path / "other", seed=1)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "absent.py").write_text("from diffusers_adjoint.rewards import PickScore\nreward = PickScore('no/such')\n")
    return tmp_path


def test_every_exported_reward_that_needs_no_argument_has_a_name():
    with pytest.raises(ValueError) as caught:
        load_rewards(["Loveliness"])
    listed = str(caught.value).split(" is none of ")[1].split("; pass")[0].split(", ")
    models = ["AestheticScore", "CLIPScore", "HPSv2", "ImageReward", "PickScore", "PromptContrast"]
    assert listed == models + ["brightness", "colourfulness", "compressibility", "contrast", "motion", "saturation", "sharpness"]
    assert load_rewards(["brightness"]) == [rewards.brightness]


def test_features_are_those_of_the_reward_of_the_same_name(here):
    """Two models of one class are two, and none is loaded twice."""
    names = ["mine.py:first", "mine.py:second", "mine.py:Clip", "brightness"]
    functions = load_rewards(names)
    found = load_features([], names, functions, CPU)
    assert list(found) == names[:3]
    assert [feature.__self__ for feature in found.values()] == functions[:3]
    images = torch.rand(2, 3, 9, 9)
    assert not torch.equal(found[names[0]](images), found[names[1]](images))
    again = load_features(["mine.py:Clip", "mine.py:features", "pixels"], names, functions, CPU)
    assert again["mine.py:Clip"].__self__ is functions[2]
    assert torch.equal(again["mine.py:features"](images), images.mean((2, 3)))


def test_a_class_with_features_serves_without_being_a_reward(here):
    (found,) = load_features(["mine.py:Clip"], ["brightness"], load_rewards(["brightness"]), CPU).values()
    assert found(torch.rand(2, 3, 9, 9)).shape == (2, 32)


def test_without_any_features_there_are_the_pixels():
    (name,), (pixels,) = zip(*load_features([], ["brightness"], [rewards.brightness], CPU).items(), strict=True)
    images = torch.rand(2, 3, 4, 5)
    assert name == "pixels"
    distance = (pixels(images)[0] - pixels(images)[1]).square().sum()
    torch.testing.assert_close(distance, (images[0] - images[1]).square().mean())


@pytest.mark.parametrize(
    "name, message",
    [
        ("PickScore", r"reward 'PickScore' cannot be loaded \(.*\); fix this, or pass another one.$"),
        ("ImageReward", r"reward 'ImageReward' cannot be loaded \(.*\); fix this, or pass another one.$"),
        ("mine.py:Refusing", r"reward 'mine.py:Refusing' cannot be loaded \(no way\); fix this, or pass another one.$"),
        ("absent.py:reward", r"reward 'absent.py:reward' cannot be loaded \(.*\); fix this, or pass another one.$"),
        ("mine.py:Options.x", "mine.py has no 'Options.x'"),
        ("ClassLogProbability", "reward 'ClassLogProbability' is none of "),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(here, name, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load_rewards([name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["PickScore", "DreamSim"])
def test_features_that_cannot_be_loaded_are_one_sentence(monkeypatch, name):
    def unreachable(*args, **kwargs):
        raise OSError("no\nnetwork.")

    for module in (rewards, features):
        if hasattr(module, name):
            monkeypatch.setattr(getattr(module, name), "__init__", unreachable)
    with pytest.raises(
        ValueError, match=rf"^diversity '{name}' cannot be loaded \(no network\); fix this, or pass another one.$"
    ):
        load_features([name], [], [], CPU)


def test_a_file_of_the_same_name_in_another_folder_is_another(tmp_path, monkeypatch):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        (tmp_path / str(number) / "own.py").write_text(f"def reward(images, prompts):\n    return {number}\n")
        assert load_rewards(["own.py:reward"])[0](None, None) == number


def test_a_missing_package_keeps_its_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'run pip install "diffusers-adjoint\[rewards\]"\.$'):
        load_rewards(["HPSv2"])


def test_a_mistake_within_a_class_is_not_about_its_arguments(here):
    with pytest.raises(TypeError, match="a mistake of its own"):
        load_rewards(["mine.py:Broken"])


def test_a_tokenizer_that_needs_a_package_says_what_to_install(here, monkeypatch):
    def missing(*args):
        raise ImportError("\nT requires the protobuf library. Check the instructions on the\npage of it.\n")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    expected = r"^the tokenizer of clip cannot be loaded \(T requires the protobuf library\); run pip install .*\[rewards\]\"\.$"
    with pytest.raises(ImportError, match=expected):
        rewards.CLIPScore("clip")


def test_a_model_that_reads_no_text_is_refused(here):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        here / "vit"
    )
    with pytest.raises(ValueError, match="is a ViTModel; pass a CLIPModel, a SiglipModel or another image–text model.$"):
        rewards.CLIPScore(here / "vit")
