"""The detector: losses and detections are torchvision's, image by image, and it learns."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from small_detector import IDS, detector
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou

import pretrained
from Detection import detection_pictures, models_detect
from Detection.detection_data import DetectionDataset, Fit
from Detection.models_detect import SeededSampler, paste
from util.data.pixels import Pixels
from util.data.sources.coco import open_coco

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch(rectangles):
    """Images with one, two and three objects, of which the last is taken as one without any."""
    dataset = DetectionDataset(open_coco(f"coco:{rectangles}", "train"), Fit((64, 64)), Pixels(), masks=True)
    images, targets = dataset.finish(dataset.collate([dataset.sample(i) for i in range(3)]), torch.device("cpu"))
    for number, target in enumerate(targets):
        target["seed"] = number
    for name in ("boxes", "labels", "masks"):
        targets[2][name] = targets[2][name][:0]
    return images, targets


def test_losses_of_a_batch_are_the_means_of_its_images(batch):
    """Also of an image without objects; so two processes, whose gradients are averaged, equal one."""
    images, targets = batch
    model = detector().train()
    losses = model(images, targets)
    sum(losses.values()).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    single = [model(images[i : i + 1], targets[i : i + 1]) for i in range(3)]
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(sum(own[name].item() for own in single) / 3, rel=1e-5), name
    (sum(sum(own.values()) for own in single) / 3).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, together[name], atol=1e-5), name
    assert sorted(losses) == ["loss_box_reg", "loss_classifier", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]
    assert single[2]["loss_mask"] == 0 == single[2]["loss_box_reg"]


def test_regions_depend_on_the_seed_of_their_image(batch):
    images, targets = batch
    model = detector().train()
    first, again, other = (
        model(images[:1], [{**targets[0], "seed": seed}])["loss_objectness"].item() for seed in (5, 5, 6)
    )
    assert first == again != other


def test_losses_and_detections_are_torchvisions(batch):
    """Torchvision's Mask R-CNN around the same parts, where images fill a square that all strides divide."""
    images, targets = batch[0][:2], [{**target, "size": (64, 64), "original": (64, 64)} for target in batch[1][:2]]
    model = detector()
    backbone = nn.Module()
    backbone.out_channels, backbone.forward = 16, model.features
    theirs = MaskRCNN(backbone, 3, min_size=64, max_size=64, image_mean=[0] * 3, image_std=[1] * 3, size_divisible=64)
    theirs.rpn, theirs.roi_heads = model.rpn, model.roi_heads
    for number in (0, 1):
        ours = model.train()(images[number : number + 1], [targets[number]])
        wanted = theirs.train()([images[number]], [targets[number]])
        assert {name: loss.item() for name, loss in ours.items()} == pytest.approx(
            {name: loss.item() for name, loss in wanted.items()}, rel=1e-5
        )
    with torch.no_grad():
        found, wanted = model.eval()(images, targets), theirs.eval()([*images])
    for ours, want in zip(found, wanted, strict=True):
        assert len(ours["boxes"]) > 10
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(ours[name], want[name])
        masks = torch.cat([*paste(ours, (64, 64))])
        assert torch.equal(masks, (want["masks"][:, 0] >= 0.5).to(torch.uint8))


def test_boxes_are_in_pixels_of_the_original(batch):
    model = detector().eval()
    with torch.no_grad():
        fitted, original = (
            model(batch[0][:1], [{"size": (48, 56), "original": size}])[0] for size in ((48, 56), (96, 280))
        )
        (whole,) = model(batch[0][:1])
    torch.testing.assert_close(original["boxes"], fitted["boxes"] * torch.tensor([5.0, 2.0, 5.0, 2.0]))
    assert (fitted["boxes"].amax(0) <= torch.tensor([56, 48, 56, 48])).all()
    assert whole["boxes"].amax() > 56


def test_anchors_and_regions_of_images_that_no_stride_divides():
    """Anchors lie where the patches are; of images that all strides divide, they are torchvision's."""
    model = detector()
    for size in ((64, 64), (60, 52)):
        images = torch.randn(1, 3, *size)
        maps = [*model.features(images).values()]
        (anchors,) = model.rpn.anchor_generator(ImageList(images, [size]), maps)
        counts = [3 * feature.shape[-2] * feature.shape[-1] for feature in maps]
        for part, stride in zip(anchors.split(counts), (2, 4, 8, 16, 32), strict=True):
            centres = (part[:, :2] + part[:, 2:]) / 2
            assert (centres % stride).abs().max() < 0.51  # anchors are rounded to whole pixels
            assert centres.amax() < max(size)
    plain = AnchorGenerator(tuple((size,) for size in models_detect.ANCHORS), (models_detect.RATIOS,) * 5)
    maps, images = [*model.features(torch.randn(1, 3, 64, 64)).values()], torch.randn(1, 3, 64, 64)
    ours, theirs = (of(ImageList(images, [(64, 64)]), maps)[0] for of in (model.rpn.anchor_generator, plain))
    assert torch.equal(ours, theirs)
    assert model.roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]


def test_boxes_are_decoded_in_float32(batch, monkeypatch):
    """Bfloat16 would move them by up to 4 pixels at 1024."""
    seen = []
    for part in (detector_parts := detector()).rpn.box_coder, detector_parts.roi_heads.box_coder:
        decode = part.decode
        monkeypatch.setattr(
            part, "decode", lambda codes, boxes, decode=decode: (seen.extend([codes, *boxes]), decode(codes, boxes))[1]
        )
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector_parts.train()(*batch)
        found = detector_parts.eval()(*batch)
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {value.dtype for one in found for name, value in one.items() if name in ("boxes", "scores", "masks")} == {
        torch.float32
    }


def test_masks_are_pasted_a_few_at_a_time(monkeypatch):
    boxes = torch.tensor([[5.0, 4, 30, 40], [-3, 0, 20, 9], [40, 40, 49, 49], [0, 0, 50, 60]])
    found = {"boxes": boxes, "masks": torch.rand(4, 1, 28, 28)}
    want = (paste_masks_in_image(found["masks"], boxes, (60, 50))[:, 0] >= 0.5).to(torch.uint8)
    for pixels, counts in ((2**20, [4]), (3000 * 3, [3, 1]), (1, [1, 1, 1, 1])):
        monkeypatch.setattr(models_detect, "PASTED", pixels)
        parts = [*paste(found, (60, 50))]
        assert [len(part) for part in parts] == counts
        assert torch.equal(torch.cat(parts), want)
    assert not [*paste({name: values[:0] for name, values in found.items()}, (60, 50))]


def test_a_sampler_chooses_as_torchvisions_does():
    """As many, of the right kinds; drawn evenly."""
    labels = torch.tensor([1.0] * 10 + [0.0] * 50 + [-1.0] * 40)
    sampler, times = SeededSampler(16, 0.25), torch.zeros(100)
    for sampler.seed in range(400):
        ((positive,), (negative,)) = sampler([labels])
        assert (positive.sum(), negative.sum()) == (4, 12)
        times += positive.float() + negative.float()
    assert (times[:10] / 400 - 4 / 10).abs().max() < 0.12
    assert (times[10:60] / 400 - 12 / 50).abs().max() < 0.12
    assert times[60:].sum() == 0
    (positive,), (negative,) = sampler([labels[9:20]])  # one positive, ten negative
    assert (positive.sum(), negative.sum()) == (1, 10)


@pytest.mark.parametrize("masks", [True, False])
def test_a_checkpoint_is_loaded_by_name(tmp_path, batch, masks):
    model = detector(masks).eval()
    args = argparse.Namespace(input_size=[64], mean=[0.5] * 3, std=[0.5] * 3)
    torch.save({"model": model.state_dict(), "args": args, "class_names": [*IDS]}, tmp_path / "c.pth")
    again, found = pretrained.load(tmp_path / "c.pth")
    assert (found.task, found.class_names, found.input_size) == ("detection", ["red", "blue"], (64, 64))
    assert again.has_masks == masks
    with torch.no_grad():
        for own, want in zip(again(*batch), model(*batch), strict=True):
            for name in want:
                assert torch.equal(own[name], want[name]), name


def test_it_learns_two_images(batch):
    """Boxes, classes and masks, from random weights."""
    images, targets = batch[0][:2], [dict(target) for target in batch[1][:2]]
    model = detector().train()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 5, (40 - step) / 20)
        for number, target in enumerate(targets):
            target["seed"] = 2 * step + number
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = model.eval()(images, [target | {"original": target["size"]} for target in targets])
    for one, target in zip(found, targets, strict=True):
        overlap = box_iou(target["boxes"], one["boxes"]) * (target["labels"][:, None] == one["labels"])
        best = overlap.max(dim=1)
        assert best.values.min() > 0.5, overlap
        masks = torch.cat([*paste(one, target["size"])])[best.indices]
        truth = target["masks"][:, : target["size"][0], : target["size"][1]]
        assert ((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))).min() > 0.5


def test_the_methods_of_the_encoder():
    model = detector()
    assert model.layers is model.backbone.layers
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    model.freeze("all")
    assert not any(p.requires_grad for p in model.layers.parameters())
    assert all(p.requires_grad for part in (model.rpn, model.roi_heads) for p in part.parameters())
    with pytest.raises(ValueError, match="the model has 2 blocks, not 3"):
        model.freeze(3)
    options = SimpleNamespace(seen=[])
    for layer in model.layers:
        layer.compile = lambda **how: options.seen.append(how)
    model.compile(mode="default")
    assert options.seen == [{"mode": "default"}] * 2


def test_masks_are_drawn_where_their_boxes_are():
    """Enlarged by a factor that is no whole number, a square ends within half a pixel of its box."""
    masks = torch.zeros(1, 61, 61, dtype=torch.uint8)
    masks[:, 12:28, 12:28] = 1
    objects = {"boxes": torch.tensor([[12.0, 12, 28, 28]]), "masks": masks}
    drawn = detection_pictures._resized(objects, (61, 61), (64, 64))
    rows = drawn["masks"][0].any(dim=1).nonzero()
    left, _, right, _ = drawn["boxes"][0].tolist()
    assert abs(rows[0].item() - left) <= 0.5
    assert abs(rows[-1].item() + 1 - right) <= 0.5
