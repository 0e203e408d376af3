"""What `benchmarks/solvers.py` counts and measures with: its costs of an update, its memory, its optima."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from problems import AffineChain, DoubleWell, QuadraticReward, mixture_1d

import diffusers_adjoint.soc.solver as solver

SOURCE = Path(__file__).parents[1] / "benchmarks" / "solvers.py"
spec = importlib.util.spec_from_file_location("solvers_benchmark", SOURCE)
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench  # where its data classes look their annotations up
spec.loader.exec_module(bench)

STEPS = 8
MAKERS = {make.__name__: make for make in bench.TASKS}


@pytest.fixture(scope="module")
def tasks():
    """At K = 8, but for the double well, whose drift is cubic: Euler steps that long run away from it."""
    return {name: make(20 if name == "double_well" else STEPS) for name, make in MAKERS.items()}


def formulas(name, tilt, steps, chosen, earliest):
    """The docstring's table: (trained network, base or drift), each (forward, + VJP, + backward)."""
    if name == "adjoint_matching":
        return (steps, 0, chosen), (1 if tilt else steps + chosen + 1, steps - 1 - earliest, 0)
    if name == "discrete_adjoint":
        return (steps, 0, steps), (1, steps - 1, 0) if tilt else (steps + 2, 2 * steps - 2, 0)
    if name == "back_propagation":
        return (0, 0, steps), (1, steps - 1, 0) if tilt else (2, 2 * steps - 2, 0)
    return (steps, steps - 1, steps), (1, steps - 1, 0) if tilt else (2 * steps + 1, 2 * steps - 2, 0)


@pytest.mark.parametrize("method", bench.METHODS, ids=str)
@pytest.mark.parametrize("name", ["linear_quadratic", "mixture_tilt"])
def test_an_update_costs_what_the_table_says(name, method, tasks, monkeypatch):
    drawn = []

    def choose(*args):
        drawn.append(choose_loss_steps(*args))
        return drawn[-1]

    choose_loss_steps = solver.choose_loss_steps
    monkeypatch.setattr(solver, "choose_loss_steps", choose)
    task, earliest = tasks[name], []
    network, base = bench.count(task, method, updates=3)
    if method.share < 1:
        earliest = [steps.indices[0] for steps in drawn]
        assert [len(steps.indices) for steps in drawn] == [STEPS // 4] * 3
        assert len(set(earliest)) > 1  # or the formula's j would not be tested
    chosen, first = round(method.share * STEPS), sum(earliest) / 3
    expected = formulas(method.name, task.sampler is not None, STEPS, chosen, first)
    assert tuple(network) == expected[0]
    assert tuple(base) == pytest.approx(expected[1], abs=1e-12)  # a mean of three


def test_work_is_summed_by_its_rule(tasks):
    network, base = torch.tensor([4.0, 3.0, 2.0]).numpy(), torch.tensor([5.0, 1.0, 0.0]).numpy()
    assert bench.work(tasks["linear_quadratic"], network, base) == 4 + 2 * 3 + 3 * 2
    assert bench.work(tasks["mixture_tilt"], network, base) == 4 + 2 * 3 + 3 * 2 + 5 + 2 * 1


def test_each_kind_of_evaluation_is_told_apart():
    layer = torch.nn.Linear(2, 2).double()
    counted = bench.Counted(lambda x, t: layer(x), trained=True)
    x, t = torch.ones(3, 2, dtype=torch.float64, requires_grad=True), torch.zeros(())
    with torch.no_grad():
        assert torch.equal(counted(x, t), layer(x))
    counted(x.detach(), t)  # a graph, but no backward pass
    torch.autograd.grad(counted(x, t).sum(), x)
    counted(x.detach(), t).sum().backward()
    counted(x, t).sum().backward()
    assert counted.take().tolist() == [2, 1, 2]
    assert counted.take().tolist() == [0, 0, 0]


def test_live_bytes():
    with bench.LiveBytes() as seen:
        a = torch.zeros(1000, dtype=torch.float64)
        b = a.view(10, 100).t() + 0  # the views hold nothing of their own
        del a
        c = torch.zeros(100, dtype=torch.float64).add_(1)
    assert (seen.live, seen.peak) == (8 * 1100, 8 * 2000)
    assert len(b) == len(c)


def peak(method, steps):
    """Bytes of one update."""
    task = bench.ornstein_uhlenbeck(steps)
    network = task.network()
    with bench.LiveBytes() as seen:
        method.update(task, task.mean(network), torch.optim.SGD(network.parameters(), 0.0), 0)
    return seen.peak


@pytest.mark.parametrize("method", bench.METHODS, ids=str)
def test_memory_grows_by_states_and_not_by_activations(method):
    state = bench.BATCH * 4 * 8
    growth = (peak(method, 16) - peak(method, 8)) / 8
    if method.name == "back_propagation":
        assert growth > 4 * bench.BATCH * bench.WIDTH * 8  # input and output of two SiLUs
    elif method.name == "discrete_adjoint":
        assert growth <= 1.01 * state  # 1 %: the tables of times and stds
    else:
        assert growth <= 4.05 * state  # adjoints, base means and shifts, too


@pytest.mark.parametrize("name", MAKERS)
def test_the_optimum_has_no_error_and_the_base_all_of_it(name, tasks):
    task = tasks[name]
    assert task.control_error(task.optimum) == 0
    assert task.control_error(task.problem.base_mean) == pytest.approx(1, abs=1e-12)  # rounding of float64
    assert task.control_error(task.mean(task.network())) == pytest.approx(1, abs=1e-12)


def test_backward_induction_is_the_riccati_recursion_where_both_apply(tasks):
    task = tasks["gaussian_tilt"]
    chain = AffineChain.of(task.problem.base_mean, task.problem.stds, 1)
    reward = QuadraticReward(torch.tensor([2.0]).double(), torch.tensor([[0.5]]).double(), torch.zeros(1).double())
    best = chain.controlled(*chain.optimal_control(reward))
    # Beyond the grid's ends, ±8, the slope is held constant; 40 nodes reach past them with weights below 1e-7.
    assert task.control_error(best.mean) < 1e-12


def test_backward_induction_goes_to_the_continuous_optimum(tasks):
    well, pair = DoubleWell(), (tasks["double_well"], bench.double_well(40))
    errors = [task.control_error(task.problem.mean(well.control)) for task in pair]
    # The control of Euler's chain is off by O(h), the squared error by O(h²): a fourth, measured .0082 and .0019.
    assert errors[1] < 0.3 * errors[0] < 0.3 * 0.01


def test_riccati_controls_go_to_the_continuous_optimum():
    errors = []
    for steps in (20, 40):
        task = bench.linear_quadratic(steps)
        law = task.base.function.__self__
        errors.append(task.control_error(task.problem.mean(law.control)))
    assert errors[1] < 0.3 * errors[0] < 0.3 * 0.02  # as above


def test_the_exact_velocity():
    law = mixture_1d([0.3, 0.7], [-1, 1], [0.16, 0.5])
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    for t in (0.0, 0.4, 1.0):
        data, noise = law.denoise(x, t, 1 - t)
        # float64, numbers near 1.
        torch.testing.assert_close(
            bench.exact_velocity(law)(x, torch.tensor(t, dtype=torch.float64)), data - noise, atol=1e-12, rtol=0
        )


def test_the_tilts_own_velocity_samples_the_tilt(tasks):
    for name in ("gaussian_tilt", "mixture_tilt"):
        error = tasks[name].tilt_error(bench.exact_velocity(tasks[name].target))
        assert error < 0.05  # 50 steps, 1024 points; the base is .9 and 1.1 away


def test_the_verdict_needs_ranges_apart():
    ours, fewer, theirs = bench.METHODS[0], bench.METHODS[1], bench.METHODS[4]
    text = bench.verdict({ours: [1.0, 2.0], fewer: [0.1, 0.2], theirs: [1.5, 3.0], bench.METHODS[5]: [0.0, 0.0]})
    assert f"against {theirs}" in text
    assert f"{ours}: no difference" in text
    assert f"{fewer}: reproduced" in text
    assert f"{ours}: the reverse" in bench.verdict({ours: [4.0, 5.0], theirs: [1.5, 3.0]})


def test_quick_prints_every_row(capsys, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 4)
    monkeypatch.setattr(bench, "TASKS", (bench.ornstein_uhlenbeck, bench.gaussian_tilt))
    bench.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    for method in bench.METHODS:
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {method} |")]
        assert [len(row) for row in rows] == [9, 5, 6], method  # costs, and two problems: a tilt has a W2
        numbers = [float(cell.split(" ± ")[0]) for row in rows[1:] for cell in row[1:]]
        assert all(0 < number < 100 for number in numbers), method
    assert sum(line.startswith("The paper's finding") for line in lines) == 2
