"""Inference on images of any size: windows, scales, mirrored images, and the size of the answer."""

import pytest
import torch
import torch.nn.functional as F

from Segmentation import segment_inference
from Segmentation.segment_inference import RATIOS, Inference, starts

SIZE = 12, 12


def brightness(imgs):
    """Logits of three classes, as a model of one pixel would give them."""
    return torch.stack([imgs[:, 0], -imgs[:, 0], 0.3 * imgs[:, 1]], dim=1)


class Counting:
    """A model whose logits depend on the place in the window, and which counts its calls."""

    def __init__(self):
        self.sizes = []

    def __call__(self, imgs):
        self.sizes.append(tuple(imgs.shape))
        ramp = torch.linspace(0, 1, imgs.shape[-1])
        return torch.stack([imgs[:, 0] + ramp, imgs[:, 1] - ramp], dim=1)


def test_starts_of_windows():
    assert starts(512, 512) == [0]
    assert starts(683, 512) == [0, 171]
    assert starts(853, 512) == [0, 341]
    assert starts(1024, 512) == [0, 341, 512]
    assert starts(13, 12) == [0, 1]


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_one_window_is_the_model_itself(mode):
    torch.manual_seed(0)
    imgs, model = torch.randn(2, 3, *SIZE), Counting()
    answers, finite = Inference(SIZE, mode)(model, imgs, SIZE)
    assert torch.equal(answers, model(imgs).argmax(dim=1))
    assert finite.tolist() == [True, True]
    assert model.sizes[:-1] == [(2, 3, *SIZE)]


def test_overlapping_windows_are_averaged():
    """Each pixel has the mean of the logits of the windows over it; no more than `batch` pass the model at a time."""
    torch.manual_seed(0)
    imgs, model = torch.randn(2, 3, 12, 30), Counting()
    got = Inference(SIZE, batch=4).logits(model, imgs)
    assert model.sizes == [(4, 3, *SIZE), (4, 3, *SIZE)]
    total, count = torch.zeros(2, 2, 12, 30), torch.zeros(30)
    for start in (0, 8, 16, 18):
        total[..., start : start + 12] += model(imgs[..., start : start + 12])
        count[start : start + 12] += 1
    assert count.max() == 3
    assert torch.allclose(got, total / count, atol=1e-6)
    assert torch.allclose(Inference(SIZE).logits(brightness, imgs), brightness(imgs), atol=1e-6)


@pytest.mark.parametrize("image", [(24, 24), (6, 30), (12, 13), (1, 1)])
def test_answers_have_the_size_that_is_asked_for(image):
    """Windows are no larger than the image, so that nothing has to be padded."""
    model, imgs = Counting(), torch.randn(1, 3, *image)
    answers, _ = Inference(SIZE)(model, imgs, (31, 47))
    assert {size[2:] for size in model.sizes} == {(min(12, image[0]), min(12, image[1]))}
    want = F.interpolate(Inference(SIZE).logits(model, imgs), (31, 47), mode="bilinear").argmax(dim=1)
    assert torch.equal(answers, want)


def test_scales_and_mirrored_images_are_averaged():
    """The mean of the probabilities, each interpolated to one size; a mirrored image is mirrored back."""
    torch.manual_seed(0)
    imgs, model = torch.randn(1, 3, 18, 24), Counting()
    how = Inference((18, 18), "whole", ratios=(0.5, 1.0, 1.75), flip=True)
    total = torch.zeros(1, 2, 18, 24)
    for size in ((9, 12), (18, 24), (32, 42)):
        view = F.interpolate(imgs, size, mode="bilinear", antialias=True) if size != (18, 24) else imgs
        for logits in (model(view), model(view.flip(-1)).flip(-1)):
            total += F.interpolate(logits, (18, 24), mode="bilinear").softmax(dim=1)
    assert torch.equal(how(model, imgs, (18, 24))[0], total.argmax(dim=1))
    assert RATIOS == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def test_logits_of_many_classes_are_enlarged_in_parts(monkeypatch):
    """With the same answer, of the first of equal classes."""
    torch.manual_seed(0)
    scores = torch.randn(2, 7, 5, 6)
    scores[:, 5] = scores[:, 2] = 9.0
    scores[0, 2, :, 3:] = 0.0
    want = F.interpolate(scores, (20, 31), mode="bilinear").argmax(dim=1)
    for elements in (1, 2 * 20 * 31 * 3, 10**9):
        monkeypatch.setattr(segment_inference, "ELEMENTS", elements)
        assert torch.equal(segment_inference.largest(scores, (20, 31)), want)


def test_logits_that_are_not_finite_are_told():
    imgs = torch.randn(3, 3, *SIZE)
    imgs[1, 0, 5, 5] = float("nan")
    assert Inference(SIZE)(brightness, imgs, SIZE)[1].tolist() == [True, False, True]
