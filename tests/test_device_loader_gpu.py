"""Prefetching to a GPU on a side stream: the batches are those of the CPU."""

import pytest
import torch

from test_data import finetune_args, loader_args
from util import datasets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("how", ["fast", "pil"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_on_the_cpu(jpeg_folder, how, workers):
    # noise is drawn on the device, and differs there; a busy stream shows a batch that is read before it is there
    transform = datasets.finetune_transform((64, 64), finetune_args(remode="const"))
    dataset = datasets.image_dataset(str(jpeg_folder), "train", transform, how)
    want = list(datasets.train_loader(dataset, loader_args(), torch.device("cpu")))
    device = torch.device("cuda", 0)
    busy = torch.randn(4096, 4096, device=device)
    loader = datasets.train_loader(dataset, loader_args(num_workers=workers), device)
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
