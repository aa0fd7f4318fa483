"""Transforms, samplers, the determinism of samples, and faults of worker processes."""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from data_helpers import pretrain_words
from fork_server import ForkedScript
from helpers import MEAN, REPOSITORY, STD, finetune_args, loader_args
from PIL import Image
from torchvision.datasets import ImageFolder

from util import seeding
from util.data import datasets, loaders, transforms
from util.data.device_loader import DeviceLoader
from util.data.pixels import IMAGENET
from util.errors import RunError


def photograph(width, height):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def by_hand(image, resized, size):
    """Bicubic resize and centre crop in Pillow, then normalisation."""
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (round((r - s) / 2) for r, s in zip(resized, size, strict=True))
    image = image.crop((left, top, left + size[0], top + size[1]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - MEAN) / STD


@pytest.mark.parametrize(
    ("size", "resize", "resized"),
    [
        ((224, 224), "square", (256, 256)),  # the aspect ratio is not kept
        ((224, 224), "shorter", (341, 256)),
        ((96, 96), "square", (109, 109)),
        ((384, 384), "square", (384, 384)),  # larger than 224: no crop margin
        ((384, 384), "shorter", (512, 384)),
    ],
)
def test_evaluation_transform(size, resize, resized):
    image = photograph(400, 300)
    got = transforms.eval_transform(size, resize)(image)
    assert torch.allclose(got, by_hand(image, resized, size[::-1]), atol=1e-6)


def test_evaluation_transform_of_a_rectangle():
    image = photograph(400, 300)
    got = transforms.eval_transform((192, 224), "square")(image)
    assert torch.allclose(got, by_hand(image, (256, 219), (224, 192)), atol=1e-6)
    assert transforms.eval_transform((192, 224), "shorter")(image).shape == (3, 192, 224)


def test_finetuning_transform_erases_at_its_rate():
    """Erased pixels are normal noise; on a constant image nothing else varies inside a crop."""
    image = Image.new("RGB", (64, 64), (124, 116, 104))
    torch.manual_seed(0)
    for rate in (0.25, 0.0):
        transform = transforms.finetune_transform((32, 32), finetune_args(aa="none", reprob=rate))
        erased = sum(transform(image).std() > 0.1 for _ in range(400))
        assert erased / 400 == pytest.approx(rate, abs=0.07)


def test_finetuning_transform_applies_randaugment():
    """Every operation at every magnitude works with the installed Pillow (posterize sometimes keeps 0 bits)."""
    transform = transforms.finetune_transform((32, 32), finetune_args(reprob=0.0))
    plain = transforms.finetune_transform((32, 32), finetune_args(aa="none", reprob=0.0))
    image = photograph(80, 60)
    changed = 0
    for seed in range(300):
        seeding.seed_sample(seed)
        augmented = transform(image)
        seeding.seed_sample(seed)
        changed += not torch.equal(augmented, plain(image))
        assert torch.isfinite(augmented).all()
    assert changed / 300 == pytest.approx(0.75, abs=0.08)  # two operations, each with probability 0.5


@pytest.fixture(params=["fast", "pil"])
def seeded(image_folder, request):
    transform = transforms.finetune_transform((32, 32), finetune_args())
    dataset = datasets.image_dataset(str(image_folder), "train", transform, request.param)
    return datasets.SeededSamples(dataset, seed=3)


def pixels(sample):
    (image, _numbers), _broken = sample
    return image


def test_samples_depend_only_on_seed_epoch_and_index(seeded):
    first = pixels(seeded[0, 5])
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(pixels(seeded[0, 5]), first)
    assert torch.equal(torch.get_rng_state(), state[0])  # the caller's generators are unchanged
    assert (np.random.get_state()[1] == state[1]).all()
    assert not torch.equal(pixels(seeded[1, 5]), first)
    assert not torch.equal(pixels(datasets.SeededSamples(seeded.dataset, seed=4)[0, 5]), first)


def batches(seeded, epoch, start=0, **changes):
    loader = loaders.train_loader(seeded.dataset, loader_args(**changes), torch.device("cpu"))
    loader.sampler.set_epoch(epoch, start)
    return list(loader)


def test_workers_do_not_change_the_samples(seeded):
    for (imgs, labels), (imgs2, labels2) in zip(batches(seeded, 2), batches(seeded, 2, num_workers=2), strict=True):
        assert torch.equal(imgs, imgs2)
        assert torch.equal(labels, labels2)


def test_epochs_differ_and_hold_every_image_once(seeded):
    seeded.dataset.transform = transforms.PillowTransform(
        transforms.Recipe([lambda image: torch.tensor(image.getpixel((0, 0)))], IMAGENET)
    )
    orders = []
    for epoch in (0, 1):
        colours = torch.cat([imgs for imgs, _ in batches(seeded, epoch)])
        assert len(colours) == 24
        assert len(torch.unique(colours, dim=0)) == 24
        orders.append(colours)
    assert not torch.equal(*orders)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_in_the_middle(seeded, workers):
    whole = batches(seeded, 2)
    rest = batches(seeded, 2, start=3 * 4, num_workers=workers)
    assert len(rest) == len(whole) - 3
    for (imgs, labels), (imgs2, labels2) in zip(rest, whole[3:], strict=True):
        assert torch.equal(imgs, imgs2)
        assert torch.equal(labels, labels2)


@pytest.mark.parametrize("processes", [2, 5])
def test_the_shares_of_an_epoch_are_disjoint(seeded, monkeypatch, processes):
    """With 24 images on 5 processes, DistributedSampler's default would repeat one."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    seen = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        sampler = loaders.EpochSampler(seeded, seed=3)
        assert len(list(sampler)) == len(sampler) == 24 // processes
        seen += [index for _, index in sampler]
    assert len(set(seen)) == len(seen)


def test_pil_loads_the_same_samples_as_the_released_code(image_folder):
    """`--loader pil` equals torchvision's ImageFolder with the transform in Pillow, bit for bit."""
    transform = transforms.finetune_transform((32, 32), finetune_args())
    seeded = datasets.SeededSamples(datasets.image_dataset(str(image_folder), "train", transform, "pil"), seed=3)
    released = ImageFolder(str(image_folder / "train"), transform)
    for index in range(len(released)):
        seeding.seed_sample(3, 7, index)
        want, label = released[index]
        (image, numbers), broken = seeded[7, index]
        assert torch.equal(image, want)
        assert (numbers, broken) == ([label], {})


def test_two_processes_share_each_batch_of_one(seeded, monkeypatch):
    """The batches of ranks 0 and 1 together are the batch of twice their size on one process."""
    whole = [set(labels_and_pixels(b)) for b in batches(seeded, 0, batch_size=8)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    halves = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        halves.append([set(labels_and_pixels(b)) for b in batches(seeded, 0, batch_size=4)])
    assert [a | b for a, b in zip(*halves, strict=True)] == whole


def labels_and_pixels(batch):
    imgs, labels = batch
    return [(label.item(), image.sum().item()) for image, label in zip(imgs, labels, strict=True)]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_of_an_evaluation_hold_each_image_once(processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    seen = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        sampler = loaders.ShareSampler(range(7), distributed=True)
        assert len(list(sampler)) == len(sampler)
        seen += sampler
        assert list(loaders.ShareSampler(range(7), distributed=False)) == list(range(7))
    assert sorted(seen) == list(range(7))


def test_prefetching_keeps_all_batches_in_order(seeded, monkeypatch):
    """The code for a GPU, without its streams: each batch is waited for, and the next one is fetched after its use."""
    events = []
    stream = argparse.Namespace(wait_stream=lambda other: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, of: events.append("record"))
    loader = loaders.train_loader(seeded.dataset, loader_args(), torch.device("cpu"))
    finish = loader.finish
    loader.finish = lambda *batch: events.append("copy") or finish(*batch)
    want = list(loader)
    events.clear()
    got = [events.append("train") or batch for batch in loader._ahead()]
    assert events[:8] == ["copy", "wait", "record", "record", "train", "copy", "wait", "record"]
    for (imgs, labels), (want_imgs, want_labels) in zip(got, want, strict=True):
        assert torch.equal(imgs, want_imgs)
        assert torch.equal(labels, want_labels)


# ---- worker processes


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in Linux's /proc")
@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (signal.SIGKILL, r"DataLoader worker \(pid(\(s\))? .*\) (is killed by signal: Killed|exited unexpectedly)"),
        (signal.SIGSTOP, r"DataLoader timed out after 3 seconds"),
    ],
)
def test_a_worker_that_is_killed_or_hangs_ends_the_run(jpeg_folder, tmp_path, sent, message):
    words = pretrain_words(
        jpeg_folder, "--num_workers", 2, "--worker_timeout", 3, "--epochs", 100000, "--batch_size", 8
    )
    command = [sys.executable, REPOSITORY / "main_pretrain.py", *words, "--output_dir", tmp_path]
    process = ForkedScript(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("epoch 0: loss"):
                break
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[0], sent)
        start = time.monotonic()
        _, error = process.communicate(timeout=60)
        assert time.monotonic() - start < 20
        assert process.returncode == 1
        assert re.search(rf"^main_pretrain\.py: rank 0: {message}", error, re.MULTILINE), error
        assert "Traceback" not in error
        assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    finally:
        process.kill()


FULL = "/dev/shm is full: use a smaller --num_workers or --batch_size"


LACKS = {
    "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)": FULL,
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ... out of shared memory.": FULL,
    "[Errno 28] No space left on device": FULL,
    "[Errno 24] Too many open files": "raise the limit (ulimit -n)",
    "DataLoader worker (pid 7) is killed by signal: Killed. ": "if memory ran out",
}


@pytest.mark.parametrize("message", LACKS)
def test_resources_that_workers_lack_are_named_with_a_remedy(message):
    def batches():
        raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n{message}")
        yield

    with pytest.raises(RunError) as raised:
        list(DeviceLoader(batches(), None, torch.device("cpu")))
    text = str(raised.value)
    assert text.startswith(f"{message}; ")
    assert LACKS[message] in text
    assert "\n" not in text


def test_other_errors_of_a_loader_keep_their_traceback():
    def batches():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshapes do not fit")
        yield

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(DeviceLoader(batches(), None, torch.device("cpu")))


@pytest.mark.parametrize("size", ["4k", "64k"])  # no space for a semaphore, or for a batch
def test_a_full_shared_memory(jpeg_folder, tmp_path, size):
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    try:
        refused = subprocess.run([*alone, mount], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("util-linux's unshare is not installed")
    if refused.returncode:
        pytest.skip(f"a file system cannot be mounted in a namespace here: {refused.stderr.strip()}")
    words = pretrain_words(jpeg_folder, "--num_workers", 2, "--output_dir", tmp_path / "out")
    done = subprocess.run(
        [*alone, f'{mount} && exec "$0" "$@"', sys.executable, REPOSITORY / "main_pretrain.py", *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    reason = "(No space left on device|unable to allocate shared memory)"  # torch 2.11 does not name the reason
    assert re.fullmatch(rf"main_pretrain\.py: rank 0: .*{reason}.*; {FULL}.*\n", done.stderr), done.stderr
