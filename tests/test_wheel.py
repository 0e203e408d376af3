"""What is published: both distributions hold what they should, and the wheel trains in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_pipelines import sd3

from diffusers_adjoint import __version__

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
NAME = f"diffusers_adjoint-{__version__}"
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
pytestmark = pytest.mark.slow


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both distributions, built as a release is: the wheel from the source distribution, that from a checkout."""
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("published")
    shutil.copytree(SOURCE, checkout / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copytree(ROOT / "tests", checkout / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    # Without isolation: with it, setuptools would be downloaded.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout)
    assert sorted(path.name for path in folder.iterdir()) == [f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"]
    return folder


def test_they_hold_the_package_the_licence_and_nothing_else(published: Path) -> None:
    sources = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py")} | {"diffusers_adjoint/py.typed"}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    with zipfile.ZipFile(published / f"{NAME}-py3-none-any.whl") as wheel:
        assert set(wheel.namelist()) == sources | {f"{NAME}.dist-info/{name}" for name in about}
        licence = wheel.read(f"{NAME}.dist-info/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()

    with tarfile.open(published / f"{NAME}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("src/diffusers_adjoint.egg-info/")}
    assert names - made == {f"src/{name}" for name in sources} | set(FILES)


def test_an_index_would_take_them(published: Path) -> None:
    assert run(sys.executable, "-m", "twine", "check", "--strict", *published.iterdir()).count("PASSED") == 2


@pytest.fixture(scope="module")
def binaries(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a new environment with the wheel in it, which finds everything else where this one has it."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    wheel = published / f"{NAME}-py3-none-any.whl"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    (site_packages,) = home.glob("lib/python*/site-packages")
    # Folders named in a .pth file come after the environment's own; .pth files in them, an editable install's too, are not read.
    here = sysconfig.get_paths()
    (site_packages / "dependencies.pth").write_text(f"{here['purelib']}\n{here['platlib']}\n")
    return home / "bin"


def test_the_wheel_trains_in_an_environment_of_its_own(binaries: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": environment}
    imported = run(binaries / "python", "-c", "import diffusers_adjoint; print(diffusers_adjoint.__file__)", **options)
    assert Path(imported.strip()).is_relative_to(binaries.parent)
    program = binaries / "diffusers-adjoint"
    assert run(program, "--version", **options).strip().endswith(__version__)

    sd3().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run(program, "train", "--config", "recipe.yaml", **options)
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)  # they start at zero


RECIPE = """
model_name_or_path: model
dataset_name: prompts.txt
reward_funcs: brightness
output_dir: out
use_peft: true
lora_r: 2
num_inference_steps: 3
pipeline_kwargs: {max_sequence_length: 8}
per_device_train_batch_size: 2
max_steps: 1
probe_base: false
num_images_to_log: 0
save_strategy: "no"
report_to: none
use_cpu: true
"""
