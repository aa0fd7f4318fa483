"""Helpers of the tests of checkpoints: small models and their files."""

import torch

import models_arm

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2}


def classifier(img_size=(48, 32), num_classes=3):
    torch.manual_seed(1)
    return models_arm.create_classifier("arm_tiny_pz16", img_size=img_size, num_classes=num_classes, **SIZES)


def pretrained(img_size=(48, 32)):
    torch.manual_seed(2)
    sizes = {**SIZES, "img_size": img_size, "cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 1}
    return models_arm.create_pretrain_model("arm_tiny_pz16", **sizes)


def assert_equal_state(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def write(path, content):
    torch.save(content, path)
    return path
