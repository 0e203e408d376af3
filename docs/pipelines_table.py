"""Writes the table of docs/pipelines.md from the rows of tests/families.py.

python docs/pipelines_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "pipelines.md"
BEGIN, END = "<!-- table: python docs/pipelines_table.py -->\n", "<!-- end of table -->\n"

sys.path.insert(0, str(DOCS.parent / "tests"))

from families import FAMILIES, Family  # noqa: E402

from diffusers_adjoint import memoryless_scheduler  # noqa: E402


def line(family: Family) -> str:
    pipeline = family.build()
    host = type(pipeline.scheduler).__name__
    memoryless = type(memoryless_scheduler(pipeline.scheduler)).__name__.removeprefix("Memoryless").removesuffix("Scheduler")
    trained = "all weights" if family.lora is None else "LoRA"
    if family.component:
        trained += f" on `{family.component}`"
    columns = ", ".join(f"`{name}`" for name in family.columns) or "–"
    runs = "`make test`" if family.fast else "`make test-slow`"
    return (
        f"| {family.name} | `{type(pipeline).__name__}` | {family.mechanism} | {columns} | {host.removesuffix('Scheduler')} → "
        f"{memoryless} | {trained} | {runs} |\n"
    )


def table() -> str:
    head = "| family | class | particular | columns | scheduler → memoryless | trained | in |\n|" + "---|" * 7 + "\n"
    return head + "".join(line(family) for family in FAMILIES)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
