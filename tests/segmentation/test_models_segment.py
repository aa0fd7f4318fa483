"""Segmenters: their heads against torch's own operations, their loss, what they learn, and other sizes of images."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from Segmentation.models_segment import AUXILIARY, IGNORED, UperNet, create_segmenter, enlarge, loss, region_means

TINY = {"name": "arm_tiny_pz16", "embed_dim": 32, "depth": 2, "img_size": 64, "channels": 32, "drop_rate": 0.0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def masks():
    """Four quarters of their own class, and a corner that is ignored."""
    masks = torch.arange(4).view(2, 2).repeat_interleave(32, 0).repeat_interleave(32, 1).repeat(2, 1, 1)
    masks[:, :8, :8] = IGNORED
    return masks


def plain(module, x):
    """A convolution with normalisation and ReLU, written with torch's functions."""
    conv, norm = module[0], module[1]
    x = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
    x = F.layer_norm(x.movedim(1, -1), [len(norm.weight)], norm.weight, norm.bias, norm.eps).movedim(-1, 1)
    return x.relu()


def resized(x, like):
    return F.interpolate(x, like.shape[-2:], mode="bilinear")


def test_upernet_is_that_of_the_paper(images):
    """Pooling, lateral maps, sums from the top down, fusion; composed a second time of torch's functions."""
    torch.manual_seed(0)
    head = UperNet(16, 5, channels=8, drop_rate=0.0)
    for norm in (m for m in head.modules() if hasattr(m, "normalized_shape")):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    maps = [torch.randn(2, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    top = maps[3]
    pools = [plain(m, F.adaptive_avg_pool2d(top, n)) for m, n in zip(head.pools, (1, 2, 3, 6), strict=True)]
    fourth = plain(head.context, torch.cat([top, *(resized(x, top) for x in pools)], 1))
    third = plain(head.lateral[2], maps[2]) + resized(fourth, maps[2])
    second = plain(head.lateral[1], maps[1]) + resized(third, maps[1])
    first = plain(head.lateral[0], maps[0]) + resized(second, maps[0])
    levels = [plain(m, x) for m, x in zip(head.smooth, (first, second, third), strict=True)] + [fourth]
    fused = plain(head.fusion, torch.cat([resized(x, first) for x in levels], 1))
    want = F.conv2d(fused, head.classifier[1].weight, head.classifier[1].bias)
    assert torch.allclose(head(maps), want, atol=1e-5)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_region_means(bins):
    for height, width in ((7, 11), (2, 2), (6, 12)):
        x = torch.randn(2, 3, height, width)
        assert torch.allclose(region_means(x, bins), F.adaptive_avg_pool2d(x, bins), atol=1e-6)


def test_a_padded_map_is_enlarged_in_place():
    """A ramp stays where it is, although the map ends beyond the image."""
    ramp = (torch.arange(0, 12.0) * 4 + 1.5)[None, None, :, None].expand(1, 1, 12, 3)  # centres of pixels
    got = enlarge(ramp, 4, (42, 10))
    assert got.shape == (1, 1, 42, 10)
    assert torch.allclose(got[0, 0, 2:42, 0], torch.arange(2.0, 42))


def test_loss_counts_valid_pixels_and_divides_by_all(images, masks):
    logits = torch.randn(2, 4, 64, 64)
    rows = logits.movedim(1, -1)[masks >= 0].log_softmax(-1)
    want = -rows.gather(1, masks[masks >= 0][:, None]).sum() / masks.numel()
    assert torch.allclose(loss(logits, masks), want)
    halves = torch.stack([loss(logits[i : i + 1], masks[i : i + 1]) for i in range(2)])
    assert torch.allclose(halves.mean(), want)


def test_training_loss_has_both_outputs(images, masks):
    torch.manual_seed(0)
    model = create_segmenter(num_classes=4, **TINY).eval()
    maps = model.backbone(images)
    main, auxiliary = (resized(x, images) for x in (model.head(maps), model.head.auxiliary(maps[2])))
    want = loss(main, masks) + AUXILIARY * loss(auxiliary, masks)
    assert torch.allclose(model(images, masks), want)
    assert torch.allclose(model(images), main)


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_two_images_are_learned(images, masks, head):
    """The pictures show their quarters as grey levels; the fifth class has no pixels."""
    torch.manual_seed(0)
    images = images * 0.1 + masks.clamp(min=0)[:, None] - 1.5
    model = create_segmenter(num_classes=5, head=head, **TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25 if head == "upernet" else 40):
        value = model(images, masks)
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    answers = model.eval()(images).argmax(dim=1)
    assert (answers == masks)[masks >= 0].float().mean() > 0.9


def test_linear_head_reads_normalised_tokens(images):
    torch.manual_seed(0)
    model = create_segmenter(num_classes=4, head="linear", **TINY).eval()
    assert not hasattr(model.backbone, "pyramid")
    tokens = model.backbone.forward_features(images)
    patches = torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1)  # without the class token in the middle
    logits = F.linear(patches, model.head.classifier[1].weight[..., 0, 0], model.head.classifier[1].bias)
    want = F.interpolate(logits.mT.unflatten(2, (4, 4)), (64, 64), mode="bilinear")
    assert torch.allclose(model(images), want, atol=1e-5)


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("size", [(64, 64), (70, 45), (33, 100)])
def test_sizes_of_images(head, size):
    model = create_segmenter(num_classes=3, head=head, **TINY)
    images = torch.randn(1, 3, *size)
    assert model(images).shape == (1, 3, *size)
    model(images, torch.zeros(1, *size, dtype=torch.int64)).backward()


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_freezing_all_trains_what_is_new(images, masks, head):
    model = create_segmenter(num_classes=4, head=head, **TINY)
    model.freeze("all")
    model(images, masks).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    new = {n for n, _ in model.named_parameters() if n.startswith(("head.", "backbone.pyramid."))}
    assert trained == new
    assert {n for n, p in model.named_parameters() if p.requires_grad} == new


def test_the_encoder_is_found(images, masks):
    """Gradient checkpointing changes no gradient; the blocks are those of the encoder."""
    torch.manual_seed(0)
    model = create_segmenter(num_classes=4, **TINY)
    assert model.layers is model.backbone.layers
    model(images, masks).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    model(images, masks).backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), want, strict=True))


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="unknown head 'fcn'; choose from upernet, linear"):
        create_segmenter("arm_tiny_pz16", 3, "fcn")
