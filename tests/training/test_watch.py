"""Pretraining that is watched: values of loss, kNN and RankMe, what they leave as it is, and where they are shown."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, TINY_PRETRAIN, assert_one_line, encoded, read_log, torchrun
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters
from training_helpers import FAST, NotedLog, final_weights

import main_pretrain
from Evaluation import features, online
from tools import plot_log
from util.arguments import check_arguments
from util.data.decode import with_pillow
from util.data.sources.readers import open_source
from util.data.transforms import eval_transform
from util.errors import Interrupted
from util.seeding import seed_everything
from util.training.run_state import Run

CPU = torch.device("cpu")
# Orders are drawn anew for each image, so that a value that depends on random numbers would show it.
COMMON = [*TINY_PRETRAIN, *FAST, *"--epochs 3 --order random_per_image --batch_size 8 --print_freq 2".split()]
WATCHED = "--val_freq 1 --probe_freq 2 --probe_images 16".split()
PROBED = "--probe_freq 1 --probe_images 2000".split()
CHUNKS_OF_4 = """
import sys
sys.path.insert(0, {repository!r})
import main_pretrain
from Evaluation import online
from util import cli

online.CHUNK = 4
cli.run_main(main_pretrain.main, main_pretrain.get_args_parser())
"""


@pytest.fixture(scope="module")
def few_images():
    """Chunks of 4 images, so that small data has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "CHUNK", 4)
        yield


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory, few_images):
    """Return a function that pretrains into a folder and returns its path."""
    root = tmp_path_factory.mktemp("runs")

    def start(name, *more):
        words = [*COMMON, "--data_path", image_folder, "--output_dir", root / name, *more]
        main_pretrain.main(main_pretrain.get_args_parser().parse_args(list(map(str, words))))
        return root / name

    return start


@pytest.fixture(scope="module")
def watched(run):
    return run("watched", *WATCHED)


def assert_same_end(folder, other):
    want = final_weights(other)
    for name, value in final_weights(folder).items():
        assert torch.equal(value, want[name]), name


def watch_of(folder, *words, train=None, said=print):
    """Return a `Watch` on a folder of images, a model, and a run of it at the end of its epoch."""
    words = [*TINY_PRETRAIN, "--data_path", folder, "--epochs", 1, "--warmup_epochs", 0, *words]
    args = main_pretrain.get_args_parser().parse_args(list(map(str, words)))
    check_arguments(args)
    torch.manual_seed(0)
    model = main_pretrain.build_model(args)
    watch = online.Watch(args, train or open_source(str(folder), "train"), CPU, said)
    return watch, model, Run(args, model, torch.optim.SGD(model.parameters()))


# ---- what it leaves as it is


def test_a_watched_run_equals_one_that_is_not(run, watched):
    plain = run("plain")
    assert_same_end(watched, plain)
    kept = ("epoch", "train_loss", "train_lr")
    assert [{name: row[name] for name in kept} for row in read_log(watched)] == read_log(plain)


def test_a_resumed_run_equals_the_uninterrupted_one(run, watched):
    resumed = run("resumed", *WATCHED, "--resume", watched / "checkpoint-0.pth")
    assert_same_end(resumed, watched)
    assert read_log(resumed) == read_log(watched)[1:]


def test_a_resumed_run_can_be_watched_otherwise(run, watched):
    more = ["--resume", watched / "checkpoint-0.pth", *"--probe_freq 1 --print_freq 1".split()]  # 2000 images
    assert_same_end(run("otherwise", *more), watched)


def test_a_stop_during_a_probe_ends_it(run, watched, monkeypatch):
    """After the chunk that is computed; the run resumes at the end of the epoch, and repeats no update."""
    calls = []

    def encode(*args):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return features.encode(*args)

    monkeypatch.setattr(online, "encode", encode)
    with pytest.raises(Interrupted, match="stopped in epoch 1 after 24 images; --resume auto resumes there"):
        run("stopped", *WATCHED)
    assert len(calls) == 1
    monkeypatch.undo()
    monkeypatch.setattr(online, "CHUNK", 4)
    folder = run("stopped", *WATCHED, "--resume", "auto")
    assert_same_end(folder, watched)
    assert read_log(folder) == read_log(watched)


def test_generators_and_mode_are_left(image_folder, few_images):
    watch, model, of_model = watch_of(image_folder, *WATCHED, "--order", "random_per_image")
    model.train()
    before = [torch.get_rng_state(), np.random.get_state()[1].copy()]
    first = watch.measure(model, of_model, NotedLog())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert model.training
    torch.rand(1)
    again = watch.measure(model, of_model, NotedLog())
    assert {**first, "val_share": 0, "probe_share": 0} == {**again, "val_share": 0, "probe_share": 0}


def test_nothing_is_compiled(image_folder, few_images):
    """Else the graphs of training, compiled later in a resumed run, would be of variable batches."""
    watch, model, of_model = watch_of(image_folder, *WATCHED)
    torch._dynamo.reset()
    counters.clear()
    want = watch.measure(model, of_model, NotedLog())
    model.compile(backend="eager")
    found = watch.measure(model, of_model, NotedLog())
    assert found["test_loss"] == want["test_loss"]
    assert not counters["stats"]
    model(torch.randn(2, 3, 48, 32)).mean().backward()
    assert counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


# ---- values


def test_two_processes_equal_one(run, image_folder, tmp_path, watched):
    """To the last bit, at learning rate 0, with which all have the same weights; also where these are sharded."""
    alone = read_log(run("still", *WATCHED, "--lr", 0, "--epochs", 1))
    (tmp_path / "chunks.py").write_text(CHUNKS_OF_4.format(repository=str(REPOSITORY)))
    words = [*COMMON, "--data_path", image_folder, *WATCHED, "--lr", 0, "--epochs", 1, "--batch_size", 4]
    values = [{name: alone[0][name] for name in ("test_loss", "test_knn_acc1", "rankme")}]
    for name, more in (("ddp", []), ("fsdp", ["--fsdp"])):
        torchrun(tmp_path / "chunks.py", *words, *more, "--output_dir", tmp_path / name)
        values.append({key: read_log(tmp_path / name)[0][key] for key in values[0]})
    assert values[1] == values[0] == values[2]


@pytest.mark.parametrize("objective", ["arm", "mae"])
def test_the_loss_is_that_of_the_model(objective, image_folder, few_images):
    """Each image of val/ once; the last chunk is smaller, and counts as much less."""
    words = ["--val_freq", 1, "--order", "random_per_image", "--objective", objective]
    watch, model, of_model = watch_of(image_folder, *words)
    val, transform = open_source(str(image_folder), "val"), eval_transform((48, 32), "square")
    imgs, total = torch.stack([transform(with_pillow(val.read(i))) for i in range(7)]), 0.0
    for start in (0, 4):
        seed_everything(0, start, of_rank=0)
        part = imgs[start : start + 4]
        total += len(part) * model(part).mean().item()
    assert watch.measure(model, of_model, NotedLog())["test_loss"] == pytest.approx(total / 7, rel=1e-6)


def test_broken_images_are_left_out_and_counted(image_folder, tmp_path, few_images):
    root, said = shutil.copytree(image_folder, tmp_path / "images"), []
    whole = watch_of(root, *WATCHED)
    (root / "val" / "class_0" / "9.png").write_bytes(b"no image")
    watch, model, of_model = watch_of(root, *WATCHED, said=said.append)
    found, want = watch.measure(model, of_model, NotedLog()), whole[0].measure(model, of_model, NotedLog())
    assert "1 broken images of val are left out of the loss" in said
    assert found["test_loss"] == pytest.approx(want["test_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """40 handwritten digits of each of three classes to train, 8 to validate."""
    root, data = tmp_path_factory.mktemp("digits"), load_digits()
    for label in (0, 1, 2):
        for number, pixels in enumerate(data.images[data.target == label][:48]):
            image = Image.fromarray((pixels * 15).astype(np.uint8)).resize((32, 48))
            path = root / ("train" if number < 40 else "val") / str(label) / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image, "PNG"))
    return root


def test_neighbours_tell_digits_apart(digits):
    """Random weights are enough for 0, 1 and 2; wrong labels of the neighbours are found out."""
    watch, model, of_model = watch_of(digits, "--probe_freq", 1, "--probe_images", 80)
    assert (watch.queries, len(watch.probed)) == (20, 80)
    assert watch.measure(model, of_model, NotedLog())["test_knn_acc1"] >= 95
    train = open_source(str(digits), "train")
    train.labels = (train.labels + 1) % 3
    watch, _, _ = watch_of(digits, "--probe_freq", 1, "--probe_images", 80, train=train)
    assert watch.measure(model, of_model, NotedLog())["test_knn_acc1"] <= 5


def test_rankme_is_the_effective_rank():
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=(50, 7)), rng.normal(size=(7, 50)), rng.normal(size=(30, 2)) @ rng.normal(size=(2, 9))):
        values = np.linalg.svd(x.astype(np.float32), compute_uv=False).astype(np.float64)
        p = values[values > 1e-4] / values.sum()
        want = np.exp(-(p * np.log(p)).sum())
        assert online.rankme(torch.tensor(x, dtype=torch.float32)) == pytest.approx(want, rel=1e-4)
    assert online.rankme(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 5))) == pytest.approx(1, abs=1e-5)
    assert online.rankme(7 * torch.linalg.qr(torch.randn(12, 5)).Q) == pytest.approx(5, abs=1e-5)
    for nothing in (torch.zeros(3, 2), torch.zeros(0, 2), torch.tensor([[1.0, torch.nan]])):
        assert online.rankme(nothing) != online.rankme(nothing)


def test_features_that_are_not_finite(image_folder, few_images):
    """A neighbour like that is left out, a query wrong; there is no rank."""
    watch, model, of_model = watch_of(image_folder, *WATCHED)
    torch.nn.init.constant_(model.patch_embed.proj.bias, torch.nan)
    found = watch.measure(model, of_model, NotedLog())
    assert all(found[name] != found[name] for name in ("rankme", "test_knn_acc1", "test_loss"))
    bank, asked = torch.eye(3), torch.tensor([[0.0, 0, 2], [torch.nan, 0, 0], [0, 0, 0], [0, 1, 0]])
    wanted = torch.tensor([2, 0, 0, 1])
    assert watch._accuracy(bank, torch.arange(3), asked, wanted) == 50


# ---- images


def test_images_are_drawn_evenly():
    labels = np.repeat([2, 0, 1], [50, 30, 3])
    for count, want in ((9, [3, 3, 3]), (20, [9, 3, 8]), (83, [30, 3, 50]), (1000, [30, 3, 50])):
        chosen = online.draw(labels, count)
        found = np.bincount(labels[chosen], minlength=3)
        assert sorted(found) == sorted(want), (count, found)
        assert (np.diff(chosen) > 0).all()
    assert (online.draw(labels, 9) == online.draw(labels, 9)).all()
    assert not (online.draw(np.zeros(500, int), 20) == np.arange(20)).all()


def test_queries_without_val_are_no_neighbours(image_folder, tmp_path, few_images):
    root, said = tmp_path / "images", []
    shutil.copytree(image_folder / "train", root / "train")
    watch, model, of_model = watch_of(root, "--probe_freq", 1, "--probe_images", 20, said=said.append)
    bank, queries = ({part.dataset.source.name(i) for i in part.indices} for part in watch.probed.datasets)
    assert (len(bank), len(queries), bank & queries) == (15, 5, set())
    assert said[0].startswith("the probe uses training images only: ")
    assert re.fullmatch(
        rf"probe: kNN of 3 classes \(class_0, .*\), 5 images of {root}/train among 15 of {root}/train; .*", said[1]
    )
    assert watch.measure(model, of_model, NotedLog()).keys() == {"rankme", "test_knn_acc1", "probe_share"}


def test_a_loss_on_val_needs_val(image_folder, tmp_path, run_script, capsys):
    shutil.copytree(image_folder / "train", tmp_path / "images" / "train")
    words = ["--data_path", tmp_path / "images", "--output_dir", tmp_path / "out", "--val_freq", 5]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    assert_one_line(capsys, exit_info, "--val_freq 5: .*val")


def test_images_without_labels_have_a_rank(image_folder, few_images):
    train, said = open_source(str(image_folder), "train"), []
    train.classes, train.labels = [], np.zeros_like(train.labels)
    watch, model, of_model = watch_of(image_folder, *PROBED, train=train, said=said.append)
    assert re.fullmatch("probe: RankMe of 24 training images, every 1 epochs; kNN needs classes, .*", said[0])
    found = watch.measure(model, of_model, NotedLog())
    assert found.keys() == {"rankme", "probe_share"}
    imgs = torch.stack([watch.transform(train.read(i))[0] for i in range(24)])
    with torch.no_grad():
        want = np.linalg.svd(model.forward_features(imgs).mean(dim=1).numpy(), compute_uv=False)
    want /= want.sum()
    assert found["rankme"] == pytest.approx(np.exp(-(want * np.log(want)).sum()), rel=1e-4)


# ---- where it is shown


def test_logs_curves_and_panels(watched, capsys):
    """The loss after every epoch, the probe after each second and the last."""
    rows = [json.loads(line) for line in (watched / "log.txt").read_text().splitlines()]
    assert ["test_loss" in row for row in rows] == [True, True, True]
    assert ["rankme" in row and "test_knn_acc1" in row for row in rows] == [False, True, True]
    assert all(0 < row["val_share"] < 100 for row in rows)
    events = EventAccumulator(str(watched)).Reload()
    shown = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert [shown[name] for name in ("test_loss", "rankme")] == [[1000, 2000, 3000], [2000, 3000]]
    assert events.Scalars("test_knn_acc1")[1].value == pytest.approx(rows[2]["test_knn_acc1"])
    figure = plot_log.draw({"run": plot_log.read(watched)})
    assert [axis.get_title() for axis in figure.axes] == [
        "training loss", "loss on val", "learning rate", "top-1 of nearest neighbours (%)",
        "effective rank of features (RankMe)", "images a second",
    ]  # fmt: skip
    (line,) = figure.axes[4].get_lines()  # through all its points, without gaps where nothing was measured
    assert line.get_xydata().tolist() == [[epoch, rows[epoch - 1]["rankme"]] for epoch in (2, 3)]


def test_lines_of_a_run(run, capsys):
    """Every second step and the first; the shares of the time."""
    run("printed", *WATCHED, "--epochs", 2, "--warmup_epochs", 0)
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"epoch 1  \[\d/3\]|$", line)[0] for line in lines if line.startswith("epoch 1  ")] == [
        f"epoch 1  [{step}/3]" for step in (1, 2, 3)
    ]
    value = r"\d+\.\d+"
    assert re.fullmatch(
        rf"epoch 1: loss {value}, on val {value} \({value} % of the time\), 20-NN {value} %, RankMe {value} "
        rf"\({value} % of the time\); \d+ s since the start, 0:00:00 left",
        lines[-1],
    )


def test_each_step_is_shown_and_changes_nothing(run, watched):
    assert_same_end(run("every step", "--print_freq", 1), watched)
