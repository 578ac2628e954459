"""Plans of the paper's runs: one a shape, every arm in the table, updates by hand."""

from pathlib import Path

from asgd_jax.training.plan import Exchange, MemoryPlan, Plan
from experiments import paper_plans

ROOT = Path(__file__).parents[2]


def test_every_arm_has_a_row_and_equal_shapes_are_compiled_once(monkeypatch):
    planned = []

    def plan(config):
        planned.append(config)
        return Plan(MemoryPlan(*(2**20 * size for size in (1, 2, 3, 4, 5, 6))), Exchange(1, 0))

    monkeypatch.setattr(paper_plans, "make_plan", plan)
    rows = {row["config"]: row for row in paper_plans.plans()}
    assert len(planned) == 20 < len(rows) == 27
    asgd = rows["mnist_cnn:asgd"]
    assert asgd["total"] == 21.0
    assert asgd["updates"] == 50 * (60_000 // 64)
    assert asgd["batch of an update"] == 64
    ssgd = rows["imagenet_resnet50:ssgd"]
    assert ssgd["updates"] == 90 * (1_281_167 // 8192)
    assert ssgd["batch of an update"] == 8192
    page = paper_plans.plans_page(list(rows.values()))
    assert page.count("\n| ") == len(rows) + 1
    committed = (ROOT / "results" / "paper_plans.md").read_text()
    for name, row in rows.items():
        (line,) = (line for line in committed.splitlines() if line.startswith(f"| {name} "))
        assert line.endswith(f"| {row['updates']:,} |")
