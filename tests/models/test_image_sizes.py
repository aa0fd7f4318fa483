"""Pretraining encoders at other image sizes, and classifiers that pad images."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import models_arm
from mamba import ORDERS
from util.pos_embed import sincos_pos_embed, split_middle

SIZES = {"embed_dim": 32, "depth": 4, "patch_size": 8}


def pretraining(**options):
    torch.manual_seed(0)
    sizes = {**SIZES, "img_size": (48, 32), "cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 2}
    return models_arm.create_pretrain_model("arm_tiny_pz16", **{**sizes, **options}).eval()


def classifier(**options):
    torch.manual_seed(0)
    sizes = {**SIZES, "depth": 2, "img_size": (48, 32), "num_classes": 3}
    return models_arm.create_classifier("arm_tiny_pz16", **{**sizes, **options}).eval()


@pytest.mark.parametrize("order", ["row", "column_reverse", "random_per_image"])
@pytest.mark.parametrize("size", [(64, 32), (16, 80), (48, 32)])
def test_an_encoder_takes_any_size(order, size):
    """It computes what a model that is built for that size does, with the same weights."""
    model, fixed = pretraining(dynamic_img_size=True, order=order), pretraining(order=order, img_size=size)
    encoder = {n: p for n, p in model.state_dict().items() if n.startswith(("layers", "patch_embed"))}
    fixed.load_state_dict(encoder, strict=False)
    imgs = torch.randn(2, 3, *size)
    assert torch.equal(model.forward_features(imgs), fixed.forward_features(imgs))
    assert model.image_size == (48, 32)


def test_sizes_that_an_encoder_does_not_take():
    imgs = torch.randn(1, 3, 64, 32)
    with pytest.raises(ValueError, match=r"images of \(64, 32\) pixels, the model takes \(48, 32\)"):
        pretraining().forward_features(imgs)
    with pytest.raises(ValueError, match="image size 40 does not divide into 2 x 2-patch clusters of 16 pixels"):
        pretraining(dynamic_img_size=True).forward_features(imgs[:, :, :40])
    with pytest.raises(ValueError, match=r"a random order of clusters is only for \(48, 32\) pixels"):
        pretraining(dynamic_img_size=True, order="random").forward_features(imgs)
    with pytest.raises(ValueError, match=r"images of \(64, 32\) pixels"):
        pretraining(dynamic_img_size=True)(imgs)  # the loss is of one size


@pytest.mark.parametrize("objective", ["arm", "mae"])
def test_a_new_input_size(objective):
    """The model is the one that is built for the size, with the same weights, and is pretrained there."""
    options = {"objective": objective, "order": "column", "norm_pix_loss": True}
    moved, fixed = pretraining(**options), pretraining(**options, img_size=(64, 96))
    moved.set_input_size((64, 96))
    assert (moved.image_size, moved.num_patches) == ((64, 96), 96)
    state = moved.state_dict()
    for name, value in fixed.state_dict().items():
        assert value.shape == state[name].shape
        if name in ("pos_embed", "dec_pos_embed", "mask"):
            assert torch.equal(state[name], value), name
    fixed.load_state_dict(state)
    assert torch.equal(moved.cluster_order, fixed.cluster_order)
    assert not moved.pos_embed.requires_grad
    imgs, losses = torch.randn(2, 3, 64, 96), []
    for model in (moved, fixed):
        torch.manual_seed(0)
        losses.append(model(imgs))
    assert torch.equal(*losses)
    assert torch.equal(moved.pos_embed, sincos_pos_embed(32, (8, 12)))


def test_input_sizes_that_do_not_fit():
    model = pretraining()
    for size, message in ((40, "does not divide into 2 x 2-patch clusters"), (16, "holds a single cluster")):
        with pytest.raises(ValueError, match=message):
            model.set_input_size(size)
    assert model.image_size == (48, 32)
    with pytest.raises(ValueError, match="is a single patch"):
        pretraining(objective="mae", cluster_size=1).set_input_size(8)
    with pytest.raises(ValueError, match="a random order of clusters is only for"):
        pretraining(order="random").set_input_size(64)


@pytest.mark.parametrize("order", ORDERS)
def test_intermediate_layers_are_in_raster_order(order):
    """A patch stands where it is in the image: with one block, changing it changes no patch of an earlier cluster."""
    model, imgs = pretraining(order=order, dynamic_img_size=True), torch.randn(2, 3, 48, 32)
    places = model.to_clusters(torch.arange(24).view(1, 24, 1)).flatten()
    blocks = list(model.encode(model.embed(imgs), [1, 2, 3, 4]).values())
    for n, taken in ((2, [2, 3]), ([0, -1], [0, 3])):
        layers = model.get_intermediate_layers(imgs, n)
        assert len(layers) == len(taken)
        for layer, block in zip(layers, taken, strict=True):
            assert torch.equal(layer[:, places], blocks[block])
    (maps,) = model.get_intermediate_layers(imgs, reshape=True)
    (flat,) = model.get_intermediate_layers(imgs)
    assert maps.shape == (2, 32, 6, 4)
    assert torch.equal(maps[:, :, 4, 1], flat[:, 17])
    ((normed, token),) = model.get_intermediate_layers(imgs, 1, return_prefix_tokens=True, norm=True)
    assert torch.allclose(normed, F.layer_norm(flat, (32,)))
    assert token.shape == (2, 0, 32)
    if order != "random":
        assert model.get_intermediate_layers(torch.randn(1, 3, 64, 96), reshape=True)[0].shape == (1, 32, 8, 12)
    with pytest.raises(ValueError, match=r"no blocks \[4\] among 4"):
        model.get_intermediate_layers(imgs, [4])


@pytest.mark.parametrize("size", [(48, 32), (41, 27), (50, 17)])
def test_padding(size):
    """Padded images have the outputs of images with zeros at the bottom and on the right."""
    model, imgs = classifier(dynamic_img_size=True, dynamic_img_pad=True), torch.randn(2, 3, *size)
    rows, columns = (math.ceil(side / 8) for side in size)
    padded = torch.zeros(2, 3, 8 * rows, 8 * columns)
    padded[:, :, : size[0], : size[1]] = imgs
    plain = classifier(dynamic_img_size=True)
    assert torch.equal(model(imgs), plain(padded))
    (maps,) = model.forward_intermediates(imgs, 1, intermediates_only=True)
    assert maps.shape == (2, 32, rows, columns)
    patches, _ = split_middle(model.encode(imgs)[0])
    assert torch.equal(maps[:, :, -1, 0], patches[:, (rows - 1) * columns])
    pyramid = timm.create_model(
        "arm_tiny_pz16", **SIZES, img_size=(48, 32), features_only=True, out_indices=(0, 3), dynamic_img_size=True,
        dynamic_img_pad=True,
    )  # fmt: skip
    assert [x.shape[-2:] for x in pyramid(imgs)] == [(rows, columns)] * 2


def test_padding_to_the_models_only_size():
    model = classifier(dynamic_img_pad=True)
    assert model(torch.randn(1, 3, 45, 31)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"images of \(40, 32\) pixels, the model takes \(48, 32\)"):
        model(torch.randn(1, 3, 35, 31))
