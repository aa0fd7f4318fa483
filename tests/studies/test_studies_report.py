"""Studies: the reported numbers, and the committed results in docs/studies.md."""

import json
import math

import pytest
from helpers import REPOSITORY

from studies import report


def result(arm: str, seed: int, accuracy: float) -> dict:
    times = {"seconds": 10.0 + seed, "machines": []}
    more = {"labels": "20 labels", "images": 10000, "curve": [accuracy], "pretrain": None, "finetune": times}
    return {"arm": arm, "seed": seed, "accuracy": accuracy, **more}


def test_numbers_of_the_table():
    """Calculated by hand: the standard deviations of 1, 2, 4 and 0, 2, 1 are (7 / 3) ** 0.5 and 1."""
    runs = [result("a", seed, value) for seed, value in ((2, 1.0), (0, 0.0), (1, 2.0))]  # in any order
    runs += [result("b", seed, value) for seed, value in ((0, 1.0), (1, 2.0), (2, 4.0))]
    first, second = report.summary(runs)
    assert (first["mean"], first["std"], first["seeds"]) == (1.0, 1.0, [0, 1, 2])
    assert "compared" not in first
    assert second["mean"] == pytest.approx(7 / 3)
    assert second["std"] == pytest.approx(math.sqrt(7 / 3))
    assert (second["pretrain_seconds"], second["finetune_seconds"]) == (0, 11.0)
    wanted = {"difference": 4 / 3, "std": math.sqrt(7 / 3), "effect": 4 / 3 / math.sqrt((7 / 3 + 1) / 2)}
    half = 4.302653 * math.sqrt(7) / 3  # the t of a table with two degrees of freedom
    assert second["compared"].pop("interval") == pytest.approx((4 / 3 - half, 4 / 3 + half))
    assert second["compared"] == pytest.approx(wanted)
    machines = [{"jobs": 1, "cpu": "a CPU", "cores": 2, "torch": "2", "dates": ["today"]}]
    text = report.markdown({"runs": runs, "machines": machines, "budget": "cpu"})
    assert "| 20 labels | b | 2.33 ± 1.53 | +1.33 ± 1.53 | -2.46 to +5.13 | +1.0 | 3 | 0 + 11 |" in text
    assert report.compare([1.0], [2.0]) == {"difference": -1.0, "std": None, "interval": None, "effect": None}


def test_the_table_names_the_machines_of_the_runs():
    """And this machine for runs that did not record theirs."""
    here = {"cpu": "here", "cores": 2, "jobs": 2, "torch": "2", "date": "2030-01-09"}
    runs = [result("a", seed, 1.0) for seed in range(4)]
    for r, date in zip(runs, ("2030-01-02", "2030-01-01", "2030-01-03", "2030-01-02"), strict=True):
        r["finetune"]["machines"] = [here | {"cpu": "there", "date": date}]
    (found,) = report.machines(runs, here)
    assert (found["cpu"], found["dates"]) == ("there", ["2030-01-01", "2030-01-03"])
    runs[0]["finetune"]["machines"] = []
    machines = report.machines(runs, here)
    text = report.markdown({"runs": runs, "machines": machines, "budget": "cpu"})
    assert text.endswith(
        "\nhere, 2 cores, 2 runs at a time, torch 2, 2030-01-09; "
        "there, 2 cores, 2 runs at a time, torch 2, 2030-01-01 to 2030-01-03.\n"
    )


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("studies/results/*/results.json")), ids=lambda p: p.parent.name)
def test_the_page_tells_what_was_found(path):
    """It has the table of every committed result, as calculated from its numbers, and the command."""
    results = json.loads(path.read_text())
    table, page = path.with_name("table.md").read_text(), (REPOSITORY / "docs" / "studies.md").read_text()
    assert report.markdown(results) == table
    assert table.split("\n\n")[0] in page
    assert results["command"] in page
    assert results["commit"][:7] in page
    assert "dirty" not in results["commit"]
    assert f"../studies/results/{path.parent.name}/plot.png" in page
