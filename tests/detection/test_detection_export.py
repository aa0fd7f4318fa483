"""Exported detectors detect what the model does, and an image with another number of detections is no problem."""

import json

import onnxruntime
import pytest
import torch
from small_detector import IDS, detector

from Detection import detection_export
from tools import export
from util.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path):
    content = {"model": detector(depth=1).state_dict(), "class_names": [*IDS], "args": {"input_size": [64]}}
    torch.save(content, tmp_path / "c.pth")
    return tmp_path / "c.pth"


def test_an_exported_detector(checkpoint, run_script, capsys):
    run_script(export, "--no_measure", checkpoint, "--to", "onnx")
    assert "read again it differs by at most" in capsys.readouterr().out
    about = json.loads(checkpoint.with_suffix(".json").read_text())
    assert (about["task"], about["label_names"], about["num_classes"]) == ("detection", ["red", "blue"], 2)
    assert about["outputs"] == ["boxes", "scores", "labels", "masks"]
    session = onnxruntime.InferenceSession(checkpoint.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == about["outputs"]
    model = detector(depth=1).eval()
    counts, same, every = set(), 0, 0
    for seed in range(4):
        imgs = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        model.roi_heads.score_thresh = score = 0.35
        with torch.no_grad():
            (want,) = model(imgs)
        boxes, scores, labels, masks = map(
            torch.from_numpy, session.run(None, {"imgs": imgs.numpy(), "score": torch.tensor(score).numpy()})
        )
        near = (boxes[:, None] - want["boxes"]).abs().amax(2) < 1e-2
        near &= ((scores[:, None] - want["scores"]).abs() < 1e-4) & (labels[:, None] == want["labels"])
        rows, columns = near.nonzero().unbind(1)
        torch.testing.assert_close(masks[rows], want["masks"][columns], atol=1e-3, rtol=0)
        counts.add(len(scores))
        same, every = same + 2 * len(rows), every + len(scores) + len(want["scores"])
    assert same > 0.9 * every  # rounding decides about boxes that overlap just so much
    assert len(counts) > 1


def test_other_detections_are_noticed():
    model = detection_export.ExportedDetector(detector())
    found = [torch.rand(20, 4) * 64, torch.rand(20), torch.randint(1, 3, (20,)), torch.rand(20, 1, 28, 28)]
    fewer, order = [output[1:] for output in found], torch.randperm(20)
    for other in (fewer, [output[order] for output in found]):
        for one, two in zip(*model.paired(other, found), strict=True):
            assert torch.equal(one, two)
            assert len(one) == len(other[0])
    for place, change in ((0, 1.0), (1, 0.1), (2, 1)):
        other = [output + change * (number == place) for number, output in enumerate(found)]
        with pytest.raises(RunError, match="the exported model detects something else: 0 of 20 agree"):
            model.paired(other, found)


def test_formats_that_hold_no_detector(checkpoint, run_script, capsys):
    with pytest.raises(SystemExit):
        run_script(export, "--no_measure", checkpoint, "--to", "safetensors")
    assert "--to safetensors is not for a detector: take onnx or pt2, or its --encoder" in capsys.readouterr().err
    run_script(export, "--no_measure", checkpoint, "--to", "safetensors", "--encoder")
    assert "read again it differs by at most 0 " in capsys.readouterr().out
