"""What MkDocs does with the pages beyond its own."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")
NOT_RUN = re.compile(r"^```python no-run$", re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
HOST_TYPE = re.compile(r"<code>`([^`<]+)`[^<]*</code>")
HOST_LINK = re.compile(r"\[(<code>[\w.]+</code>)\]")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a file outside `docs/` works in the repository; on the site its text stays. `no-run` is for the tests only."""
    markdown = OUTSIDE.sub(lambda link: link[1] if (ROOT / link[2]).exists() else link[0], markdown)
    return NOT_RUN.sub("```python", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """LaTeX becomes MathML, which browsers draw by themselves: nothing is fetched, and a mistake stops the build.

    Docstrings in the hosts' style say "name (`type`, defaults to …)" and "[`Class`]": the type alone, and no brackets, are left.
    """
    html = FORMULA.sub(_mathml, html)
    return HOST_LINK.sub(r"\1", HOST_TYPE.sub(r"<code>\1</code>", html))


def _mathml(formula: re.Match[str]) -> str:
    display = "block" if formula["tag"] == "div" else "inline"
    mathml: str = convert(unescape(formula["latex"]).strip(), display=display)
    if "\\" in mathml:  # the converter copies what it does not know
        raise ValueError(f"{formula['latex']!r} contains LaTeX that latex2mathml does not know; write it otherwise.")
    return mathml
