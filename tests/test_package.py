"""The shape of the package: which way imports point, how long files are, what is shipped."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffusers_adjoint"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A room imports from its own files and from the rooms above it; the package's __init__ stands above none and below all.
ROOMS = (
    "core",
    "objectives",
    "soc",
    "schedulers",
    "replay",
    "data",
    "pictures",
    "rewards",
    "metrics",
    "field_types",
    "guidance",
    "config",
    "model",
    "hub",
    "trainer",
    "baselines",
    "api",
    "evaluate",
    "ddpo",
    "cli",
)
LEVEL = {room: level for level, room in enumerate(ROOMS)}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # where the import's name is not the distribution's


def parts_of(source: Path) -> tuple[str, ...]:
    return source.relative_to(PACKAGE).with_suffix("").parts


def imported_modules(tree: ast.AST, parts: tuple[str, ...]) -> Iterator[str]:
    """Absolute dotted names of everything imported; `parts` is where the file lies in the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ("diffusers_adjoint", *parts)[: len(parts) + 1 - node.level] if node.level else ()
            module = ".".join([*here, *([node.module] if node.module else [])])
            # `from . import x`: x may be a module, and is one when the package itself is what is imported from.
            yield from ([f"{module}.{alias.name}" for alias in node.names] if module == "diffusers_adjoint" else [module])


def own_and_foreign(source: Path) -> tuple[set[str], set[str]]:
    """Top-level modules of this package, and of others, that a file imports."""
    names = list(imported_modules(ast.parse(source.read_text(encoding="utf-8")), parts_of(source)))
    own = {name.split(".")[1] for name in names if name.startswith("diffusers_adjoint.")}
    foreign = {name.split(".")[0] for name in names} - {"diffusers_adjoint"} - set(sys.stdlib_module_names)
    return own, foreign


def test_import_reader_sees_every_form() -> None:
    tree = ast.parse(
        "import torch.nn\nfrom . import hub, cli\nfrom .. import lora\nfrom ..replay.probe import x\n"
        "from .tilt import y\nfrom diffusers_adjoint.config import z\nfrom diffusers_adjoint import trainer\n"
    )
    own = ["metrics", "lora", "replay.probe", "metrics.tilt", "config", "trainer"]  # the first is the room itself
    assert list(imported_modules(tree, ("metrics", "images"))) == ["torch.nn", *(f"diffusers_adjoint.{name}" for name in own)]
    own = [f"diffusers_adjoint.{name}" for name in ("hub", "cli")]
    assert list(imported_modules(ast.parse("from . import hub\nfrom .cli import main"), ("trainer",))) == own


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: "/".join(parts_of(source)))
def test_imports_point_upwards(source: Path) -> None:
    room = parts_of(source)[0]
    if room == "__init__":
        return
    assert room in LEVEL, f"{room} has no place among the rooms; give it one in ROOMS"
    own, _ = own_and_foreign(source)
    downwards = {name for name in own if LEVEL[name] > LEVEL[room]}
    assert not downwards, f"{room} imports {sorted(downwards)}, which lie below it"


def arrows() -> dict[str, set[str]]:
    """Module → the modules of this package that it imports."""
    modules = {".".join(["diffusers_adjoint", *parts_of(source)]).removesuffix(".__init__"): source for source in SOURCES}
    graph = {}
    for name, source in modules.items():
        imported = imported_modules(ast.parse(source.read_text(encoding="utf-8")), parts_of(source))
        graph[name] = {found for found in imported if found in modules}
    return graph


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = arrows()
    assert "diffusers_adjoint.core.matching" in graph["diffusers_adjoint.core.control_cost"]
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_few_files_lie_flat() -> None:
    assert len([source for source in SOURCES if source.parent == PACKAGE]) <= 8


MATHEMATICS = ("core", "objectives", "soc")


@pytest.mark.parametrize("source", [s for s in SOURCES if s.parent.name in MATHEMATICS], ids=lambda s: "/".join(parts_of(s)))
def test_the_mathematics_needs_torch_alone(source: Path) -> None:
    own, foreign = own_and_foreign(source)
    assert foreign <= {"torch"}
    assert own <= set(MATHEMATICS)


def runtime_requirements() -> list[Requirement]:
    """REQUIREMENTS as setup.py spells it, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIREMENTS":
            return [Requirement(line) for line in ast.literal_eval(node.value)]
    raise AssertionError("setup.py has no REQUIREMENTS")


def test_every_import_is_a_requirement() -> None:
    imported = set().union(*(own_and_foreign(source)[1] for source in SOURCES))
    required = {requirement.name for requirement in runtime_requirements()}
    assert {DISTRIBUTIONS.get(name, name) for name in imported} <= required


def pins(python: str) -> dict[str, Version]:
    """What constraints.txt pins for one Python version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    chosen = [pin for pin in found if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len({pin.name for pin in chosen}) == len(chosen), f"something is pinned twice for Python {python}"
    return {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in chosen}


def test_lower_bounds_are_what_the_oldest_python_tests() -> None:
    oldest, newest = pins("3.10"), pins("3.12")
    for requirement in runtime_requirements():
        bound = Version(str(requirement.specifier).removeprefix(">="))
        pin = oldest[requirement.name]
        assert pin.release[: len(bound.release)] == bound.release, f"{requirement} is tested with {pin} at the lowest"
        assert newest[requirement.name] >= pin


def long_functions(tree: ast.AST, limit: int) -> dict[str, int]:
    """Functions whose body, without the docstring, has more lines than `limit`; a host's long signature is not our doing."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    bodies = {node: node.body[bool(ast.get_docstring(node)) :] for node in functions}
    lengths = {node.name: body[-1].end_lineno - body[0].lineno + 1 for node, body in bodies.items() if body}
    return {name: length for name, length in lengths.items() if length > limit}


def test_no_function_is_long() -> None:
    assert long_functions(ast.parse('def f(a,\n      b):\n    """Text\n\n    more."""\n    a\n    b\n'), 1) == {"f": 2}
    assert {source.name: long for source in SOURCES if (long := long_functions(ast.parse(source.read_text("utf-8")), 40))} == {}


def private_state(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(attribute, trainer's class) of all that begin with "_" and that the class declares, or sets on itself."""
    for owner in ast.walk(tree):
        if isinstance(owner, ast.ClassDef) and owner.name.endswith("Trainer"):
            targets = [getattr(node, "targets", [getattr(node, "target", None)])[0] for node in owner.body]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            stored = [node for node in ast.walk(owner) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
            names |= {node.attr for node in stored if ast.unparse(node.value) == "self"}
            yield from ((name, owner.name) for name in names if name.startswith("_"))


def test_the_state_of_a_trainer_has_one_owner() -> None:
    tree = ast.parse("class ATrainer:\n _a: int\n _b = 0\n\n def f(self):\n  self._c, self.d, self._e.f = 1, 2, 3\n")
    assert sorted(private_state(tree)) == [("_a", "ATrainer"), ("_b", "ATrainer"), ("_c", "ATrainer")]
    owners: dict[str, set[str]] = {}
    for source in SOURCES:
        for name, owner in private_state(ast.parse(source.read_text(encoding="utf-8"))):
            owners.setdefault(name, set()).add(owner)
    assert "_counts" in owners
    assert {name: classes for name, classes in owners.items() if len(classes) > 1} == {}


def swallowed(tree: ast.AST) -> list[int]:
    """Lines of the handlers that do nothing with what they caught."""
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    return [node.lineno for node in handlers if all(isinstance(line, ast.Pass) for line in node.body)]


@pytest.mark.parametrize(
    "word", ["trust_remote_code", r"torch\.load\((?!.*weights_only=True)", "import pickle", "telemetry", r"requests\."]
)
def test_no_foreign_code_is_run_and_nobody_is_told(word: str) -> None:
    """What is unpickled are tensors only; resumed state comes through the host, which reads it like that; nothing phones home."""
    assert not [source.name for source in SOURCES if re.search(word, source.read_text(encoding="utf-8"))]


def test_a_careless_load_would_be_seen() -> None:
    word = r"torch\.load\((?!.*weights_only=True)"
    assert re.search(word, "torch.load(file)") and not re.search(word, "torch.load(file, weights_only=True)")


def test_no_error_is_swallowed() -> None:
    assert swallowed(ast.parse("try:\n    f()\nexcept ValueError:\n    pass\n")) == [3]
    assert {source.name: swallowed(ast.parse(source.read_text(encoding="utf-8"))) for source in SOURCES} == {
        source.name: [] for source in SOURCES
    }


def setup_py(*arguments: str) -> str:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_version_is_read_from_the_source() -> None:
    import diffusers_adjoint

    assert setup_py("--version").splitlines()[-1] == diffusers_adjoint.__version__
    assert str(Version(diffusers_adjoint.__version__)) == diffusers_adjoint.__version__  # as PEP 440 writes it


def test_what_the_package_exports_is_there_by_name_by_star_and_in_its_list() -> None:
    import diffusers_adjoint
    from diffusers_adjoint import api

    namespace: dict[str, object] = {}
    exec("from diffusers_adjoint import *", namespace)
    for name in api.__all__:
        assert getattr(diffusers_adjoint, name) is namespace[name] is getattr(api, name)
    assert {*api.__all__, "__version__"} <= set(dir(diffusers_adjoint))
    with pytest.raises(AttributeError, match="nothing"):
        diffusers_adjoint.nothing  # noqa: B018


def test_every_module_and_the_type_marker_are_shipped(tmp_path: Path) -> None:
    setup_py("build_py", "--build-lib", str(tmp_path))
    shipped = {path.relative_to(tmp_path / PACKAGE.name) for path in tmp_path.rglob("*") if path.is_file()}
    assert shipped >= {source.relative_to(PACKAGE) for source in SOURCES} | {Path("py.typed")}


def test_modules_of_the_examples_and_the_benchmarks_have_names_of_their_own() -> None:
    """The tests of one process import them from several folders, and would get the first of two that are called alike."""
    names = [path.name for folder in ("examples/digits", "examples/words", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    assert len(names) > 20 and len(names) == len(set(names))


def test_no_path_of_a_machine_is_tracked() -> None:
    # A home, work or temporary folder at the start of a path; the lookbehind lets URLs and relative paths through.
    machine_path = re.compile(r"(?<![\w.\-/~])/(?:home|root|Users|work|opt|tmp|var/folders|private/var)/\w")
    assert all(machine_path.search(" /" + path) for path in ("home/me/x", "tmp/pytest-of-me/x", "var/folders/x"))
    assert not machine_path.search("https://example.org/" + "home/x")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if (ROOT / name).is_file()]  # not one just deleted, nor the root itself
    texts = {file: file.read_bytes().decode("utf-8", "ignore") for file in files}
    assert not {file: match.group() for file, text in texts.items() if (match := machine_path.search(text))}
