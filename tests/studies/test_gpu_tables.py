"""Test the table and the decisions of gpu_check.py on given results."""

import json

import pytest

from benchmarks import bench_losses, bench_tokens, gpu_check
from benchmarks.gpu import gpu_tables
from benchmarks.gpu.gpu_tables import ADOPT, KEEP, LOOK, NOT, Row

ABOUT = {"date": "2030-01-02", "torch": "2", "cpu": "a CPU", "threads": 1, "toy": False}
GPU = {"gpu": "NVIDIA H200", "capability": [9, 0]}


def scan_us(backward, triton=1000.0):
    return {"cuda": {"forward": 100.0, "backward": backward, "both": 100 + backward},
            "triton": {"forward": 200.0, "backward": triton - 200, "both": triton}}  # fmt: skip


@pytest.mark.parametrize(
    ("us", "size", "decision"),
    [
        (scan_us(449), "pretraining", ADOPT),
        (scan_us(450), "pretraining", LOOK),
        (scan_us(650), "pretraining", LOOK),
        (scan_us(651), "pretraining", "keep: fall back to triton with chunks of 4"),
        (scan_us(300, triton=400.0), "pretraining", KEEP),
        (scan_us(900, triton=3000.0), "finetuning", ADOPT),
        (scan_us(900), "finetuning", KEEP),
    ],
)
def test_scan_decisions(us, size, decision):
    assert gpu_tables.scan_decision(us, size) == decision


def ops_report(compiled, fused, spread):
    us = {"compiled": {"both": compiled, "spread": 1.0}, "fused": {"both": fused, "spread": spread}}
    rows = [{"operator": "swiglu", "size": "pretraining", "microseconds": us}]
    rows += [{"operator": "norm", "size": "pretraining", "wrong": "y differs"}]
    return {"results": [*rows, {"operator": "conv", "size": "finetuning", "left_out": "there is none"}]}


@pytest.mark.parametrize(("fused", "decision"), [(97.9, ADOPT), (98.0, KEEP), (101.0, KEEP)])
def test_operator_decisions(fused, decision):
    rows = list(gpu_tables.ops_table(ops_report(100.0, fused, 2.0)))
    assert [row.decision for row in rows] == [decision, LOOK, NOT]
    assert [row.measured for row in rows[1:]] == ["y differs", "there is none"]
    assert rows[0].entry == "swiglu"


def train_row(composition, ms, case="pretrain_base", busy=None, spread=0.1, **more):
    return {"case": case, "composition": composition, "images_per_second": 256e3 / ms, "ms_per_step": ms,
            "ms_per_step_of_rounds": [ms - spread / 2, ms, ms + spread / 2], "busy_ms_per_step": busy,
            "cuda_graph": composition in ("cuda_graph", "all"), **more}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "decisions"),
    [
        (train_row("all", 52.67, busy=51.7), [KEEP, KEEP]),  # 4,860 images/s
        (train_row("all", 52.68, busy=51.6), [LOOK, LOOK]),
        (train_row("cuda_graph", 69.5, busy=68.6), [ADOPT, KEEP]),
        (train_row("norm", 69.89), [ADOPT]),
        (train_row("norm", 69.95), [KEEP]),
        (train_row("norm", 69.5, spread=0.6), [KEEP]),
        ({"case": "pretrain_base", "composition": "cuda", "left_out": "none"}, [NOT]),
        ({"case": "pretrain_base", "composition": "cuda", "failed": "it broke"}, [LOOK]),
    ],
)
def test_train_decisions(row, decisions):
    report = {"results": [train_row("none", 70.0, busy=64.0), row]}
    first, *rows = gpu_tables.train_table(report)
    assert first.decision == KEEP
    assert [found.decision for found in rows] == decisions


@pytest.mark.parametrize(
    ("triton", "decision"), [(0.0199, ADOPT), (0.02, LOOK), (0.07, KEEP), (None, NOT)]
)  # fmt: skip
def test_augment_decisions(triton, decision):
    forms = {"torch": 0.06} | ({} if triton is None else {"triton": triton})
    rows = {name: {e: {"ms_per_image": ms} for e in ("with_erasing", "without_erasing")} for name, ms in forms.items()}
    assert {row.decision for row in gpu_tables.augment_table({"forms": rows})} == {decision}


def test_losses_within_rounding():
    found = {"again": {"loss": 0.0, "grad_norm": 1e-6}, "eager": {"loss": 1e-3, "grad_norm": 1e-2}}
    found |= {"cuda": {"loss": 2e-3, "grad_norm": 2e-2}, "norm": {"loss": 1e-3, "grad_norm": 2.1e-2}}
    found |= {"cuda_graph": {"loss": 0.0, "grad_norm": 2.1e-6}}
    verdicts = {form: bench_losses.verdict(form, found) for form in ("cuda", "norm", "cuda_graph", "swiglu")}
    assert verdicts == {"cuda": True, "norm": False, "cuda_graph": False, "swiglu": None}
    assert bench_losses.verdict("cuda", {"cuda": found["cuda"]}) is None
    assert bench_losses.verdict("cuda_graph", found | {"cuda_graph": {"loss": 0.0, "grad_norm": 2e-6}})


@pytest.mark.parametrize(("seconds", "decision"), [(0.104, KEEP), (0.13, LOOK), (None, LOOK)])
def test_time_of_a_token(seconds, decision):
    def sizes(pixels, *of_models):
        found = [{"seconds": s} if s else {"out_of_memory": True} for s in of_models]
        models = {name: {"train": row} for name, row in zip(bench_tokens.MODELS, found, strict=True)}
        return {"pixels": pixels, "tokens": (pixels // 16) ** 2, "models": models}

    rows = [sizes(512, 0.025, 0.02, 0.02), sizes(1024, seconds, 0.08, 0.32), {"pixels": 1536, "failed": "it broke"}]
    first, second, third = gpu_tables.tokens_table({"results": rows})
    assert first.measured == "ARM, 4 directions 25.0; ARM, 1 direction 20.0; ViT 20.0"
    assert ("ARM, 4 directions out of memory" in second.measured) == (seconds is None)
    assert [row.decision for row in (first, second, third)] == [KEEP, decision, LOOK]


JUNIT = '<testsuites><testsuite tests="{}" failures="{}" errors="0" skipped="2" /></testsuites>'


def written(folder, failures=0, losses=True):
    """Write results into a folder as the parts do; return how the parts ended."""
    (folder / "tests.xml").write_text(JUNIT.format(10, failures))
    us = scan_us(300.0)
    (folder / "scan.json").write_text(json.dumps({"results": [{"microseconds": us}] * 2}))
    case = {"case": "pretrain_base", "form": "cuda", "difference": {"loss": 1e-4, "grad_norm": 1e-3}}
    (folder / "losses.json").write_text(json.dumps({"results": [{**case, "within_rounding": losses}]}))
    return {name: {"status": "done", "reason": ""} for name in ("tests", "scan", "losses")}


def test_the_table(tmp_path):
    done = written(tmp_path)
    done["train"] = {"status": "stopped", "reason": "its time of 9 s was over"}
    rows = [train_row("none", 70.0), train_row("cuda", 60.0)]
    (tmp_path / "train.json").write_text(json.dumps({"results": rows}))  # measured before it was stopped
    text = gpu_check.summary(tmp_path, ABOUT | GPU, gpu_check.parts(toy=False), done)
    assert text == (tmp_path / "summary.md").read_text()
    assert "| GPU tests | 8 passed, 2 skipped, 0 failed | 0 failed | keep |" in text
    assert "| scan, pretraining, µs | cuda 100 + 300; triton 200 + 800 |" in text
    assert "| pretrain_base, cuda | 4267 images/s, 60.00 ms | 6.9 ms less | adopt cuda |" in text
    assert "| part train | stopped: its time of 9 s was over | done | not measured |" in text
    assert "| part ops | not asked for | done | not measured |" in text
    entry = f'"cuda": {{(9, 0): "{tmp_path.name}/summary.json"}},'
    assert f"```\n{entry}\n```" in text
    report = json.loads((tmp_path / "summary.json").read_text())
    assert report["entries"] == [entry]
    assert report["parts"] == done
    assert {"date", "torch", "cpu", "threads", "gpu"} <= report.keys()
    assert {row["decision"].partition(":")[0] for row in report["table"]} <= {ADOPT, KEEP, LOOK, NOT}


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"failures": 1}, "not all GPU tests have passed"),
        ({"losses": False}, "its losses differ"),
        ({"losses": None}, "its losses are not compared"),
    ],
)
def test_doubts_prevent_adoption(changes, doubt, tmp_path):
    done = written(tmp_path, **changes)
    text = gpu_check.summary(tmp_path, ABOUT | GPU, gpu_check.parts(toy=False), done)
    assert text.count(f"| look: faster, but {doubt} |") == 2
    assert "ops/measured.py" not in text


def test_killed_tests_prevent_adoption(tmp_path):
    done = written(tmp_path)
    (tmp_path / "tests.xml").unlink()
    done["tests"] = {"status": "stopped", "reason": "its time of 9 s was over"}
    rows = gpu_tables.table(tmp_path, {part.name: part.result for part in gpu_check.parts(toy=False)}, done)
    assert ADOPT not in {row.decision for row in rows}


def test_a_kernel_that_is_faster_in_some_rows_only(tmp_path):
    rows = [Row("a", "", "", ADOPT, "cuda"), Row("b", "", "", KEEP, "cuda"), Row("c", "", "", ADOPT, "norm")]
    lines, unclear = gpu_tables.entries(rows, tmp_path, [9, 0])
    assert unclear == ["cuda"]
    assert len(lines) == 1
    assert lines[0].startswith('"norm": {(9, 0)')
