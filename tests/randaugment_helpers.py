"""Run RandAugment and its single operations in timm and in our transform."""

import copy

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms

from util import seeding
from util.data.pixels import IMAGENET
from util.data.transforms import Recipe
from util.data.uint8_transform import Uint8Transform

CPU = torch.device("cpu")


POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8-mstd101", "rand-n4-mstd1-inc1-tweights"]  # supported on the device


def policy(aa, **hparams):
    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC} | hparams
    return auto_augment.rand_augment_transform(aa, hparams)


# of all magnitudes from 0 to 10, more than the recipe draws
OPERATIONS = {op.name: op for aa in ("rand-m10-mstd101", "rand-m10-mstd101-inc1") for op in policy(aa).ops}


def uint8_transform(*steps):
    """Return a transform that keeps the size of an image of 224 x 200 and does not normalise."""
    normalize = transforms.Normalize([0.0] * 3, [1 / 255] * 3)
    return Uint8Transform(Recipe([transforms.Resize((200, 224)), *steps, normalize], IMAGENET))


def carried_out(transform, images, notes, device=CPU):
    """Return the device's result for arrays (H, W, 3) uint8 and the numbers from the worker."""
    todo = torch.tensor([[0, *numbers] for numbers in notes], dtype=torch.float64)
    pixels = torch.from_numpy(np.stack(images))
    kept = pixels.clone()
    got = transform.finish(pixels, todo, device).cpu()
    assert torch.equal(pixels, kept)  # the batch is unchanged
    return got.permute(0, 2, 3, 1).round().byte().numpy()  # (B, 3, H, W) -> (B, H, W, 3)


def single_operation(name):
    """Return one operation with probability 1, as timm's operation and as our transform."""
    op = copy.deepcopy(OPERATIONS[name])
    op.prob = 1
    step = auto_augment.RandAugment([op], num_layers=1)
    return op, uint8_transform(step)


def against_timm(name, images, device=CPU):
    """Return the results of timm and of our transform for each image, at random magnitudes."""
    op, transform = single_operation(name)
    want, notes = [], []
    for seed, image in enumerate(images):
        seeding.seed_sample(seed)
        want.append(np.array(op(Image.fromarray(image))))
        seeding.seed_sample(seed)
        notes.append(transform.draw.ops[0]([]))
    return np.stack(want), carried_out(transform, images, notes, device)
