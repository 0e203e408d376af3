"""The model card: metadata for the Hub, and text for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub import ModelCard, ModelCardData

from ..metrics.table import escaped
from ..model.lora import ADAPTER, WEIGHTS_NAME, pipeline_saves_lora
from ..objectives.papers import Paper

__all__ = ["CardFacts", "Licence", "Medium", "Sample", "model_card"]

Medium = Literal["image", "video", "audio"]

PACKAGES = ("diffusers-adjoint", "diffusers", "transformers", "peft", "torch")


@dataclass(frozen=True)
class Sample:
    """A sample shown on the card.

    Args:
        file: name of the file in the repository.
        prompt: its prompt.
        before: file of the base's sample from the same prompt and seed; `None` if there is none.
    """

    file: str
    prompt: str
    before: str | None = None


@dataclass(frozen=True)
class Licence:
    """Licence of the base, from its own card: the Hub's identifier, and a name and a link if that is "other"."""

    id: str | list[str]
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """The facts that a model card states; `card_facts` collects them from a trainer.

    Args:
        repo_id: Hub id or name that the card's code loads from; its last part is the title.
        pipeline_class: class of the pipeline.
        component: name of the trained network in the pipeline.
        network_class: name of the class of that network.
        dtype: dtype of the base's weights, such as "torch.float32".
        call: arguments of the pipeline's call that made the first sample.
        settings: content of the settings table, name → value, with reward_scale among them.
        rewards: name → weight.
        paper: paper of the method.
        reward_texts: name → first paragraph of the reward's docstring, if it has one.
        num_prompts: number of different prompts in the training set; `None` if unknown.
        output: name of the pipeline's output that contains the samples; `None` if unknown.
        guiders: name of a guider of a modular pipeline → its scale, 1 for off.
        needs_gradient: whether the method differentiates the reward.
        tilts: whether the method's fixed point is the tilted distribution.
        log_history: log lines of the trainer.
        base_adapters: names of the base's own adapters; `None` after full fine-tuning.
        guided: whether classifier-free guidance acted in training or sampling.
        given_start: whether sampling starts from a noisy image instead of noise.
        base_model, licence, dataset: Hub id of the base, its licence, Hub id of the dataset; `None` if unknown.
        tags: further tags.
        medium, pipeline_tag, samples: filled in by `write_card`.
    """

    repo_id: str
    pipeline_class: type[DiffusionPipeline | ModularPipeline]
    component: str
    network_class: str
    dtype: str
    call: Mapping[str, Any]
    settings: Mapping[str, Any]
    rewards: Mapping[str, float]
    paper: Paper
    reward_texts: Mapping[str, str] = field(default_factory=dict)
    num_prompts: int | None = None
    output: str | None = None
    guiders: Mapping[str, float] = field(default_factory=dict)
    needs_gradient: bool = True
    tilts: bool = True
    log_history: Sequence[Mapping[str, Any]] = ()
    base_adapters: Sequence[str] | None = None
    guided: bool = False
    given_start: bool = False
    base_model: str | None = None
    licence: Licence | None = None
    dataset: str | None = None
    tags: Sequence[str] = ()
    medium: Medium = "image"
    pipeline_tag: str | None = None
    samples: Sequence[Sample] = ()


def model_card(facts: CardFacts) -> ModelCard:
    """Make the model card from its facts; does not access the network."""
    adapter = facts.base_adapters is not None
    licence = facts.licence or Licence("")
    tags = [facts.pipeline_tag, "diffusers", "diffusers-training", "adjoint-matching", *facts.tags]
    tags += ["lora", "template:sd-lora"] if adapter else []
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation=("adapter" if adapter else "finetune") if facts.base_model else None,
        library_name="diffusers",
        pipeline_tag=facts.pipeline_tag,
        license=licence.id or None,
        license_name=licence.name,
        license_link=licence.link,
        datasets=facts.dataset,
        tags=[tag for tag in tags if tag],
        widget=[{"text": sample.prompt or "-", "output": {"url": sample.file}} for sample in facts.samples] or None,
    )
    sections = [_headline(facts), "<Gallery />" if facts.samples else "", _how_to_load(facts), _target(facts)]
    sections += [
        _pairs(facts),
        _settings_table(facts),
        _results(facts),
        _limitations(facts),
        f"## Citation\n\n```bibtex\n{facts.paper.bibtex}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text for text in sections if text) + "\n")


def _headline(facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "a pipeline"
    what = "A full fine-tuning" if facts.base_adapters is None else "A LoRA"
    return (
        f"# {escaped(facts.repo_id.split('/')[-1])}\n\n"
        f"{what} of the {facts.component} ({facts.network_class}) of {base} ({facts.pipeline_class.__name__}), made with "
        f"[{facts.paper.method}]({facts.paper.url}), which tunes a model to a "
        f"{'differentiable ' if facts.needs_gradient else ''}reward."
    )


def _how_to_load(facts: CardFacts) -> str:
    name, adapter = facts.pipeline_class.__name__, facts.base_adapters is not None
    module = "diffusers" if getattr(diffusers, name, None) is facts.pipeline_class else facts.pipeline_class.__module__
    source = (facts.base_model or "path/to/the/base") if adapter else facts.repo_id
    lines = ["import torch", f"from {module} import {name}", ""]
    if not _is_modular(facts):
        lines += [f"pipe = {name}.from_pretrained({_quoted(source)}, dtype={facts.dtype})"]
    else:
        lines += [f"pipe = {name}.from_pretrained({_quoted(source)})", f"pipe.load_components(dtype={facts.dtype})"]
        lines += [f"pipe.update_components({name}=pipe.{name}.new({_guidance(scale)}))" for name, scale in facts.guiders.items()]
    lines += _adapter_lines(facts, facts.base_adapters) if facts.base_adapters is not None else []
    lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")']
    return "\n".join(["## How to load", "", "```python", *lines, *_call_lines(facts), "```"])


def _is_modular(facts: CardFacts) -> bool:
    return issubclass(facts.pipeline_class, ModularPipeline)


def _guidance(scale: float) -> str:
    """Arguments of a guider. Scale 1 is a guider that is active in no step: blocks fail with a disabled guider, or enable it."""
    return "start=0.0, stop=0.0" if scale == 1 else f"guidance_scale={scale:g}, enabled=True"


def _adapter_lines(facts: CardFacts, base_adapters: Sequence[str]) -> list[str]:
    source, named = _quoted(facts.repo_id), f'adapter_name="{ADAPTER}"'
    if pipeline_saves_lora(facts.pipeline_class, facts.component):
        owner, second = "pipe", ", load_into_transformer_2=True" if facts.component == "transformer_2" else ""
        lines = [f"pipe.load_lora_weights({source}, {named}{second})"]
    else:
        owner = f"pipe.{facts.component}"
        lines = [f"{owner}.load_lora_adapter({source}, prefix=None, weight_name={_quoted(WEIGHTS_NAME)}, {named})"]
    if base_adapters:
        names = ", ".join(map(_quoted, [*base_adapters, ADAPTER]))
        lines = ["# The base was tuned with adapters on: load these first, under the names below.", *lines]
        lines += [f"{owner}.set_adapters([{names}])"]
    return lines


def _call_lines(facts: CardFacts) -> list[str]:
    call = {name: value for name, value in facts.call.items() if name not in ("output_type", "return_dict")}
    texts = {name: _literal(value) for name, value in call.items()}
    unknown = [name for name, text in texts.items() if text is None]
    note = [f"# {', '.join(unknown)}: your own, they are not written here"] if unknown else []
    taken = ")[0][0]  # first output, first sample" if facts.output is None else f").{facts.output}[0]"
    if facts.output is not None and _is_modular(facts):
        texts["output"], taken = _quoted(facts.output), ")[0]"
    return [*note, f"{facts.medium} = pipe(", *(f"    {n}={text or n}," for n, text in texts.items()), taken]


def _literal(value: Any) -> str | None:
    """Python source of a value; `None` for images, tensors and other objects, and for local paths."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str):
        return None if Path(value).is_absolute() else _quoted(value)
    if isinstance(value, list | tuple):
        return None if any(_literal(entry) is None for entry in value) else repr(value)
    return repr(value) if isinstance(value, int | float | None) else None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _target(facts: CardFacts) -> str:
    reward = " + ".join(f"{weight:g}·{_code(name)}" for name, weight in facts.rewards.items())
    scale, budget = facts.settings.get("reward_scale"), facts.settings.get("target_kl")
    weight = "a λ" if scale is None else f"λ = {scale:g} nats per unit of reward"  # with a budget, known once training starts
    weight += "" if budget is None else f", found in training for a distance of {budget:g} nats to the base,"
    return (
        f"## What it was tuned for\n\nThe target is p_base(x)·exp(λ r(x)), with {weight} and r = {reward}: the base's own "
        f"distribution, in which samples with a higher reward are more likely. It is not the sample with the highest reward."
        + ("" if facts.tilts else " The method is biased: it converges to a distribution near this target, but not to it.")
        + _prompts(facts.num_prompts)
        + "".join(_reward_lines(facts))
    )


def _prompts(count: int | None) -> str:
    return "" if count is None else f" It was trained on {count} {'prompt' if count == 1 else 'different prompts'}."


def _reward_lines(facts: CardFacts) -> list[str]:
    """A list of the rewards that have a docstring, with its first paragraph."""
    lines = [f"\n- {_code(name)}: {escaped(text)}" for name, text in facts.reward_texts.items()]
    return ["\n", *lines] if lines else []


def _pairs(facts: CardFacts) -> str:
    """The base's samples beside those of the tuned model."""
    pairs = [sample for sample in facts.samples if sample.before is not None]
    rows = [f"| {escaped(sample.prompt)} | ![]({sample.before}) | ![]({sample.file}) |" for sample in pairs]
    head = ["## Before and after", "", "The same prompts and seeds:", "", "| prompt | base | tuned |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows]) if rows else ""


def _settings_table(facts: CardFacts) -> str:
    rows = [[name, str(value)] for name, value in facts.settings.items()]
    made = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"## Settings\n\n{_table(['setting', 'value'], rows)}\n\nMade with {made}."


def _results(facts: CardFacts) -> str:
    evaluations = [line for line in facts.log_history if any(name.startswith("eval_") for name in line)]
    updates = [line for line in facts.log_history if "loss" in line]
    tables = [
        _first_and_last(evaluations, "Samples of the pipeline's own scheduler, from fixed seeds:", "eval_"),
        _first_and_last(updates, "Samples of the memoryless scheduler, during training:", "", _probed(facts.log_history)),
    ]
    return "\n\n".join(["## Results", *(table for table in tables if table)]) if any(tables) else ""


def _probed(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rewards of the base on memoryless paths, which the probe measured before training, by their names in the log."""
    kind, found = "/memoryless", dict[str, float]()
    for name, value in ((n, v) for line in history for n, v in line.items() if n.startswith("probe/re") and n.endswith(kind)):
        known = name.removeprefix("probe/").removesuffix(kind)
        found[known if known == "reward" else f"{known}/mean"] = value
    return found


def _first_and_last(
    lines: Sequence[Mapping[str, Any]], title: str, prefix: str, base: Mapping[str, float] = MappingProxyType({})
) -> str:
    """A table of the first and the last step among these log lines; one column if they are the same.

    Args:
        lines: log lines.
        title: text above the table.
        prefix: only metrics whose names begin with it are shown, without it.
        base: name → the base's value, for a column of its own; empty for none.
    """
    steps = sorted({line["step"] for line in lines})
    ends = {step: {k: v for line in lines if line["step"] == step for k, v in line.items()} for step in (*steps[:1], *steps[-1:])}
    other = ("step", "epoch", "learning_rate", "evaluations_per_second")
    found = dict.fromkeys(name for values in ends.values() for name in values if name.startswith(prefix))
    names = [name for name in found if name not in other and not name.endswith(("runtime", "_per_second"))]
    columns: dict[str, Mapping[str, Any]] = {"base" if step == 0 else f"update {step}": values for step, values in ends.items()}
    columns = {"base": base, **columns} if base else columns
    header = ["metric", *columns]
    rows = [[name.removeprefix(prefix), *(_number(values.get(name)) for values in columns.values())] for name in names]
    return f"{title}\n\n{_table(header, rows)}" if rows else ""


def _limitations(facts: CardFacts) -> str:
    scale, mode = facts.settings["guidance_scale"], facts.settings["cfg_mode"]
    guidance = {
        "rollout": f"Guidance ({scale:g}) acted on the training trajectories but not on the loss, so the result is near the "
        f"target above, but not exactly it.",
        "none": f"The target is that of the model without guidance; guidance ({scale:g}) was used for the samples only.",
        "full": f"p_base is the base guided at {scale:g}; other scales sample another distribution.",
    }
    points = [
        "The target is only as good as the reward: a sample may score high without being better (over-optimisation).",
        "Training approximates the target; the tables say how far the reward rose, not how near the target is.",
        "The weaknesses and biases of the base remain.",
    ]
    points += [guidance[mode]] if facts.guided else []
    points += ["Sampling starts from a noisy image: the target holds for each given start only."] if facts.given_start else []
    return "## Limitations\n\n" + "\n".join(f"- {point}" for point in points)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_code(name), *map(escaped, values)] for name, *values in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A name as inline code for a table: backticks would end the code, and bars would end the cell."""
    return f"`{' '.join(text.replace('`', chr(39)).replace('|', chr(92) + '|').split())}`"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
