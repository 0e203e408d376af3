"""The pages say what is true: their Python runs, their commands exist, their tables are complete."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_imagereward import tiny_imagereward
from tiny_pipelines import sd3, sd15
from tiny_rewards import aesthetic_head, tiny_classifier, tiny_clip, tiny_siglip
from tiny_trainer import brightness, make_trainer
from torch.distributed.run import get_args_parser
from transformers import TrainingArguments

from diffusers_adjoint import AdjointMatchingConfig, rewards
from diffusers_adjoint.cli.commands import COMMANDS, parse_arguments, parse_evaluation_arguments
from diffusers_adjoint.evaluate import EvaluationArguments
from diffusers_adjoint.model.lora import add_lora, save_lora
from diffusers_adjoint.rewards import around, image_statistics

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

# What cannot be had offline, or not in seconds: regular expression on the page → in the test. {sd3} and the like are folders.
SUBSTITUTIONS = {
    r'"stabilityai/stable-diffusion-3.5-medium"': '"{sd3}"',  # a tiny pipeline of the same class
    r'"stable-diffusion-v1-5/stable-diffusion-v1-5"': '"{sd15}"',
    r'"me/my-model"': '"{sd3}"',
    r'"me/my-lora"': '"{lora}"',
    r'"examples/digits/pipeline"': '"{digits}"',
    r"PickScore\(\)": 'PickScore("{clip}", "{clip}")',
    r"CLIPScore\(\)": 'CLIPScore("{clip}")',
    r"ImageReward\(\)": 'ImageReward("{imagereward}", "{imagereward}/bert")',
    r"AestheticScore\(\)": 'AestheticScore("{aesthetic}", "{clip}")',
    r'negative="a photo taken in winter"': r'\g<0>, model="{siglip}"',
    r'"google/vit-base-patch16-224", label=281': '"{classifier}", label=2',
    r"torch\.rand\(2, 3, 512, 512\)": "torch.rand(2, 3, 32, 32)",
    r"max_steps=\d+": "max_steps=1",
    r"(save|eval)_steps=\d+": r"\1_steps=1",
    r"num_inference_steps=(10|20|200)\b": "num_inference_steps=4",
    r"per_device_(train|eval)_batch_size=10": r"per_device_\1_batch_size=2",
    r"num_generations_eval=8": "num_generations_eval=2",
    r"for digit in digits": "for digit in digits[:2]",
    r'output_dir="out"': 'output_dir="out", num_inference_steps=4',
}
# The command line that a page gives its script, shortened in the same way.
ARGUMENTS = {
    "migrating_from_ddpo.md": "--pretrained_model {sd15} --output_dir warm --reward_scale 50 --max_steps 1 "
    "--num_inference_steps 4 --guidance_scale 5 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
}


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(info string, code) of a page's blocks of one language."""
    found = BLOCK.finditer(text_of(page))
    return [(match["info"], match["code"]) for match in found if match["info"].split()[0] == language]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


# ------------------------------------------------------------------------------------------------------------------ Python blocks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """What the pages would download, in tiny form."""
    home = tmp_path_factory.mktemp("hub")
    for name, build in {"sd3": sd3, "sd15": sd15}.items():
        build().save_pretrained(home / name)
    for name, build in {"clip": tiny_clip, "siglip": tiny_siglip, "classifier": tiny_classifier}.items():
        build(home / name)
    for name in ("imagereward", "aesthetic"):
        (home / name).mkdir()
    tiny_imagereward(home / "imagereward")
    save_file(aesthetic_head(), home / "aesthetic/model.safetensors")
    add_lora(pipeline := sd3(), "transformer", LoraConfig(r=2))
    save_lora(pipeline, "transformer", home / "lora")
    return {path.name: str(path) for path in home.iterdir()} | {"digits": str(ROOT / "examples/digits/pipeline")}


def substituted(code: str, folders: dict[str, str]) -> str:
    for pattern, replacement in SUBSTITUTIONS.items():
        code = re.sub(pattern, lambda match, text=replacement: match.expand(text.format(**folders)), code)
    return code


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, folders, tmp_path, monkeypatch):
    """In order, in one namespace, as the script of a reader who copies a page from its top."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py", *ARGUMENTS.get(page, "").format(**folders).split()])
    namespace = {"__name__": "__main__"}
    for _, code in blocks(page, "python"):
        exec(compile(substituted(code, folders), f"{page}: {code.splitlines()[0]}", "exec"), namespace)


def test_every_substitution_is_needed():
    code = "\n".join(code for page in PAGES for _, code in blocks(page, "python"))
    assert [pattern for pattern in SUBSTITUTIONS if not re.search(pattern, code)] == []


# ----------------------------------------------------------------------------------------------------------------------- commands


def command_lines() -> list[tuple[str, list[str]]]:
    """(page, words) of every line in a bash block, and of inline code that begins with a program."""
    lines = []
    for page in PAGES:
        for _, code in blocks(page, "bash"):
            lines += [(page, line) for line in code.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`((?:make|python|pip|accelerate launch|diffusers-adjoint) [^`]+)`", BLOCK.sub("", text_of(page)))
        lines += [(page, line.replace("\n", " ")) for line in inline if "…" not in line]
    split = [(page, shlex.split(line, comments=True)) for page, line in lines]
    return [(page, words) for page, words in split if words]


PARSERS = {"train": parse_arguments, "evaluate": parse_evaluation_arguments}


def check_command(words: list[str]) -> None:
    """Fails unless program, target, file, module and options exist; the options by the programs' own parsers."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "diffusers-adjoint":
        command, *options = rest
        assert command in COMMANDS
        if command in PARSERS and options not in ([], ["--help"]):
            PARSERS[command](options)
    elif program == "accelerate":
        assert rest[0] == "launch"
        launch = launch_command_parser().parse_args(rest[1:])
        assert launch.config_file is None or Path(launch.config_file).is_file()
        check_started(launch.training_script, launch.module, launch.training_script_args)
    elif program == "torchrun":
        run = get_args_parser().parse_args(rest)
        check_started(run.training_script, run.module, run.training_script_args)
    elif program == "python":
        check_started(rest[0], False, rest[1:])
    else:
        assert words[:2] == ["pip", "install"], f"{program} is new here: say how to check it"


def check_started(target: str, is_module: bool, arguments: list[str]) -> None:
    if target == "diffusers_adjoint.cli":
        check_command(["diffusers-adjoint", *arguments])
    elif is_module:
        assert importlib.util.find_spec(target) is not None
    elif target not in ("script.py", "train.py"):  # the reader's own
        source = Path(target).read_text(encoding="utf-8")
        named = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert all(option in source or "read_arguments" in source for option in named)


@pytest.mark.parametrize(
    ("page", "words"), command_lines(), ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_commands_exist(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(words)


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page):
    text = text_of(page)
    named = re.findall(r"[`(\s](?:\.\./)?((?:tests|examples|benchmarks|docs)/[\w./*-]*[\w/*])", text)
    assert [name for name in named if not list(ROOT.glob(name))] == []


# ------------------------------------------------------------------------------------------------------------------------- tables


def test_the_table_of_metrics_is_complete(tmp_path):
    """Everything that is logged has a row, and every row is logged."""
    text = text_of("trainer.md")
    rows = set(re.findall(r"^\| `([\w/<>]+)` \|", text[text.index("## What is logged") :], re.MULTILINE))
    logged = set()
    both = {"probe_base": True, "max_steps": 1, "num_generations": 2, "eval_dataset": [{"prompt": "a cat"}]}
    for folder, options in (
        ("plain", {}),
        ("guided", {"guidance_scale": 4.0, "cfg_mode": "rollout", "reward": [brightness, brightness]}),
        ("ram", {"loss_type": "ram", "loss_kwargs": {"clip": 3.0}}),
        ("budget", {"target_kl": 0.5, "reward_scale": None}),
    ):
        trainer = make_trainer(tmp_path / folder, **both, **options)
        trainer.train()
        trainer.evaluate()
        logged |= {name for line in trainer.state.log_history for name in line if not name.startswith(("train_", "total_"))}
    functions = {re.sub(r"rewards/brightness(_1)?", "rewards/<name>", name) for name in logged - {"step"}}
    assert rows == {re.sub(r"^probe/(?!rewards?/)\w+", "probe/<statistic>", name) for name in functions}


def test_every_setting_of_ours_is_discussed():
    ours = {field.name for field in dataclasses.fields(AdjointMatchingConfig)}
    ours -= {field.name for field in dataclasses.fields(TrainingArguments)}
    ours -= {"adjoint_pairing"}  # it only says where it has moved to
    text = text_of("choosing_settings.md")
    assert {name for name in ours if f"`{name}`" not in text} == set()


def test_the_tables_of_rewards_are_complete():
    """Every reward and every function around rewards that the package exports."""
    classes = [name for name in rewards.__all__ if isinstance(getattr(rewards, name), type)]
    made = {name for name in classes if issubclass(getattr(rewards, name), torch.nn.Module)}
    assert rows_after("rewards.md", "## All rewards") == made | {*image_statistics.__all__, "motion"}
    assert rows_after("rewards.md", "## Functions around rewards") == set(around.__all__)
    assert made | {*image_statistics.__all__, *around.__all__} <= set(rewards.__all__)


def test_the_table_of_evaluation_options_is_complete():
    """Every option with its default."""
    shown = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", section("evaluation.md", "## Options"), re.MULTILINE)
    assert dict(shown) == {field.name: default_of(field) for field in dataclasses.fields(EvaluationArguments)}


def default_of(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is False:
        return "off"
    return " ".join(map(str, value if isinstance(value, list) else [value])).replace("None", "") or "–"


def rows_after(page: str, heading: str) -> set[str]:
    """First column of the table in a section."""
    return set(re.findall(r"^\| `(\w+)` \|", section(page, heading), re.MULTILINE))


def section(page: str, heading: str) -> str:
    return text_of(page).split(f"{heading}\n")[1].split("\n## ")[0]


# ---------------------------------------------------------------------------------------------------------------------- reference


ENTRY = re.compile(r"^::: (?P<name>[\w.]+)\n(?P<options>(?:    .*\n)*)", re.MULTILINE)


def entries() -> list[tuple[str, str, list[str]]]:
    """(page, dotted name, documented members) of the pages' reference."""
    found = [(page, entry) for page in ("api.md", "trainer.md") for entry in ENTRY.finditer(text_of(page))]
    members = [re.findall(r"\w+", "".join(re.findall(r"members: \[(.*)\]", entry["options"]))) for _, entry in found]
    return [(page, entry["name"], named) for (page, entry), named in zip(found, members, strict=True)]


@pytest.mark.parametrize("package", ["", ".rewards", ".metrics", ".evaluate", ".ddpo"])
def test_every_public_name_has_its_reference(package):
    """Once, and under a name that leads to the very thing: a module may have the name of a function."""
    module = importlib.import_module(f"diffusers_adjoint{package}")
    documented = [pkgutil.resolve_name(name) for _, name, _ in entries()]
    for name in module.__all__:
        assert sum(thing is getattr(module, name) for thing in documented) == 1, name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")  # the extra "docs"
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_entry_of_the_reference_shows_a_signature(site):
    for page, name, members in entries():
        html = (site / page.removesuffix(".md") / "index.html").read_text(encoding="utf-8")
        shown = re.search(rf'<h\d id="{re.escape(name)}".*?(?=<div class="doc doc-contents)', html, re.DOTALL)
        assert shown and "doc-signature" in shown[0], f"{name} has no signature"
        short = name.split(".")[-1]
        assert f"{short}(" in re.sub(r"<[^>]+>", "", shown[0]), f"{name} shows something else"
        missing = [member for member in members if f'id="{name}.{member}"' not in html]
        assert not missing, f"{name} has no {missing}"


def test_no_description_of_the_reference_becomes_a_quotation(site):
    """A description that begins with ">" does."""
    assert "<blockquote>" not in (site / "api/index.html").read_text(encoding="utf-8")


def test_the_site_shows_what_stands_elsewhere(site):
    """Parts of README.md on the first page, the examples as pages of the menu, and no link into the folder above."""
    first = (site / "index.html").read_text(encoding="utf-8")
    shown = re.sub(r"<[^>]+>", "", first)
    assert "% of the way" in shown and "pip install -e ." in shown and "trainer.save_model()" in shown
    assert first.count('src="images/') == 2
    assert 'href="examples/"' in first and 'href="examples/digits/"' in first
    assert "README.md:" not in first
    for page in site.glob("**/index.html"):
        assert not re.search(r'href="[^":]*\.(?:md|py|yaml)"', page.read_text(encoding="utf-8")), page


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("latex2mathml")  # the extra "docs"
    found = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/me/diffusers_adjoint.git", "https://github.com/me/diffusers_adjoint"),
        ("https://name:token@github.com/me/diffusers_adjoint", "https://github.com/me/diffusers_adjoint"),
        ("git@github.com:me/diffusers_adjoint.git", "https://github.com/me/diffusers_adjoint"),
        ("/srv/clones/diffusers_adjoint", None),
        ("", None),
    ],
)
def test_the_repository_is_linked_without_credentials(hooks, remote, address):
    assert hooks.repository(remote) == address


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("quickstart.md", "[a](rewards.md#videos)", "[a](rewards.md#videos)"),
        ("quickstart.md", "[a](../examples/README.md)", "[a](examples/README.md)"),
        ("quickstart.md", "[a](../examples/sd15.py)", "[a](https://host/me/it/blob/main/examples/sd15.py)"),
        ("examples/digits/README.md", "[a](../../docs/results.md#objectives)", "[a](../../results.md#objectives)"),
        ("examples/README.md", "[a](digits/README.md)", "[a](digits/README.md)"),
        ("quickstart.md", "functions[0](images)", "functions[0](images)"),
    ],
)
def test_links_of_the_repository_are_links_of_the_site(hooks, page, written, shown):
    assert hooks.LINK.sub(lambda link: hooks.site_link(link, page, "https://host/me/it"), written) == shown


def test_a_file_that_is_no_page_keeps_its_text_where_no_repository_is_known(hooks):
    link = hooks.LINK.search("see [this](../examples/sd15.py)")
    assert hooks.site_link(link, "quickstart.md", None) == "this"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (".398 / .256 / .155", "numbers"),
        ("-0.0038 ± 0.0010 *", "numbers"),
        ("20 / 0 / 20", "numbers"),
        ("14.9 → 18.5", "numbers"),
        ("<code>cfg_mode</code> 1", None),
        ("a sentence of more than sixty characters, which a narrow column would squeeze", "prose"),
    ],
)
def test_cells_are_marked_by_what_they_hold(hooks, text, kind):
    marked = f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"
    assert hooks.on_page_content(f"<td>{text}</td>") == marked


def test_a_part_of_the_readme_that_is_not_there_stops_the_build(hooks):
    with pytest.raises(ValueError, match="no part 'sunset'; put"):
        hooks.readme_part("sunset")


LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#([^)\s]+))?\)")
FOLDERS = (".", "docs", "examples/**", "benchmarks/**")
LINKING = sorted({path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md")})


@pytest.mark.parametrize("page", LINKING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    """A relative link's file is in the repository, and has the heading that the link names."""
    for target, anchor in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        file = page.parent / target
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target} has no heading {anchor}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them, and of the reference."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {entry["name"] for entry in ENTRY.finditer(text)} | {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_the_seeds_of_the_demo_are_told_alike():
    """The rows of its seeds stand in two places."""
    digits = (ROOT / "examples/digits/README.md").read_text(encoding="utf-8")
    known = [numbers(row) for row in digits.splitlines() if row.startswith("|")]
    seeds = section("results.md", "## Handwritten digits").split("Both rewards;")[1]
    rows = [row for row in seeds.splitlines() if row.startswith("|") and len(numbers(row)) >= 4]
    assert len(rows) == 7
    for row in rows:
        assert any(found[: len(numbers(row))] == numbers(row) for found in known), row


def test_the_numbers_of_the_readme_are_recorded():
    readme = " ".join(text_of("README.md").split())
    share = re.search(r"reward \(ink\) \| ODE .* (0\.\d+) ± (0\.\d+) \|", section("results.md", "## Handwritten digits"))
    assert f"{100 * float(share[1]):.0f} ± {100 * float(share[2]):.0f} % of the way" in readme
    seconds = re.search(r"(\d+) s of fine-tuning", section("results.md", "## Handwritten digits"))
    assert f"{seconds[1]} seconds of training" in readme
    ode = section("results.md", "## Discretisation").split("| memoryless, on")[0]
    ours = re.search(r"^\| \*\*`ancestral`.*? \| (\S+) /", ode, re.MULTILINE)  # at K = 10
    papers = re.search(r"^\| `euler`, paper.*? \| .*? / .*? / (\S+) \|", ode, re.MULTILINE)  # at K = 40
    assert f"a distance of {ours[1]} against {papers[1]}" in readme
    families = section("pipelines.md", "## Tested families").split("<!-- end of table -->")[0]
    tested = families.count("\n| ") - 1  # without the row of headings
    assert f"[{tested} of them]" in readme and f"| {tested} rows in tiny form" in text_of("status.md")
    assert len(text_of("README.md").splitlines()) <= 120


def test_the_share_of_shortened_shifts_is_recorded():
    rows = re.findall(r"^\| \**score, cap 1\.2\**.*?\| (\d+) % \|", section("results.md", "## Error against work"), re.MULTILINE)
    shares = sorted(map(int, rows))
    assert f"On the digits it is {shares[0]} to {shares[-1]} %" in " ".join(text_of("theory.md").split())


def numbers(row: str) -> list[str]:
    """Those with decimals, as written but for a leading zero."""
    return re.findall(r"\.\d+", row)
