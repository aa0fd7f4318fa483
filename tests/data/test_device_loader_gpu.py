"""Prefetching to a GPU on a side stream, and RandAugment on it, give the batches of the CPU."""

import numpy as np
import pytest
import torch
from helpers import finetune_args, loader_args
from randaugment_helpers import POLICIES

from ops import fused
from ops.fused import triton_randaugment
from util import seeding
from util.data import datasets, loaders, randaugment, transforms, uint8_transform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("how", "form"), [("fast", "none"), ("fast", "augment"), ("pil", "none")])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_on_the_cpu(jpeg_folder, how, form, workers, monkeypatch):
    if how == "fast":
        pytest.importorskip("simplejpeg")
    # no noise, which depends on the device; a busy stream reveals batches that are read before they have arrived
    transform = transforms.finetune_transform((64, 64), finetune_args(remode="const"))
    dataset = datasets.image_dataset(str(jpeg_folder), "train", transform, how)
    want = list(loaders.train_loader(dataset, loader_args(), torch.device("cpu")))
    device = torch.device("cuda", 0)
    monkeypatch.setattr(fused, "_USED", set())
    fused.use([form], device)
    busy = torch.randn(4096, 4096, device=device)
    loader = loaders.train_loader(dataset, loader_args(num_workers=workers), device)
    got = []
    for imgs, labels in loader:
        busy = busy @ busy / 64
        got.append((imgs.clone(), labels.clone()))
        imgs.fill_(-1)
    assert len(got) == len(want)
    for (imgs, labels), (want_imgs, want_labels) in zip(got, want, strict=True):
        assert imgs.device == labels.device == device
        assert torch.allclose(imgs.cpu(), want_imgs, atol=1e-6)
        assert torch.equal(labels.cpu(), want_labels)


@pytest.mark.parametrize("aa", POLICIES)
def test_randaugment_on_a_gpu_is_that_on_the_cpu(photographs, aa):
    """Bit-identical, although a GPU processes several images at once; the host never waits for the device."""
    transform = uint8_transform.Uint8Transform(transforms.finetune_transform((224, 192), finetune_args(aa=aa)))
    draw, device = transform.draw, torch.device("cuda", 0)
    pixels, notes = [], []
    for seed in range(300):
        seeding.seed_sample(seed)
        numbers = draw([])
        notes.append(numbers + randaugment.NO_OPERATION * (draw.num_layers - len(numbers) // randaugment.NOTE))
        pixels.append(torch.from_numpy(np.array(photographs[seed % 2].resize((192, 224)))))
    images = torch.stack(pixels).permute(0, 3, 1, 2).contiguous()  # (B, H, W, 3) -> (B, 3, H, W)
    notes = torch.tensor(notes, dtype=torch.float64)  # (B, 3 layers)
    fill = torch.tensor(transform.fill, dtype=torch.uint8)[:, None, None]
    order = notes[:, :: randaugment.NOTE].argsort(dim=0)  # (B, layers)
    got, notes_on_gpu, fill_on_gpu, order_on_gpu = (tensor.to(device) for tensor in (images, notes, fill, order))
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_kernels = triton_randaugment.carry_out(got, notes_on_gpu, fill_on_gpu)
        randaugment.carry_out_layers(got, notes, notes_on_gpu, order_on_gpu, fill_on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    randaugment.carry_out_layers(images, notes, notes, order, fill)
    assert torch.equal(got.cpu(), images)
    assert torch.equal(by_kernels.cpu(), images)
