"""Test how the time of models is measured."""

from types import SimpleNamespace

import pytest
import torch

from Evaluation import cost
from tools import model_card

CPU = torch.device("cpu")


def test_time_is_measured_in_turns(monkeypatch):
    """A slow model halves the batch for all; a model of one image has no throughput."""
    clock, calls = [0.0], []

    def model(name, seconds, only_one=False):
        def compute(imgs):
            calls.append((name, len(imgs)))
            clock[0] += seconds * len(imgs)

        pixels = SimpleNamespace(channels=1)
        return SimpleNamespace(
            compute=compute, device=CPU, only_one=only_one, preparation=SimpleNamespace(pixels=pixels, size=(2, 2))
        )

    monkeypatch.setattr("util.hardware.time.perf_counter", lambda: clock[0])
    rows = cost.measure_time([model("a", 0.01), model("b", 0.1), model("c", 0.02, True)], 64, 2, limit=2.6)
    assert [row["batch"] for row in rows] == [4] * 3
    assert [row["rounds"] for row in rows] == [2] * 3
    assert rows[1]["latency_ms"] == {name: pytest.approx(100) for name in ("median", "least", "most")}
    assert rows[0]["images_per_second"]["median"] == pytest.approx(100)
    assert "images_per_second" not in rows[2]
    turn = [("a", 1), ("a", 4), ("b", 1), ("b", 4), ("c", 1)]
    assert calls[-25:] == turn * 5


def test_a_busy_machine(monkeypatch):
    """Slow calls at first do not decide how many rounds there are, and the card says that rounds differ."""
    clock, calls = [0.0], []

    def compute(imgs):
        calls.append(len(imgs))
        clock[0] += 0.5 if len(calls) < 5 or len(calls) == 30 else 0.001

    shape = SimpleNamespace(pixels=SimpleNamespace(channels=1), size=(2, 2))
    model = SimpleNamespace(compute=compute, device=CPU, only_one=False, preparation=shape)
    monkeypatch.setattr("util.hardware.time.perf_counter", lambda: clock[0])
    (row,) = cost.measure_time([model], 64, 20, limit=25)
    assert (row["rounds"], row["batch"]) == (20, 64)
    assert "The rounds differ widely" in "".join(model_card.cost_of({"cost": row}))
    row["latency_ms"], row["images_per_second"] = (cost.spread([1.0, 2.0]) for _ in range(2))
    assert "The rounds differ widely" not in "".join(model_card.cost_of({"cost": row}))
    clock[0], calls[:] = 0.0, []
    monkeypatch.setattr(cost, "taken", lambda model, imgs: 10.0)
    assert cost.measure_time([model], 64, 20, limit=5)[0]["rounds"] == cost.LEAST
