"""log.txt is strict JSON and agrees with TensorBoard; damaged lines are counted."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY, TINY_PRETRAIN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from tools import plot_log
from util.errors import UserError
from util.tracking.run_log import RunLog

WORDS = [*TINY_PRETRAIN, *"--batch_size 8 --epochs 3 --warmup_epochs 1 --save_freq 1 --vis_freq 1".split()]


def curves(folder):
    """Steps of each curve and of each image, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()  # 0: all, not a sample
    tags = events.Tags()
    scalars = {name: [event.step for event in events.Scalars(name)] for name in tags["scalars"]}
    return scalars, {name: [event.step for event in events.Images(name)] for name in tags["images"]}


@pytest.fixture(scope="module")
def three_epochs(image_folder, tmp_path_factory):
    """A finished run of three epochs of three updates."""
    folder = tmp_path_factory.mktemp("run")
    main_pretrain.main(parsed(image_folder, folder))
    return folder


def parsed(image_folder, folder, *more):
    words = [*WORDS, "--data_path", image_folder, "--output_dir", folder, *more]
    return main_pretrain.get_args_parser().parse_args([str(word) for word in words])


def test_each_update_is_logged_once_after_going_back(image_folder, tmp_path):
    """The first update of an epoch, too, where each is logged: its place is not that of the evaluation before it."""
    words = ["--save_every_steps", 1, "--output_dir", tmp_path / "run"]
    main_pretrain.main(parsed(image_folder, tmp_path, *words))
    shown = curves(tmp_path / "run")
    assert shown[0]["train_loss"] == [0, 333, 666, 1001, 1333, 1666, 2001, 2333, 2666]
    main_pretrain.main(parsed(image_folder, tmp_path, *words, "--resume", tmp_path / "run" / "checkpoint-0.pth"))
    assert curves(tmp_path / "run") == shown


@pytest.mark.parametrize("more", [["--resume", "checkpoint-0.pth"], ["--start_epoch", 1]])
def test_each_step_is_logged_once_after_going_back(more, three_epochs, image_folder, tmp_path):
    folder = shutil.copytree(three_epochs, tmp_path / "run")
    before = (folder / "log.txt").read_text().splitlines()
    shown = curves(folder)
    assert shown[1]["image_0"] == [1000, 2000, 3000]
    words = [*more, "--resume", "auto"] if "--start_epoch" in more else ["--resume", folder / more[1]]
    main_pretrain.main(parsed(image_folder, folder, *words))
    assert [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()] == [0, 1, 2]
    assert (folder / "log.txt").read_text().splitlines()[0] == before[0]
    assert (folder / "log.replaced.txt").read_text().splitlines() == before[1:]
    assert curves(folder) == shown
    assert shown[0]["train_loss"] == sorted(set(shown[0]["train_loss"]))


def test_a_run_killed_inside_an_epoch_logs_each_step_once(image_folder, tmp_path):
    """Points that were logged after the checkpoint of one update stand in the files twice."""
    main_pretrain.main(parsed(image_folder, tmp_path / "whole"))
    words = ["--save_every_steps", 1, "--epochs", 3]
    main_pretrain.main(parsed(image_folder, tmp_path / "run", *words))
    whole = curves(tmp_path / "run")
    for name in ("checkpoint-last.pth", "checkpoint-2.pth", "checkpoint-1.pth"):
        (tmp_path / "run" / name).unlink()  # of the end: the newest left is of two updates of the last epoch
    main_pretrain.main(parsed(image_folder, tmp_path / "run", *words, "--resume", "auto"))
    assert curves(tmp_path / "run") == whole
    assert [row["epoch"] for row in plot_log.read(tmp_path / "run")] == [0, 1, 2]


def test_a_later_start_keeps_earlier_lines(tmp_path, capsys):
    log = RunLog(tmp_path, tmp_path)
    log.start_at(0, 0)
    for epoch in range(3):
        log.epoch(epoch=epoch, train_loss=1.0)
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 3, "tr')
    log = RunLog(tmp_path, tmp_path)
    log.start_at(3, 3001)
    log.start_at(0, 0)  # of a later epoch's loop: only where the process starts counts
    assert [row["epoch"] for row in plot_log.read(tmp_path)] == [0, 1, 2]
    assert not (tmp_path / "log.replaced.txt").exists()
    assert "logged again" not in capsys.readouterr().out


def test_log_txt_is_strict_json(tmp_path):
    log = RunLog(tmp_path, tmp_path)
    log.epoch(epoch=0, train_loss=float("nan"), test_loss=float("inf"))
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"epoch": 0, "train_loss": None, "test_loss": None}
    (row,) = plot_log.read(tmp_path)
    assert row["train_loss"] != row["train_loss"]  # a gap in the curve


ODD = [
    '{"epoch": 1.0, "train_loss": 1}', '{"epoch": true, "train_loss": 1}', '{"epoch": -1}', '{"epoch": 1e308}',
    '{"epoch": "1"}', '{"train_loss": 1}', "[1, 2]", "null", '"epoch"', "[" * 100_000, '{"epoch": 1, "tr', "\x00\x01",
    '{"epoch": ' + "9" * 5000 + "}",
]  # fmt: skip


def test_odd_lines_are_counted(tmp_path, caplog):
    good = ['{"epoch": 0, "train_loss": 3}', '{"epoch": 1, "train_loss": "x", "test_acc1": ' + "9" * 400 + "}"]
    good += ['{"epoch": 2, "train_loss": [1], "test_acc1": null}', '{"epoch": 3, "train_loss": Infinity}']
    text = "\n".join([good[0], *ODD, *good[1:]]).encode() + b"\n\xff\xfe\n"
    (tmp_path / "log.txt").write_bytes(text)
    rows = plot_log.read(tmp_path)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["train_loss"] == 3
    assert all(rows[i][key] != rows[i][key] for i, key in ((1, "train_loss"), (1, "test_acc1"), (2, "train_loss")))
    (line,) = caplog.messages
    assert line.endswith(f"{len(ODD) + 1} malformed or incomplete lines are ignored")
    plot_log.draw({os.fsdecode(b"caf\xe9"): rows}).savefig(tmp_path / "x.png")


def test_files_that_are_no_log_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "folder" / "log.txt").mkdir(parents=True)
    for name in ("fifo", "binary", "folder", "none", "x" * 5000):
        with pytest.raises(UserError) as refused:
            plot_log.read(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path, capsys):
    """A pipe without a reader does not block the run; nothing is written through a link."""
    for make in (os.mkfifo, os.mkdir):
        (folder := tmp_path / make.__name__).mkdir()
        make(folder / "log.txt")
        log = RunLog(folder, folder)
        log.start_at(0, 0)
        log.epoch(epoch=0, train_loss=1.0)
        (line,) = capsys.readouterr().out.splitlines()
        assert re.fullmatch("the log cannot be written: .*log.txt'; training continues without it", line)
    other, log = tmp_path / "other", RunLog(tmp_path, tmp_path)
    other.write_text("precious")
    (tmp_path / "log.replaced.txt").symlink_to(other)
    log.epoch(epoch=0, train_loss=1.0)
    log.start_at(0, 0)
    assert "the log cannot be written" in capsys.readouterr().out
    assert other.read_text() == "precious"
    assert [row["epoch"] for row in plot_log.read(tmp_path)] == [0]  # nothing is taken out that was not kept


NAMES = ["_run", "$\\frac$", "$$", "a\nb", os.fsdecode(b"\xff"), "x" * 200]


@pytest.mark.parametrize("values", [[1e308, -1e308, 1], [2.0**128, -(2.0**128), 0], [10**400, 1, 2], [None, True, "x"]])
def test_odd_names_and_numbers_are_drawn(values, tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        rows = [{"epoch": i * 10**8, "train_loss": value} for i, value in enumerate(values)]
        (tmp_path / name / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = plot_log.draw({name: plot_log.read(tmp_path / name) for name in NAMES})
    figure.savefig(tmp_path / "x.png")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[:5] == ["./_run", r"\$\frac\$", r"\$\$", r"a\nb", r"\xff"]
    assert len(shown) == len(NAMES)


def test_a_long_log_is_read(tmp_path):
    """A copy of all rows for every line would take hours."""
    (tmp_path / "log.txt").write_text("".join(f'{{"epoch": {i}}}\n' for i in range(200_000)))
    assert len(plot_log.read(tmp_path)) == 200_000


def test_random_damage(tmp_path):
    """Intact lines are all read, damaged ones are no other lines of another epoch."""
    rng, path = random.Random(0), tmp_path / "log.txt"
    lines = [json.dumps({"epoch": i, "train_loss": i / 7, "images_per_second": 9.5}).encode() for i in range(6)]
    for _ in range(500):
        damaged = rng.randrange(len(lines))
        line = bytearray(lines[damaged])
        for _ in range(rng.randint(1, 3)):
            kind, place = rng.randrange(3), rng.randrange(max(1, len(line)))
            if kind == 0 and line:
                line[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del line[place:]
            else:
                line[place:place] = rng.randbytes(rng.randint(1, 20))
        path.write_bytes(b"\n".join([*lines[:damaged], bytes(line), *lines[damaged + 1 :]]))
        rows = {row["epoch"]: row for row in plot_log.read(path)}
        for i in range(damaged + 1, len(lines)):  # a damaged epoch may take those before it back, never those after
            assert rows[i]["train_loss"] == i / 7


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../x", b"abcdef" * 1000])
def test_a_malformed_tracker_id_is_replaced(tmp_path, content):
    from util.tracking.run_log import TRACKER_ID, Tracker

    target = tmp_path / "other"
    target.write_bytes(content)
    (tmp_path / TRACKER_ID).symlink_to(target)
    known = Tracker._id_in(tmp_path)
    assert len(known) == 6
    assert Tracker._id_in(tmp_path) == known
    assert target.read_bytes() == content


def test_a_full_disk_behind_stdout_does_not_end_a_run(image_folder, tmp_path):
    """The run is trained to its end, and stderr says that its output is lost."""
    words = [*WORDS, "--data_path", image_folder, "--output_dir", tmp_path / "out"]
    command = [sys.executable, REPOSITORY / "main_pretrain.py", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(list(map(str, command)), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert re.fullmatch("stdout cannot be written: No space left on device; .*\n", done.stderr)
    assert [row["epoch"] for row in plot_log.read(tmp_path / "out")] == [0, 1, 2]
    assert (tmp_path / "out" / "checkpoint-2.pth").is_file()
