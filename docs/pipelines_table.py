"""Writes the tables of docs/pipelines.md: from the rows of tests/families.py, and from the signatures of diffusers' classes.

python docs/pipelines_table.py
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.loaders import PeftAdapterMixin

DOCS = Path(__file__).parent
PAGE = DOCS / "pipelines.md"
BEGIN, END = "<!-- table: python docs/pipelines_table.py -->\n", "<!-- end of table -->\n"
BEGIN_CLASSES, END_CLASSES = "<!-- classes: python docs/pipelines_table.py -->\n", "<!-- end of classes -->\n"
PIPELINE, NETWORK, ALL = "LoRA, through the pipeline", "LoRA, through the network", "all weights"

sys.path.insert(0, str(DOCS.parent / "tests"))

from families import FAMILIES, Family  # noqa: E402

from diffusers_adjoint import memoryless_scheduler  # noqa: E402
from diffusers_adjoint.model.lora import pipeline_saves_lora  # noqa: E402


def line(family: Family) -> str:
    pipeline = family.build()
    host = type(pipeline.scheduler).__name__
    memoryless = type(memoryless_scheduler(pipeline.scheduler)).__name__.removeprefix("Memoryless").removesuffix("Scheduler")
    lora = "LoRA, through the network" if family.network_lora else "LoRA"
    trained = "all weights" if family.lora is None else lora
    if family.component:
        trained += f" on `{family.component}`"
    columns = ", ".join(f"`{name}`" for name in family.columns) or "–"
    runs = "`make test`" if family.fast else "`make test-slow`"
    return (
        f"| {family.name} | `{type(pipeline).__name__}` | {family.mechanism} | {columns} | {host.removesuffix('Scheduler')} → "
        f"{memoryless} | {trained} | {runs} |\n"
    )


def table() -> str:
    head = "| family | class | what is special | columns | scheduler → memoryless | trained | tested by |\n|" + "---|" * 7 + "\n"
    return head + "".join(line(family) for family in FAMILIES)


def exported() -> Iterator[type[DiffusionPipeline]]:
    """The pipeline classes of diffusers, but those of other frameworks than torch."""
    for name in sorted(dir(diffusers)):
        found = getattr(diffusers, name, None)
        if inspect.isclass(found) and issubclass(found, DiffusionPipeline) and found is not DiffusionPipeline:
            yield found


def how_it_is_trained(pipeline_class: type[DiffusionPipeline]) -> str:
    """One of the three ways, or why there is none, from signatures alone."""
    parts = typing.get_type_hints(pipeline_class.__init__)
    networks = {name: [cls for cls in _classes(hint) if issubclass(cls, ModelMixin)] for name, hint in parts.items()}
    names = [name for name in networks if networks[name] and name.removesuffix("_2").endswith(("transformer", "unet"))]
    if not names:
        return "no transformer and no unet among its components"
    schedulers = [
        cls for cls in _classes(parts.get("scheduler")) if issubclass(cls, SchedulerMixin) and cls is not SchedulerMixin
    ]
    if schedulers and not any(_has_counterpart(cls) for cls in schedulers):
        return "its scheduler has no memoryless counterpart"
    call = inspect.unwrap(pipeline_class.__call__)
    if not hasattr(pipeline_class, "prepare_latents") and "randn_tensor" not in getattr(call, "__globals__", {}):
        return "its call draws no latents itself"
    component = next((name for name in ("transformer", "unet") if name in names), names[0])
    if not any(issubclass(cls, PeftAdapterMixin) for cls in networks[component]):
        return ALL
    return PIPELINE if pipeline_saves_lora(pipeline_class, component) else NETWORK


def _classes(hint: object) -> list[type]:
    """The classes in an annotation."""
    inner = [cls for part in typing.get_args(hint) for cls in _classes(part)]
    return [hint, *inner] if inspect.isclass(hint) else inner


def _has_counterpart(cls: type[SchedulerMixin]) -> bool:
    """As it is by default, or of a v-prediction model of data with unit variance."""
    for options in ({}, {"prediction_type": "v_prediction", "sigma_data": 1.0}):
        try:
            memoryless_scheduler(cls(**options))
            return True
        except (TypeError, ValueError):  # a scheduler of tokens wants arguments
            continue
    return False


def classes() -> str:
    found: dict[str, list[str]] = {PIPELINE: [], NETWORK: [], ALL: []}
    for pipeline_class in exported():
        found.setdefault(how_it_is_trained(pipeline_class), []).append(f"`{pipeline_class.__name__.removesuffix('Pipeline')}`")
    return "".join(_folded(way, names) for way, names in found.items())


def _folded(way: str, names: list[str]) -> str:
    """A list to unfold, on GitHub and on the site: some have more than a hundred names."""
    what = way if way in (PIPELINE, NETWORK, ALL) else f"none: {way}"
    return f'<details markdown="1">\n<summary>{what}: {len(names)} classes</summary>\n\n{", ".join(names)}\n\n</details>\n'


def replaced(text: str, begin: str, end: str, table: str) -> str:
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


def main() -> None:
    text = replaced(PAGE.read_text(encoding="utf-8"), BEGIN, END, table())
    PAGE.write_text(replaced(text, BEGIN_CLASSES, END_CLASSES, classes()), encoding="utf-8")


if __name__ == "__main__":
    main()
