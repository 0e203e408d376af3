"""What goes to the Hub, offline: what is written, that it loads as the card says, and that nothing of this machine is in it."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import markdown
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from families import FAMILIES
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import sd3, sd15
from tiny_trainer import brightness
from tiny_videos import wan22
from transformers import TrainerState

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, MemorylessFlowMatchEulerDiscreteScheduler
from diffusers_adjoint.hub import (
    CARD_FILES,
    CardFacts,
    Licence,
    Sample,
    base_model_of,
    card_facts,
    hub_id,
    licence_of,
    model_card,
    pipeline_files,
    pipeline_tag_of,
    save_pipeline,
    write_card,
    write_samples,
)
from diffusers_adjoint.hub.facts import output_of, text_of
from diffusers_adjoint.model.lora import WEIGHTS_NAME, add_lora, save_lora
from diffusers_adjoint.objectives import AdjointMatching
from diffusers_adjoint.objectives.papers import ADJOINT_MATCHING, Paper
from diffusers_adjoint.replay import PipelineReplay
from diffusers_adjoint.rewards import WeightedReward
from diffusers_adjoint.schedulers import memoryless_scheduler

PROMPTS = ["a cat", "two dogs"]
TOKEN = "hf_" + "aBcD1234" * 4
LORA_FILES = ["README.md", "image_0.png", "image_1.png", "pytorch_lora_weights.safetensors"]


def facts_of(pipeline, folder, base_adapters, *, component=None, columns=None, kwargs=None, scale=1.0, **changes):
    """As the trainer would ask for them."""
    arguments = {"reward_scale": 40.0, "num_inference_steps": 3, "guidance_scale": scale, "hub_token": TOKEN, "use_cpu": True}
    args = AdjointMatchingConfig(str(folder / "run"), **arguments | changes)
    replay = PipelineReplay(
        pipeline,
        memoryless_scheduler(pipeline.scheduler),
        3,
        guidance_scale=scale,
        pipeline_kwargs=kwargs,
        component=component,
    )
    state = TrainerState(global_step=7, log_history=[{"loss": 1.0, "reward": 0.25, "step": 7, "epoch": 1.0}])
    columns = {name: values[:1] for name, values in ({"prompt": PROMPTS} if columns is None else columns).items()}
    reward = WeightedReward([brightness], [2.0])
    return card_facts(replay, reward, args, state, columns, AdjointMatching(), repo_id="me/bright", base_adapters=base_adapters)


def move(network, seed=1):
    """In place of training: every trainable weight somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def sample(pipeline, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "pt", "return_dict": False} | kwargs
    return pipeline(prompt=PROMPTS, generator=generators, **arguments)[0]


def tuned_lora(build, component, seed=1):
    """A pipeline with an adapter whose alpha is not its rank, and that is not what it was before."""
    pipeline = build()
    add_lora(pipeline, component, LoraConfig(r=2, lora_alpha=8))
    move(getattr(pipeline, component), seed)
    return pipeline


def write_repository(folder, pipeline, facts, images):
    """As the trainer does, into a folder of its own; returns the files that its upload would take."""
    if facts.base_adapters is None:
        save_pipeline(folder, pipeline)
    else:
        save_lora(pipeline, facts.component, folder)
    write_card(folder, facts, images, PROMPTS)
    weights = pipeline_files(pipeline) if facts.base_adapters is None else [WEIGHTS_NAME]
    return sorted(filter_repo_objects(files_in(folder), allow_patterns=[*weights, *CARD_FILES]))


def snippet(folder):
    """The card's code, with the Hub's names replaced by local folders."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    return code.replace('"me/bright"', f'"{folder}"').replace('"path/to/the/base"', f'"{folder.parent / "base"}"')


def run(code, **names):
    exec(code, names)
    return names


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def cached(cache, repo_id, folder):
    """Lay a folder down as the Hub's client would after a download."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


# ---------------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(("build", "component"), [(sd3, "transformer"), (sd15, "unet")], ids=["sd3", "sd15"])
def test_a_lora_folder_gives_the_tuned_images_to_all_who_load_it(tmp_path, build, component):
    build().save_pretrained(tmp_path / "base")
    pipeline = tuned_lora(build, component)
    images, folder = sample(pipeline), tmp_path / "lora"
    written = write_repository(folder, pipeline, facts_of(pipeline, tmp_path, []), images)
    assert written == files_in(folder) == LORA_FILES

    loaded = build()
    base = sample(loaded)
    loaded.load_lora_weights(folder)
    assert torch.equal(sample(loaded), images)
    assert (images - base).abs().max() > 0.01
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    assert torch.allclose(sample(loaded), images, atol=1e-4)

    cached(tmp_path / "cache", "me/bright", folder)
    by_name = build()
    by_name.load_lora_weights("me/bright", weight_name="pytorch_lora_weights.safetensors", cache_dir=tmp_path / "cache")
    assert torch.equal(sample(by_name), images)

    names = run(snippet(folder))
    assert isinstance(names["image"], Image.Image)
    assert torch.equal(sample(names["pipe"]), images)


def test_a_lora_of_the_second_transformer_is_loaded_there(tmp_path):
    wan = next(family for family in FAMILIES if family.name == "Wan 2.2")
    wan22().save_pretrained(tmp_path / "base")
    pipeline = tuned_lora(wan22, "transformer_2")
    videos = sample(pipeline, **wan.kwargs)
    facts = facts_of(pipeline, tmp_path, [], component="transformer_2", kwargs=wan.kwargs)
    write_repository(tmp_path / "lora", pipeline, facts, videos)
    assert files_in(tmp_path / "lora") == ["README.md", "pytorch_lora_weights.safetensors", "video_0.webp", "video_1.webp"]
    names = run(snippet(tmp_path / "lora"))
    assert torch.equal(sample(names["pipe"], **wan.kwargs), videos)
    assert not torch.equal(sample(wan22(), **wan.kwargs), videos)


def test_adapters_of_the_base_are_named_and_loaded_first(tmp_path):
    sd3().save_pretrained(tmp_path / "base")
    save_lora(tuned_lora(sd3, "transformer", seed=2), "transformer", tmp_path / "style")
    pipeline = sd3()
    pipeline.load_lora_weights(tmp_path / "style", adapter_name="style")
    base = sample(pipeline)
    base_adapters = add_lora(pipeline, "transformer", LoraConfig(r=2, lora_alpha=8))
    move(pipeline.transformer)
    images = sample(pipeline)
    write_repository(tmp_path / "lora", pipeline, facts_of(pipeline, tmp_path, base_adapters), images)

    before, comment, after = re.split(r"(# The base .*)\n", snippet(tmp_path / "lora"))
    assert "load these first" in comment
    assert '"style"' in after
    loading = f'pipe.load_lora_weights("{tmp_path / "style"}", adapter_name="style")\n'
    names = run(before + loading + after)
    assert torch.equal(sample(names["pipe"]), images)
    assert not torch.equal(base, images)


# ----------------------------------------------------------------------------------------------------------- whole pipelines


def test_a_full_fine_tuning_is_a_pipeline_that_loads_by_name(tmp_path, monkeypatch):
    pipeline = sd3()
    base = sample(pipeline)
    move(pipeline.transformer)
    images = sample(pipeline)
    # What a user may have done to look at memoryless samples: nobody else has that class.
    pipeline.scheduler = MemorylessFlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    folder = tmp_path / "full"
    written = write_repository(folder, pipeline, facts_of(pipeline, tmp_path, None), images)
    assert written == files_in(folder)
    assert {"README.md", "image_0.png", "model_index.json", "transformer/config.json"} <= set(written)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert isinstance(pipeline.scheduler, MemorylessFlowMatchEulerDiscreteScheduler)  # the user's own is as it was
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    original = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert {name: config[name] for name in original.config if name[0] != "_"} == {
        name: value for name, value in original.config.items() if name[0] != "_"
    }
    assert "integrator" not in config

    cached(tmp_path / "cache", "me/bright", folder)
    assert torch.equal(sample(DiffusionPipeline.from_pretrained("me/bright", cache_dir=tmp_path / "cache")), images)
    assert not torch.equal(base, images)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    assert torch.equal(sample(run(code)["pipe"]), images)  # as it stands there


def test_a_pipeline_with_adapters_is_not_saved_whole(tmp_path):
    pipeline = tuned_lora(sd3, "transformer")
    with pytest.raises(ValueError, match="the transformer has adapters"):
        save_pipeline(tmp_path, pipeline)
    assert files_in(tmp_path) == []


# ----------------------------------------------------------------------------------------------- nothing of this machine in it


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_nothing_of_this_machine_is_written(tmp_path, full):
    source = tmp_path / "someone" / "base"
    sd3().save_pretrained(source)
    pipeline = DiffusionPipeline.from_pretrained(source)
    pipeline.tokenizer.init_kwargs["special_tokens_map_file"] = str(source / "special_tokens_map.json")
    if not full:
        add_lora(pipeline, "transformer", LoraConfig(r=2, base_model_name_or_path=str(source)))
    facts = facts_of(pipeline, tmp_path, None if full else [], columns={"prompt": PROMPTS, "negative_prompt": [str(source)] * 2})
    written = write_repository(tmp_path / "up", pipeline, facts, sample(pipeline))
    junk = ["training_args.bin", "runs/events.out", "checkpoint-1/optimizer.pt", "checkpoint-1/README.md", "samples/eval-1.png"]
    patterns = [*pipeline_files(pipeline), WEIGHTS_NAME, *CARD_FILES]
    assert list(filter_repo_objects([*junk, *written], allow_patterns=patterns)) == written == files_in(tmp_path / "up")
    texts = (
        r"hf_\w{20}",
        "output_dir",
        r'name_or_path[\\"]*: *[\\"]*/',
        re.escape(str(tmp_path)),
        re.escape(str(Path.home())) + "/",
    )
    local = re.compile("|".join(texts).encode())
    for name in written:
        assert not local.search((tmp_path / "up" / name).read_bytes()), name
        assert name.endswith((".md", ".png", ".json", ".safetensors", ".txt", ".model")), name  # none that is unpickled
    assert (
        local.search(rb'\\"name_or_path\\": \\"/x')
        and local.search(b'"_name_or_path": "/x')
        and local.search(str(source).encode())
        and local.search(TOKEN.encode())
    )


def test_names_of_the_hub_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("me/base-1.5_x") == "me/base-1.5_x"
    assert [hub_id(name) for name in (None, "base", "/me/base", "./base", "../base", "a/b/c", tmp_path)] == [None] * 7
    (tmp_path / "out" / "model").mkdir(parents=True)
    assert hub_id("out/model") is None

    sd3().save_pretrained(tmp_path / "base")
    cached(tmp_path / "cache", "me/base", tmp_path / "base")
    by_name = DiffusionPipeline.from_pretrained("me/base", cache_dir=tmp_path / "cache")
    snapshot = DiffusionPipeline.from_pretrained(tmp_path / "cache" / "models--me--base" / "snapshots" / ("0" * 40))
    folder = DiffusionPipeline.from_pretrained(tmp_path / "base")
    assert [base_model_of(p) for p in (by_name, snapshot, folder, sd3())] == ["me/base", "me/base", None, None]


# ------------------------------------------------------------------------------------------------------------------ the card


def plain_facts(**changes):
    facts = {
        "repo_id": "me/bright",
        "pipeline_class": StableDiffusion3Pipeline,
        "component": "transformer",
        "network_class": "SD3Transformer2DModel",
        "dtype": "torch.bfloat16",
        "call": {"prompt": ["a cat"], "num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "pt"},
        "settings": {"reward_scale": 40.0, "guidance_scale": 4.0, "cfg_mode": "rollout", "LoRA alpha": 8},
        "rewards": {"brightness": 1.0, "<lambda>": 0.5},
        "paper": ADJOINT_MATCHING,
        "base_adapters": [],
    }
    return CardFacts(**facts | changes)


def test_the_card_names_the_paper_of_the_objective_and_what_it_asks_of_a_reward():
    text = str(model_card(plain_facts()))
    assert "[Adjoint Matching](https://arxiv.org/abs/2409.08861), which tunes a model to a differentiable reward." in text
    assert "@inproceedings{domingoenrich2025adjoint," in text
    other = Paper("Matching by Numbers", "2601.00001", "@misc{numbers2026}")
    text = str(model_card(plain_facts(paper=other, needs_gradient=False)))
    assert "[Matching by Numbers](https://arxiv.org/abs/2601.00001), which tunes a model to a reward." in text
    assert "```bibtex\n@misc{numbers2026}\n```" in text and "2409.08861" not in text


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    facts = plain_facts(
        base_model="owner/base",
        licence=Licence("other", "some-licence", "https://example.org/licence"),
        dataset="me/prompts",
        tags=["sd3"],
        pipeline_tag="text-to-image",
        samples=[Sample("image_0.png", 'a "cat": {{ 7 * 7 }}\n--- # é'), Sample("image_1.png", "")],
    )
    model_card(facts).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "license_name": "some-licence",
        "license_link": "https://example.org/licence",
        "datasets": "me/prompts",
        "tags": ["text-to-image", "diffusers", "diffusers-training", "adjoint-matching", "sd3", "lora", "template:sd-lora"],
        "widget": [
            {"text": 'a "cat": {{ 7 * 7 }}\n--- # é', "output": {"url": "image_0.png"}},
            {"text": "-", "output": {"url": "image_1.png"}},
        ],
    }


def test_what_is_not_known_is_not_written():
    card = model_card(plain_facts(base_adapters=None))
    assert card.data.to_dict().keys() == {"library_name", "tags"}
    assert "lora" not in card.data.tags
    assert "<Gallery" not in card.text
    assert "Results" not in card.text
    full = model_card(plain_facts(base_adapters=None, base_model="owner/base")).data
    assert full.base_model_relation == "finetune"


def test_the_text_says_what_it_was_tuned_for():
    text = model_card(plain_facts(base_model="owner/base")).text
    assert "A LoRA of the transformer (SD3Transformer2DModel) of [owner/base](https://huggingface.co/owner/base)" in text
    assert "λ = 40 nats per unit of reward and r = 1·`brightness` + 0.5·`<lambda>`" in text
    assert "| `LoRA alpha` | 8 |" in text
    assert "arxiv.org/abs/2409.08861" in text and "@inproceedings" in text
    assert (
        'from_pretrained("owner/base", dtype=torch.bfloat16)' in text
        and 'prompt="a cat"' in text
        and "guidance_scale=4.0" in text
    )
    assert "output_type" not in text


def test_a_name_opens_no_cell_no_code_and_no_tag(tmp_path):
    """A reward may be called anything, and a pattern of target modules holds bars."""
    name, pattern = "a`|b`\n| <script>", r".*(to_q|to_k)\.[0-9]*"
    facts = plain_facts(
        rewards={name: 1.0},
        settings=plain_facts().settings | {"LoRA modules": pattern},
        log_history=[{"step": 1, "loss": 0.5, f"rewards/{name}/mean": 0.25}],
        repo_id="me/<b>out",
    )
    text = model_card(facts).text
    html = markdown.markdown(text, extensions=["tables", "fenced_code"])
    assert "<script>" not in html and "<b>" not in html
    assert f"<td>{pattern}</td>" in html
    # GitHub shows a bar for "\\|" within code, Python-Markdown both characters.
    assert "<td><code>rewards/a'|b' | &lt;script&gt;/mean</code></td>\n<td>0.25</td>" in html.replace("\\|", "|")
    assert text.count("\n## ") == model_card(plain_facts(log_history=[{"step": 1, "loss": 0.5}])).text.count("\n## ")


def test_guidance_is_a_limitation_where_it_acted():
    def limits(mode, guided):
        settings = {"reward_scale": 1.0, "guidance_scale": 4.0, "cfg_mode": mode}
        return model_card(plain_facts(settings=settings, guided=guided)).text.split("## Limitations")[1].split("## Citation")[0]

    assert len({limits(mode, True) for mode in ("rollout", "none", "full")}) == 3
    assert "not exactly it" in limits("rollout", True)
    assert limits("rollout", False) == limits("full", False)
    assert "over-optimisation" in limits("rollout", False)
    assert "noisy image" not in limits("rollout", False)
    assert "noisy image" in model_card(plain_facts(given_start=True)).text


def test_the_facts_are_those_of_the_run(tmp_path):
    pipeline = tuned_lora(sd3, "transformer")
    facts = facts_of(pipeline, tmp_path, [], scale=4.0, num_generations=2, per_device_train_batch_size=3, seed=11)
    assert facts.guided and not facts.given_start
    told = {"updates": 7, "images per update, at most": 6, "seed": 11, "LoRA rank": 2, "LoRA alpha": 8, "reward_scale": 40.0}
    assert told.items() <= facts.settings.items()
    assert facts.settings["integrator"] == "posterior"  # of the chain, though the arguments leave it to the objective
    assert facts.settings["LoRA modules"] == "to_k, to_out.0, to_q, to_v"
    assert (facts.rewards, facts.dtype, facts.call["prompt"]) == ({"brightness": 2.0}, "torch.float32", "a cat")
    assert not facts_of(pipeline, tmp_path, []).guided

    family = next(family for family in FAMILIES if family.name == "Stable Diffusion 1.5, image to image")
    pipeline, columns = family.build(), {name: values[:1] for name, values in family.columns.items()}
    replay = PipelineReplay(pipeline, memoryless_scheduler(pipeline.scheduler), 5, pipeline_kwargs=family.kwargs)
    replay.prepare(columns, [torch.Generator()])
    args = AdjointMatchingConfig(str(tmp_path / "run"), use_cpu=True)
    given = (replay, WeightedReward([brightness]), args, TrainerState(), columns, AdjointMatching())
    image_to_image = card_facts(*given, repo_id="me/bright", base_adapters=None)
    assert image_to_image.given_start


def test_the_tables_hold_the_first_and_the_last_line_of_the_log():
    history = [
        {"eval_reward": 0.25, "eval_kl": 0.0, "step": 0, "eval_runtime": 3.0},
        {"loss": 1.0, "reward": 0.26, "step": 1, "epoch": 0.1, "learning_rate": 1e-4},
        {"eval_reward": 0.3, "eval_kl": 0.5, "step": 5, "eval_runtime": 3.0},
        {"eval_a|b_reward": 7.0, "step": 9},
        {"eval_reward": 0.123456, "eval_kl": 0.75, "step": 9, "eval_runtime": 3.0},
        {"loss": 0.5, "reward": 0.36, "step": 9, "epoch": 1.0, "learning_rate": 1e-4},
        {"train_loss": 0.7, "train_runtime": 9.0, "step": 9},
    ]
    results = model_card(plain_facts(log_history=history)).text.split("## Results")[1].split("## Limitations")[0]
    rows = [line for line in results.splitlines() if line.startswith("|")]
    assert rows == [
        "| metric | base | update 9 |",
        "| --- | --- | --- |",
        "| `reward` | 0.25 | 0.1235 |",
        "| `kl` | 0 | 0.75 |",
        "| `a\\|b_reward` |  | 7 |",
        "| metric | update 1 | update 9 |",
        "| --- | --- | --- |",
        "| `loss` | 1 | 0.5 |",
        "| `reward` | 0.26 | 0.36 |",
    ]
    once = model_card(plain_facts(log_history=history[:1])).text
    assert "| metric | base |\n" in once and "memoryless" not in once


def test_what_the_probe_measured_is_the_base_s_column():
    probe = {"step": 0, "probe/reward/memoryless": 0.24, "probe/reward/own": 0.9, "probe/rewards/a/memoryless": 0.2}
    probe |= {"probe/saturation/memoryless": 0.5}
    history = [probe, {"step": 1, "reward": 0.25, "rewards/a/mean": 0.3, "kl": 0.0}, {"step": 9, "reward": 0.5, "kl": 0.75}]
    history[1]["loss"] = history[2]["loss"] = 1.0
    rows = [line for line in model_card(plain_facts(log_history=history)).text.splitlines() if line.startswith("|")][-6:]
    assert rows == [
        "| metric | base | update 1 | update 9 |",
        "| --- | --- | --- | --- |",
        "| `reward` | 0.24 | 0.25 | 0.5 |",
        "| `rewards/a/mean` | 0.2 | 0.3 |  |",
        "| `kl` |  | 0 | 0.75 |",
        "| `loss` |  | 1 | 1 |",
    ]


def test_the_card_tells_of_rewards_and_prompts():
    plain = model_card(plain_facts()).text
    assert "trained on" not in plain and "Before and after" not in plain and ")[0][0]  # first output" in plain
    told = plain_facts(reward_texts={"brightness": "Mean brightness | of an image."}, num_prompts=3, output="frames")
    text = model_card(told).text
    assert "It was trained on 3 different prompts.\n\n- `brightness`: Mean brightness \\| of an image.\n\n" in text
    assert "\n).frames[0]\n" in text
    assert "trained on 1 prompt." in model_card(plain_facts(num_prompts=1)).text


class Documented:
    """Counts holes.

    Slowly.
    """

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


@dataclass
class Undocumented:
    weight: float = 1.0

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


class Network(torch.nn.Module):
    def forward(self, images, prompts):
        return images.mean((1, 2, 3))


def test_what_a_reward_says_of_itself():
    def function(images, prompts, weight=1.0):
        """Bright pixels,
        weighted.

        Args:
            weight: of them.
        """

    assert text_of(function) == text_of(partial(function, weight=2.0)) == "Bright pixels, weighted."
    assert text_of(Documented()) == "Counts holes."
    assert [text_of(f) for f in (Undocumented(), Network(), lambda images, prompts: None, brightness)] == [None] * 4


def test_outputs_by_their_names():
    assert (output_of(StableDiffusion3Pipeline), output_of(type(wan22()))) == ("images", "frames")
    assert output_of(DiffusionPipeline) is None


def test_a_licence_is_the_bases_or_none(tmp_path, monkeypatch):
    licence_of.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cards = {
        "me/free": "license: apache-2.0",
        "me/other": "license: other\nlicense_name: some-licence\nlicense_link: LICENSE.md",
        "me/linked": "license: other\nlicense_link: https://example.org/licence",
        "me/silent": "library_name: diffusers",
        "me/broken": "license: [",
    }
    for name, text in cards.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "README.md").write_text(f"---\n{text}\n---\n# A model\n")
        cached(tmp_path / "cache", name, tmp_path / name)
    assert [licence_of(name) for name in [*cards, "me/absent"]] == [
        Licence("apache-2.0"),
        Licence("other", "some-licence", "https://huggingface.co/me/other/blob/main/LICENSE.md"),
        Licence("other", None, "https://example.org/licence"),
        None,
        None,
        None,
    ]
    licence_of.cache_clear()


# The others make images from text.
TASKS = {
    "image-to-image": [
        *("FLUX.1 Kontext", "Qwen-Image-Edit", "InstructPix2Pix", "Stable Diffusion 1.5, image to image", "SDXL, image to image"),
        *("Stable Diffusion 3, image to image", "FLUX.1, image to image", "Stable Diffusion 1.5 ControlNet", "FLUX.1 Control"),
        *("SDXL ControlNet", "Stable Diffusion 1.5, inpainting", "FLUX.1 Fill", "Chroma, image to image"),
        "Qwen-Image, image to image",
    ],
    "unconditional-image-generation": ["DDPM", "DDIM", "DiT"],
    "text-to-video": [
        *(
            "Wan 2.1",
            "Wan 2.2",
            "Wan 2.2, second transformer",
            "LTX-Video",
            "LTX-Video, decoder with noise",
            "CogVideoX",
            "Mochi",
        ),
        *("HunyuanVideo", "Kandinsky 5 video", "SkyReels-V2", "Sana-Video", "Latte", "AnimateDiff", "HunyuanVideo 1.5"),
        *("Wan 2.1, modular", "Wan 2.2, modular", "LTX-2", "LTX-2, modular"),
    ],
    "image-to-video": ["Wan 2.2, image to video", "Stable Video Diffusion", "LTX-Video, image to video"],
    "video-to-video": ["Wan-VACE", "Wan 2.1, video to video"],
    "text-to-audio": ["Stable Audio", "AudioLDM 2"],
}


def task_of(name):
    return next((task for task, names in TASKS.items() if name in names), "text-to-image")


def test_the_table_names_families():
    assert {name for names in TASKS.values() for name in names} <= {family.name for family in FAMILIES}


def test_tasks_without_a_name_have_none():
    assert pipeline_tag_of({"prompt", "video"}, torch.zeros(1, 2, 3, 4, 4)) == "video-to-video"
    assert pipeline_tag_of({"num_inference_steps"}, torch.zeros(1, 2, 3, 4, 4)) is None


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f.fast else pytest.mark.slow) for f in FAMILIES], ids=[f.name for f in FAMILIES]
)
def test_the_call_on_the_card_runs(tmp_path, family):
    """The samples' own arguments, as a user would type them, with what cannot be typed under the name of its argument."""
    pipeline, scale = family.build(), family.guidance_scale
    facts = facts_of(pipeline, tmp_path, None, columns=family.columns, kwargs=family.kwargs, scale=scale)
    replay = PipelineReplay(
        pipeline, memoryless_scheduler(pipeline.scheduler), 3, guidance_scale=scale, pipeline_kwargs=family.kwargs
    )
    columns = {name: values[:1] for name, values in family.columns.items()}
    images = replay.sample(columns, [torch.Generator().manual_seed(0)])
    assert pipeline_tag_of(facts.call.keys(), images) == task_of(family.name)
    medium = {4: "image", 5: "video"}.get(images.ndim, "audio")
    text = model_card(replace(facts, medium=medium)).text
    call = re.search(r'else "cpu"\)\n(.*?)```', text, re.DOTALL).group(1)
    assert run(call, **facts.call, pipe=pipeline)[medium] is not None


# --------------------------------------------------------------------------------------------------------------- the samples


def test_pictures_are_the_images(tmp_path):
    images = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 1.5, -1.0  # clipped, not wrapped around
    images[2] = images[2, :1]
    assert write_samples(tmp_path, images, ["a", "b", "c"]) == [Sample(f"image_{i}.png", "abc"[i]) for i in range(3)]
    for i, image in enumerate(images.clamp(0, 1)):
        read = torch.tensor(np.asarray(Image.open(tmp_path / f"image_{i}.png"))).permute(2, 0, 1)
        assert (read / 255 - image).abs().max() <= 0.5 / 255 + 1e-9
    write_samples(tmp_path, images[2:, :1].bfloat16(), ["grey"])
    assert Image.open(tmp_path / "image_0.png").mode == "RGB"


def test_videos_move(tmp_path):
    videos = torch.linspace(0, 1, 5).reshape(1, 5, 1, 1, 1).expand(1, 5, 3, 8, 8)
    assert write_samples(tmp_path, videos, ["a"]) == [Sample("video_0.webp", "a")]
    with Image.open(tmp_path / "video_0.webp") as video:
        assert video.n_frames == 5
        video.seek(4)
        assert video.convert("RGB").getpixel((4, 4)) > (240, 240, 240)
    assert write_samples(tmp_path, videos[:, :1], ["a"]) == [Sample("video_0.webp", "a")]


def test_pairs_show_the_base_beside_what_was_tuned(tmp_path):
    before, after = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    write_card(tmp_path, plain_facts(), after, ["a", "b|c"], before)
    assert files_in(tmp_path) == ["README.md", "image_0.png", "image_0_base.png", "image_1.png", "image_1_base.png"]
    assert Image.open(tmp_path / "image_1_base.png").getpixel((0, 0)) == (0, 0, 0)
    assert Image.open(tmp_path / "image_1.png").getpixel((0, 0)) == (255, 255, 255)
    section = (tmp_path / "README.md").read_text().split("## Before and after")[1].split("\n## ")[0]
    assert "| a | ![](image_0_base.png) | ![](image_0.png) |\n| b\\|c | ![](image_1_base.png) | ![](image_1.png) |" in section
    assert set(filter_repo_objects(files_in(tmp_path), allow_patterns=CARD_FILES)) == set(files_in(tmp_path))
    with pytest.raises(ValueError, match="there are 1 images for 2 prompts"):
        write_samples(tmp_path, after, ["a", "b"], before[:1])


def test_sound_is_not_written_and_prompts_are_counted(tmp_path):
    assert write_samples(tmp_path, torch.zeros(1, 2, 100), ["a"]) == []
    assert files_in(tmp_path) == []
    with pytest.raises(ValueError, match="there are 2 images for 1 prompts; pass one prompt for each."):
        write_samples(tmp_path, torch.zeros(2, 3, 4, 4), ["a"])


# --------------------------------------------------------------------------------------------------------------- the trainer


def test_a_trained_model_comes_back_from_its_folder(tmp_path):
    sd3().save_pretrained(tmp_path / "base")
    args = AdjointMatchingConfig(
        str(tmp_path / "run"),
        **{"num_inference_steps": 3, "max_steps": 2, "learning_rate": 1e-2, "reward_scale": 50.0, "logging_steps": 1},
        **{"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"},
        eval_on_start=True,
    )
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = AdjointMatchingTrainer(sd3(), brightness, args, data, data, peft_config=LoraConfig(r=2, lora_alpha=8))
    trainer.train()
    assert trainer._shown.before() is None  # the base was evaluated, the tuned model was not
    base = trainer._shown.base.images
    trainer.evaluate()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained on 2 different prompts." in card and "| ![](image_1_base.png) | ![](image_1.png) |" in card
    drawn = torch.tensor(np.asarray(Image.open(tmp_path / "run" / "image_1_base.png"))).permute(2, 0, 1) / 255
    assert (drawn - base[1]).abs().max() <= 0.5 / 255 + 1e-6
    images, columns = sample(trainer.pipeline), {"prompt": PROMPTS[:1]}
    given = (trainer.replay, trainer.reward, args, trainer.state, columns, trainer.method)
    facts = card_facts(*given, repo_id="me/bright", base_adapters=[])
    write_repository(tmp_path / "up", trainer.pipeline, facts, images)
    loaded = run(snippet(tmp_path / "up"))["pipe"]
    loaded.vae.requires_grad_(False)  # as in training: torch picks the kernel of a convolution by it, and rounds otherwise
    assert torch.equal(sample(loaded), images)
    assert not torch.equal(sample(sd3()), images)
    text = (tmp_path / "up" / "README.md").read_text()
    assert "| metric | base | update 2 |" in text and "| metric | base | update 1 | update 2 |" in text
    assert "| `updates` | 2 |" in text and "| `images per update, at most` | 2 |" in text and "| `LoRA alpha` | 8 |" in text
