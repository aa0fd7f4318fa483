"""Broken updates, a stuck process, a second run in the same folder, other arguments."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from fault_helpers import FINETUNE, PRETRAIN, assert_same_end, written
from fork_server import ForkedScript, run_forked
from helpers import REPOSITORY

import models_arm
from Finetuning import main_finetune
from pretrained import Checkpoint
from tools import replay_nonfinite
from util.checkpoints import checkpoint_file
from util.training import resume

# The script, but that from some update on one of its processes gets what is not finite: images, loss or gradient.
BREAKS = """
import os, sys
sys.path.insert(0, {repository!r})
import torch, engine_pretrain, main_pretrain
from util import cli
from util.data import device_loader

kind, rank, first = {kind!r}, int(os.environ["RANK"]), {first}
loss_of, to_device, calls = engine_pretrain.loss_of, device_loader.DeviceLoader._to_device, [0]

def broken_loss_of(model):
    compute_loss = loss_of(model)
    def broken(imgs, labels):
        calls[0] += 1
        loss = compute_loss(imgs, labels)
        if rank == 1 and calls[0] > first and kind == "loss":
            loss = loss * float("nan")
        if rank == 1 and calls[0] > first and kind == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss
    return broken

def broken_to_device(self, batch):
    images, labels = to_device(self, batch)
    if rank == 1 and calls[0] >= first and kind == "images":
        images[1, 2, 3:5] = float("nan")
    return [images, labels]

engine_pretrain.loss_of = broken_loss_of
device_loader.DeviceLoader._to_device = broken_to_device
cli.run_main(main_pretrain.main, main_pretrain.get_args_parser())
"""


@pytest.mark.parametrize("kind", ["loss", "gradient", "images"])
def test_one_of_two_processes_breaks(start, finished, tmp_path, kind):
    """Both skip three updates and stop, with weights of before and what reproduces the first broken one."""
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS.format(repository=str(REPOSITORY), kind=kind, first=15))
    two = ["--batch_size", 2]
    running = start([script, *PRETRAIN[1:]], *two, "--output_dir", tmp_path / "out", processes=2)
    assert running.status() == 1
    folder = tmp_path / "out" / "nonfinite-epoch1-batch3"  # of 12 batches an epoch
    message = f"the gradient was not finite in 3 updates in a row, from batch 3 of epoch 1; .*{re.escape(str(folder))}"
    assert re.search(message, running.text), running.text
    assert checkpoint_file.read(tmp_path / "out" / "checkpoint-last.pth")["epoch"] == 0

    # the state is that of a run that did not break and was stopped there
    whole = finished(PRETRAIN, *two, "--save_every_steps", 15, "--keep", 9, processes=2)
    state = checkpoint_file.read(folder / "state.pth")
    assert (state["epoch"], state["samples"]) == (0, 12)
    for path in whole.glob("checkpoint-last*.pth"):
        content = checkpoint_file.read(path)
        if resume.position(content) == (1, 12):
            want = content
    for name, value in want["model"].items():
        assert torch.equal(state["model"][name], value), name

    replay = run_forked([REPOSITORY / "tools" / "replay_nonfinite.py", folder, "--device", "cpu"])
    assert len(re.findall(r"^rank [01], batch 3: loss ", replay.stdout, re.MULTILINE)) == 2
    if kind == "images":  # the others were broken outside of model and data
        assert replay.returncode == 1
        assert "rank 1, batch 3: loss nan; the images themselves are not finite" in replay.stdout
        assert re.search(r"outputs of modules are not finite, first: patch_embed", replay.stdout)
        assert re.search(r"gradients are not finite, first: ", replay.stdout)
    else:
        assert replay.returncode == 0, replay.stdout + replay.stderr
        assert replay.stdout.endswith("everything is finite here\n")
    if kind == "loss":  # the dump is a checkpoint to resume from
        argv = ["--output_dir", tmp_path / "on", "--resume", folder / "state.pth"]
        assert start(PRETRAIN, *two, *argv, processes=2).status() == 0
        assert_same_end(tmp_path / "on", whole)


def test_replay_of_a_classifier_whose_sizes_came_from_a_checkpoint():
    """As of a run with --finetune, without --model, and with a --model_key that its own files do not have."""
    small = models_arm.create_classifier("arm_tiny_pz16", img_size=48, patch_size=8, embed_dim=32, depth=2)
    words = "--data_path x --finetune x.pth --input_size 40 --nb_classes 3 --model_key model_ema"
    args = main_finetune.get_args_parser().parse_args(words.split())
    model = main_finetune.build_classifier(args, Checkpoint("x.pth", {"model_ema": small.state_dict()}, "model_ema"))
    replayed, _ = replay_nonfinite.build({"args": args, "model": model.state_dict()})
    for name, value in model.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], value), name


def test_a_stuck_process_is_named(start, tmp_path):
    out = tmp_path / "out"
    argv = ["--batch_size", 4, "--output_dir", out, "--save_every_steps", 1, "--dist_timeout", 6, "--epochs", 50]
    running = start(FINETUNE, *argv, processes=2)
    running.until(lambda: written(out / "checkpoint-last.pth"))
    stuck = running.ranks()[1]
    os.kill(stuck, signal.SIGSTOP)
    running.until(lambda: "rank 0: no answer from rank 1, which is stuck or gone" in running.text, 60)
    os.kill(stuck, signal.SIGKILL)
    assert running.status() == 1
    assert resume.position(checkpoint_file.read(out / "checkpoint-last.pth")) > (0, 0)


def test_a_second_run_on_one_folder(start, tmp_path):
    """It is refused while the first one lives, and not after that was killed."""
    argv = [PRETRAIN, "--batch_size", 4, "--output_dir", tmp_path / "out", "--resume", "auto", "--epochs", 200]
    first = start(*argv).until(lambda: written(tmp_path / "out" / "checkpoint-last.pth"))
    second = start(*argv)
    assert second.status() == 2
    owner = rf"process {first.process.pid} on \S+ since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(rf"error: --output_dir {tmp_path}/out is in use by {owner}: wait for it", second.text)
    assert first.process.poll() is None
    first.signal(signal.SIGKILL).status()
    third = start(*argv)
    third.until(lambda: "from epoch" in third.text)
    assert re.search(rf"^{owner} ended without releasing {tmp_path}/out$", third.text, re.MULTILINE)
    third.signal(signal.SIGTERM).status()
    assert (tmp_path / "out" / "run.lock").read_text() == "{}"


def test_a_folder_of_another_run(start, tmp_path):
    """A run that does not resume from its checkpoints does not replace them."""
    argv = [PRETRAIN, "--batch_size", 4, "--epochs", 1, "--warmup_epochs", 0, "--output_dir", tmp_path / "out"]
    assert start(*argv).status() == 0
    before = (tmp_path / "out" / "checkpoint-last.pth").read_bytes()
    again = start(*argv)
    assert again.status() == 2
    assert "out holds checkpoint-0.pth of another run: --resume auto continues that run, or choose" in again.text
    assert (tmp_path / "out" / "checkpoint-last.pth").read_bytes() == before


def test_changed_arguments(start, tmp_path, images):
    """Those that change the result are listed and refused; those that do not are free."""
    out = tmp_path / "out"
    argv = ["--batch_size", 4, "--epochs", 2, "--output_dir", out, "--resume", "auto"]
    assert start(PRETRAIN, *argv, "--save_freq", 1).status() == 0
    changed = ["--batch_size", 8, "--epochs", 3, "--lr", 2e-3, "--hflip", 0, "--output_dir", out, "--resume", "auto"]
    running = start(PRETRAIN, *changed)
    assert running.status() == 2
    listed = "epochs 2 -> 3, hflip 0.5 -> 0.0, lr 0.001 -> 0.002, effective batch 4 -> 8"
    assert f"checkpoint-last.pth is of a run with other arguments: {listed}; --allow_changed_args" in running.text
    (images.parent / "link").symlink_to(images)
    other_place = ["--batch_size", 2, "--accum_iter", 2, "--num_workers", 0, "--data_path", images.parent / "link"]
    running = start(PRETRAIN, *argv[2:], *other_place, data=False)
    assert running.status() == 0, running.text
    assert "all of them done" in running.text
    running = start(PRETRAIN, *changed, "--allow_changed_args")
    assert running.status() == 0, running.text
    assert "3 epochs, from epoch 2" in running.text
    (tmp_path / "fewer" / "train" / "a").mkdir(parents=True)
    for path in (images / "train" / "class_0").iterdir():
        os.link(path, tmp_path / "fewer" / "train" / "a" / path.name)
    running = start(PRETRAIN, *changed, "--data_path", tmp_path / "fewer", data=False)
    assert running.status() == 2
    assert re.search(r"other arguments: images of --data_path \(other ones, names or order\);", running.text)


PATH = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"

WORKER = """
import argparse, multiprocessing, os, signal, sys, torch
from helpers import loader_args
from util.data.datasets import image_dataset
from util.data.loaders import train_loader
from util.data.transforms import pretrain_transform

transform = pretrain_transform((32, 32), argparse.Namespace(scale=[0.2, 1.0], hflip=0.5))
dataset = image_dataset(sys.argv[1], "train", transform, "fast")
loader = train_loader(dataset, loader_args(num_workers=1), torch.device("cpu"))
batches = iter(loader)
next(batches)
(worker,) = multiprocessing.active_children()
if os.fork() == 0:  # somebody else
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    os._exit(0)
os.wait()
print(1 + sum(1 for _ in batches), worker.is_alive())
"""


def test_workers_leave_signals_to_the_run(images):
    """Those to all processes, as Slurm sends them; at the end of a script they go all the same."""
    done = run_forked(["-c", WORKER, images], env={**os.environ, "PYTHONPATH": PATH}, timeout=60)
    assert (done.returncode, done.stdout) == (0, "12 True\n"), done.stderr


MEETS = """
import sys, time
import torch.distributed
from util.distributed.processes import _meet
time.sleep(float(sys.argv[2]))
store = torch.distributed.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
print(_meet(store, time.monotonic() + 60))
"""


def test_processes_meet_in_a_round_of_their_own():
    """Whatever earlier starts have left in the store of torchrun: rounds that some, all, or all and others joined."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for joined, complete in ((1, False), (3, True), (2, False)):
        number = store.add("rounds", 1)
        store.add(f"round {number}", joined)
        if complete:
            store.set(f"round {number} is complete", "")
    processes = [
        ForkedScript(
            [sys.executable, "-c", MEETS, str(store.port), delay],
            env={**os.environ, "PYTHONPATH": PATH, "RANK": rank, "WORLD_SIZE": "3"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, delay in (("1", "0"), ("2", "0.5"), ("0", "1"))
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["round 4\n"] * 3
