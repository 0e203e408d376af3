"""The rows of `benchmarks/efficient_adjoint_matching.py`, and the table of them that the docs show."""

import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import efficient_adjoint_matching as benchmark  # noqa: E402
from rows import read  # noqa: E402


def test_the_record_holds_the_settings():
    recorded, wanted = [row["setting"] for row in read(benchmark.RECORDED)], [asdict(s) for s in benchmark.settings()]
    assert all(recorded.count(setting) == 1 for setting in wanted) and len(recorded) == len(wanted)
    assert benchmark.table(read(benchmark.RECORDED)).count("\n") == len(wanted) + 1


def test_the_docs_have_its_numbers():
    page = (ROOT / "docs/control.md").read_text(encoding="utf-8")
    for row in read(benchmark.RECORDED):
        found = row["found"]
        shares = [f"{found['samplers'][sampler]['share']:.3f}".removeprefix("0") for sampler in ("ODE", "memoryless")]
        assert f"| {shares[0]} | {shares[1]} | {found['nats']['gap']:.1f} |" in page
