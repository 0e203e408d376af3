"""What is installed, and with what. Tool settings are in pyproject.toml, the tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read `__version__` without importing the package: a build has none of its dependencies."""
    source = (ROOT / "src/diffusers_adjoint/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise ValueError('src/diffusers_adjoint/__init__.py has no line `__version__ = "…"`; put one there.')
    return found.group(1)


# The lower bounds are the versions that constraints.txt pins for the oldest Python.
REQUIREMENTS = [
    "torch>=2.8",
    "diffusers>=0.40",
    "transformers>=5.19",
    "peft>=0.20",
    "accelerate>=1.13",
    "trl>=1.13",
    "datasets>=4.8",
    "huggingface_hub>=1.31",
    "safetensors>=0.8",
    "numpy>=1.26",
    "pillow>=10.4",
    "tqdm>=4.66",
]
EXTRAS: dict[str, list[str]] = {
    # HPSv2 needs open_clip, SigLIP's tokenizer the other two. open_clip, dreamsim and lpips
    # bring torchvision, which the package itself does without.
    "rewards": ["open-clip-torch>=3.3", "protobuf>=7.36", "sentencepiece>=0.2"],
    "metrics": ["dreamsim>=0.2.1", "lpips>=0.1.4"],
    # The weights of two text recognisers, and what reads their graphs; examples/words. rapidocr-onnxruntime: up to Python 3.12.
    "words": ["matplotlib>=3.10", "onnx>=1.20", "rapidocr==3.10.0", "rapidocr-onnxruntime==1.4.4"],
    "docs": [
        "latex2mathml>=3.81",
        "mkdocs>=1.6",
        "mkdocs-material>=9.7",
        "mkdocstrings>=1.0",
        "mkdocstrings-python>=2.0",
        "pymdown-extensions>=11.0,<12",
    ],
    "dev": [
        "build>=1.6",
        "ftfy>=6.3",
        "matplotlib>=3.10",
        "mypy>=2.0",
        "onnx>=1.20",
        "pre-commit>=4.0",
        "pytest>=9.0",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "scikit-learn>=1.7",
        "scipy>=1.15",
        "sentencepiece>=0.2",
        "setuptools>=77",
        "tensorboard>=2.20",
        "torchsde>=0.2.6",
        "twine>=7.0",
    ],
}

setup(
    name="diffusers-adjoint",
    version=version(),
    description="Adjoint Matching: reward fine-tuning for any DiffusionPipeline, to p_base(x)·exp(λ r(x))",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_adjoint": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["diffusers-adjoint = diffusers_adjoint.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
