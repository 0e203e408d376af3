"""What MkDocs does with the pages beyond its own."""

from __future__ import annotations

import posixpath
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Pages that are written for the repository and shown on the site, too.
OUTSIDE = ["examples/README.md", "examples/digits/README.md", "examples/words/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PART = re.compile(r"<!-- README\.md: (\w+) -->")
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?!https?:|#|mailto:)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
REMOTE = re.compile(r"(?:https://|git@)(?:[^@/]+@)?(?P<host>[\w.-]+)[:/](?P<path>[\w./-]+?)(?:\.git)?/?")
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
CELL = re.compile(r"<td>(.*?)</td>", re.DOTALL)
NUMBERS = re.compile(r"[−-]?[\d.]+(?:,? [±/→]? ?[−-]?[\d.]+)+(?: \*)?")
HOST_TYPE = re.compile(r"<code>`([^`<]+)`[^<]*</code>")
HOST_LINK = re.compile(r"\[(<code>[\w.]+</code>)\]")


def on_config(config: Any) -> Any:
    """Link to the repository that this checkout came from; without one the site has no such link."""
    asked = subprocess.run(["git", "config", "--get", "remote.origin.url"], cwd=ROOT, capture_output=True, text=True)
    if address := repository(asked.stdout.strip()):
        config.repo_url, config.repo_name = address, "Repository"
    return config


def repository(remote: str) -> str | None:
    """The address of a git remote's pages, without credentials; None for a folder on this machine."""
    found = REMOTE.fullmatch(remote)
    return f"https://{found['host']}/{found['path']}" if found else None


def on_files(files: Any, config: Any) -> Any:
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Parts of README.md are put where a page names them; links lead to a page, or else to the repository."""
    markdown = PART.sub(lambda part: readme_part(part[1]), markdown)
    return LINK.sub(lambda link: site_link(link, page.file.src_uri, config.repo_url), markdown)


def readme_part(name: str) -> str:
    """What stands between two comments of README.md, with links as from the folder docs/."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no part {name!r}; put it between `<!-- {name} -->` and `<!-- end of {name} -->`.")
    return found[1].replace("](docs/", "](")


def site_link(link: re.Match[str], page: str, repository_url: str | None) -> str:
    """A relative link, as it is from `page` on the site. To a file that is no page: into the repository, or its text alone."""
    folder = posixpath.dirname(page if page in OUTSIDE else f"docs/{page}")
    target = posixpath.normpath(posixpath.join(folder, link["target"]))
    anchor = link["anchor"] or ""
    if not (ROOT / target).exists():
        return link[0]
    if target in OUTSIDE or target.startswith("docs/"):
        return f"{link['text']}({posixpath.relpath(target.removeprefix('docs/'), posixpath.dirname(page) or '.')}{anchor})"
    return f"{link['text']}({repository_url}/blob/main/{target}{anchor})" if repository_url else link["text"][1:-1]


def on_page_content(html: str, **_: Any) -> str:
    """LaTeX becomes MathML, which browsers draw by themselves: nothing is fetched, and a mistake stops the build.

    Docstrings in the hosts' style say "name (`type`, defaults to …)" and "[`Class`]": the type alone, and no brackets, are left.
    """
    html = CELL.sub(_cell, FORMULA.sub(_mathml, html))
    return HOST_LINK.sub(r"\1", HOST_TYPE.sub(r"<code>\1</code>", html))


def _cell(cell: re.Match[str]) -> str:
    """Mark numbers that belong together, and sentences: stylesheets/extra.css keeps a phone from breaking or squeezing them."""
    text = re.sub(r"<[^>]+>", "", cell[1]).strip()
    kind = "numbers" if NUMBERS.fullmatch(text) else "prose" if len(text) > 60 else None
    return f'<td class="{kind}">{cell[1]}</td>' if kind else cell[0]


def _mathml(formula: re.Match[str]) -> str:
    is_block = formula["tag"] == "div"
    mathml: str = convert(unescape(formula["latex"]).strip(), display="block" if is_block else "inline")
    if "\\" in mathml:  # the converter copies what it does not know
        raise ValueError(f"{formula['latex']!r} contains LaTeX that latex2mathml does not know; write it otherwise.")
    return f'<div class="formula">{mathml}</div>' if is_block else mathml
