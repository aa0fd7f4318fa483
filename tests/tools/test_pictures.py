"""Test sheets of predictions, curves of runs, and trackers."""

import json
import re
import shutil
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from fork_server import run_forked
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import main_pretrain
from Finetuning import main_finetune
from pretrained import load
from tools import plot_log, visualize
from util.checkpoints import checkpoint_file
from util.data.sources.readers import open_source
from util.data.transforms import eval_transform
from util.tracking import prediction_figures
from util.tracking.run_log import RunLog

ONE_EPOCH = "--batch_size 8 --epochs 1 --warmup_epochs 0 --norm_pix_loss".split()


@pytest.fixture
def build():
    def model(*words):
        torch.manual_seed(0)
        args = main_pretrain.get_args_parser().parse_args([*TINY_PRETRAIN, *words, "--data_path", "x"])
        return main_pretrain.build_model(args)

    return model


@pytest.mark.parametrize("words", [[], ["--norm_pix_loss"]])
def test_a_perfect_prediction_gives_the_image_back(build, monkeypatch, words):
    model, imgs = build(*words), torch.randn(2, 3, 48, 32)
    monkeypatch.setattr(model, "forward_decoder", lambda latents, order: model.target(imgs))
    predicted, losses, _ = model.predicted_images(imgs)
    assert torch.allclose(predicted, imgs, atol=1e-5)
    assert losses.nan_to_num().max() == 0


def test_only_the_first_cluster_is_given(build):
    model, imgs = build("--norm_pix_loss"), torch.randn(2, 3, 48, 32)
    predicted, losses, _ = model.predicted_images(imgs)
    assert torch.equal(predicted[:, :, :16, :16], imgs[:, :, :16, :16])
    different = (predicted != imgs).float()
    assert different[:, :, 16:].mean() > 0.99
    assert different[:, :, :, 16:].mean() > 0.99
    assert losses.shape == (2, 6, 4)
    assert losses[:, :2, :2].isnan().all()
    assert losses.nanmean().item() == pytest.approx(model(imgs).mean().item())


def test_losses_stand_where_their_patches_are(build, monkeypatch):
    """The patch in the third row and second column is predicted worse than the others."""
    model, imgs = build(), torch.randn(1, 3, 48, 32)
    worse = imgs.clone()
    worse[:, :, 16:24, 8:16] += 1
    monkeypatch.setattr(model, "forward_decoder", lambda latents, order: model.target(worse))
    losses = model.predicted_images(imgs).losses
    assert losses[0, 2, 1].item() == pytest.approx(1)
    assert losses.nansum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("order", "places"),
    [
        ("row", [[0, 1], [2, 3], [4, 5]]),
        ("row_reverse", [[5, 4], [3, 2], [1, 0]]),
        ("column", [[0, 3], [1, 4], [2, 5]]),
        ("column_reverse", [[5, 2], [4, 1], [3, 0]]),
    ],
)
def test_pictures_of_every_order(build, order, places):
    """The cluster that is read first is given."""
    model, imgs = build("--order", order), torch.randn(2, 3, 48, 32)
    predicted = model.predicted_images(imgs)
    assert predicted.places.tolist() == [places] * 2
    given = (torch.tensor(places) == 0).repeat_interleave(2, 0).repeat_interleave(2, 1)  # (rows, columns)
    assert torch.equal(predicted.losses.isnan(), given.expand(2, -1, -1))
    pixels = given.repeat_interleave(8, 0).repeat_interleave(8, 1)  # (H, W)
    same = predicted.images == imgs
    assert same[:, :, pixels].all()
    assert same[:, :, ~pixels].float().mean() < 0.01


def test_random_orders_in_pictures(build):
    imgs = torch.randn(4, 3, 48, 32)
    for order in ("random", "random_per_image"):
        predicted = build("--order", order).predicted_images(imgs)
        assert predicted.places.flatten(1).sort().values.tolist() == [list(range(6))] * 4
        given = (predicted.places == 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(predicted.losses.isnan(), given)
    assert len({str(places) for places in predicted.places.tolist()}) > 1


def test_hidden_patches_in_pictures(build):
    model, imgs = build("--objective", "mae"), torch.randn(2, 3, 48, 32)
    images, losses, places = model.predicted_images(imgs)
    assert places is None
    assert (~losses.isnan()).sum((1, 2)).tolist() == [18, 18]  # 75 % of 24
    hidden = (~losses.isnan()).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(imgs)
    assert torch.equal(images[~hidden], imgs[~hidden])
    assert (images == imgs)[hidden].float().mean() < 0.01
    (figure, _) = prediction_figures.draw_sheets(model, imgs)
    seen = figure.axes[1].images[0].get_array()
    losses = figure.axes[3].images[0].get_array()
    grey = (seen == 0.5).all(-1)[::8, ::8]
    assert (grey == ~np.isnan(losses)).all()


@pytest.fixture(scope="module")
def pretrained(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    argv = [*TINY_PRETRAIN, *ONE_EPOCH, "--data_path", image_folder, "--output_dir", folder]
    main_pretrain.main(main_pretrain.get_args_parser().parse_args([str(word) for word in argv]))
    return folder / "checkpoint-last.pth"


def test_one_sheet_an_image(pretrained, tmp_path, run_script, capsys):
    """Images have any size and mode; those of one name get sheets of their own."""
    images = []
    for i, (mode, size) in enumerate({"L": (1, 1), "P": (300, 20), "RGBA": (20, 300), "I;16": (50, 40)}.items()):
        images.append(tmp_path / str(i) / "same.png")
        images[-1].parent.mkdir()
        Image.new(mode, size).save(images[-1])
    run_script(visualize, pretrained, *images, "--output", tmp_path / "sheets", "--device", "cpu")
    names = ["same-sheet.png", *(f"same-sheet-{i}.png" for i in (2, 3, 4))]
    assert capsys.readouterr().out.splitlines()[-4:] == [str(tmp_path / "sheets" / name) for name in names]
    for name in names:
        width, height = Image.open(tmp_path / "sheets" / name).size
        assert width > 2 * height > 600


def test_sizes_are_read_off_the_checkpoint(pretrained, tmp_path):
    """Also of a bare state dict, whose cluster size and target are those of the published models."""
    content = checkpoint_file.read(pretrained)
    model = load(pretrained)[0]
    assert (model.grid_size, model.cluster_size, model.dec_depth, model.norm_pix_loss) == ((6, 4), 2, 2, True)
    torch.save({"model": content["model"], "args": Namespace(**{**vars(content["args"]), "norm_pix_loss": False})},
               tmp_path / "raw.pth")  # fmt: skip
    assert not load(tmp_path / "raw.pth")[0].norm_pix_loss
    square = main_pretrain.get_args_parser().parse_args([*TINY_PRETRAIN, "--data_path", "x", "--input_size", "64"])
    square.cluster_size = 4
    torch.save(main_pretrain.build_model(square).state_dict(), tmp_path / "bare.pth")
    model = load(tmp_path / "bare.pth")[0]
    assert (model.grid_size, model.cluster_size, model.dec_depth, model.norm_pix_loss) == ((8, 8), 4, 2, True)


def test_mistakes_of_visualize(pretrained, image_folder, tmp_path, run_script, capsys):
    image = image_folder / "val" / "class_0" / "0.png"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "file").write_text("")
    classifier = main_finetune.get_args_parser().parse_args([*TINY_FINETUNE, "--data_path", "x"])
    torch.save(main_finetune.build_classifier(classifier, None).state_dict(), tmp_path / "classifier.pth")
    for words, message in (
        ([tmp_path / "none.pth", image], "no checkpoint file"),
        ([tmp_path / "classifier.pth", image], "classifier.pth is of classification: only checkpoints of pretraining"),
        ([pretrained, tmp_path / "none.png"], "none.png: "),
        ([pretrained, tmp_path / "text.png"], "text.png: no image of a known format"),
        ([pretrained, image, "--output", tmp_path / "file"], "--output .*file: "),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_script(visualize, *words, "--device", "cpu")
        assert exit_info.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("visualize.py: error: ")
        assert re.search(message, line), line


def test_fixed_images(image_folder, tmp_path):
    """They cover all classes of val/, or of train/ if val/ is missing or empty; broken images are left out."""
    want = [
        image_folder / "val" / name for name in ("class_0/0.png", "class_0/2.png", "class_1/1.png", "class_2/1.png")
    ]
    transform = eval_transform((48, 32), "shorter")

    def fixed(folder):
        path = str(folder)
        return prediction_figures.fixed_images(path, (48, 32), open_source(path, "train", labels=False))

    images = fixed(image_folder)
    assert torch.equal(images, torch.stack([transform(Image.open(path)) for path in want]))
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_text("no image")
    assert fixed(tmp_path) is None
    Image.new("L", (9, 9)).save(folder / "1.png")
    (tmp_path / "val").mkdir()
    assert fixed(tmp_path).shape == (1, 3, 48, 32)
    for name in "ab":
        Image.new("L", (9, 9)).save(tmp_path / "val" / f"{name}.png")
    assert fixed(tmp_path).shape == (2, 3, 48, 32)


def test_sheets_of_a_run(pretrained, image_folder, tmp_path, run_script, monkeypatch):
    """They are drawn every --vis_freq epochs and do not change the run."""
    shown = []
    monkeypatch.setattr(SummaryWriter, "add_image", lambda self, name, pixels, step, **how: shown.append((name, step)))
    argv = [*TINY_PRETRAIN, *ONE_EPOCH, "--data_path", image_folder, "--output_dir", tmp_path]
    run_script(main_pretrain, *argv, "--vis_freq", 1)
    assert shown == [(f"image_{i}", 1000) for i in range(4)]
    got, want = (checkpoint_file.read(path)["model"] for path in (tmp_path / "checkpoint-last.pth", pretrained))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_drawing_compiles_nothing(build):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = build()
    model.compile(backend=backend)
    (figure,) = prediction_figures.draw_sheets(model, torch.randn(1, 3, 48, 32))
    assert not compiled
    assert prediction_figures.pixels(figure).dtype == np.uint8


# ---- curves


def log_file(folder, *rows):
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_are_compared(tmp_path):
    """There is a panel for each logged quantity; the last line of an epoch is drawn; half a line is ignored."""
    first = log_file(tmp_path / "a" / "run", *({"epoch": e, "train_loss": 1 / (e + 1)} for e in range(3)))
    rows = [{"epoch": 1, "train_loss": 9.0}, {"epoch": 0, "train_loss": 3.0, "test_acc1": 50.0}]
    second = log_file(
        tmp_path / "b" / "run", *rows, {"epoch": 1, "train_loss": 2.0, "train_lr": float("nan")}, '{"epoch": 2'
    )
    assert [row["train_loss"] for row in plot_log.read(second / "log.txt")] == [3, 2]
    figure = plot_log.draw({"one": plot_log.read(first), "two": plot_log.read(second)})
    assert [axis.get_title() for axis in figure.axes] == ["training loss", "learning rate", "top-1 on val (%)"]
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["one", "two"]
    assert lines[1].get_xydata().tolist() == [[1, 3], [2, 2]]
    done = run_forked([REPOSITORY / "tools" / "plot_log.py", first, second, "--output", tmp_path / "runs.png"])
    ignored = f"{second}/log.txt: 1 malformed or incomplete lines are ignored\n"
    assert done.stdout == f"{ignored}{tmp_path}/runs.png\n", done.stderr
    assert np.asarray(Image.open(tmp_path / "runs.png").convert("L")).std() > 10


def test_a_run_that_repeats_epochs(tmp_path):
    """Its later lines replace the earlier lines of these epochs and of all later epochs."""
    rows = [{"epoch": epoch, "train_loss": loss} for epoch, loss in enumerate([4, 3, 2, 1])]
    folder = log_file(tmp_path / "a", *rows, {"epoch": 1, "train_loss": 5})
    assert [(row["epoch"], row["train_loss"]) for row in plot_log.read(folder)] == [(0, 4), (1, 5)]


def test_a_line_after_half_a_line(tmp_path):
    log = RunLog(tmp_path, tmp_path, None)
    log.epoch(epoch=0, train_loss=3.0)
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 1, "tr')
    log.epoch(epoch=1, train_loss=2.0)
    log.epoch(epoch=2, train_loss=1.0)
    assert [row["train_loss"] for row in plot_log.read(tmp_path)] == [3, 2, 1]


def test_mistakes_of_plot_log(tmp_path, run_script, capsys):
    empty, good = log_file(tmp_path / "empty"), log_file(tmp_path / "good", {"epoch": 0, "train_loss": 1.0})
    other = log_file(tmp_path / "other", {"epoch": 0, "bleu": 1.0})
    for words, message in (
        ([tmp_path / "none"], "No such file or directory"),
        ([empty], "log.txt: no epoch is logged in it"),
        ([other], "nothing to draw: no line has any of train_loss, "),
        ([good, "--output", tmp_path / "x.docx"], "--output: Format 'docx' is not supported"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_script(plot_log, *words)
        assert exit_info.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_run_logs_its_speed(pretrained):
    (row,) = plot_log.read(pretrained.parent)
    assert 0 < row["images_per_second"] < 1e5


# ---- trackers


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """Return a stand-in for a tracker that records its calls."""
    module, calls = ModuleType(request.param), []
    module.init = lambda **values: calls.append(("init", values))
    module.log = lambda values, step: calls.append((values, step))
    module.Image = lambda pixels: SimpleNamespace(pixels=pixels)
    module.calls = calls
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_run_logs_to_a_tracker(tracker, image_folder, tmp_path, run_script):
    argv = [*TINY_PRETRAIN, *ONE_EPOCH, "--data_path", image_folder, "--output_dir", tmp_path / "out"]
    run_script(main_pretrain, *argv, "--vis_freq", 1, "--tracker", tracker.__name__)
    (_, started), *points = tracker.calls
    assert (started["project"], started["resume"]) == ("arm", "allow")
    assert started["name"].startswith("out-")
    assert started.get("id") == (started["name"] if tracker.__name__ == "wandb" else None)
    names = {name for values, _ in points for name in values}
    assert names == {"train_loss", "lr", "grad_norm", *(f"image_{i}" for i in range(4))}
    ((image, step),) = [(values["image_0"], step) for values, step in points if "image_0" in values]
    assert step == 1000
    assert (image.pixels.dtype, image.pixels.ndim) == (np.uint8, 3)
    assert not list((tmp_path / "out").glob("events.out.tfevents.*"))


def test_a_tracker_that_fails_later(tracker, image_folder, tmp_path, run_script, capsys):
    """The run continues without it. When resumed, it has the same name there; a new run in the folder has another."""

    def log(*_, **__):
        raise ValueError("quota exceeded")

    tracker.log = log
    argv = [*TINY_PRETRAIN, *ONE_EPOCH, "--data_path", image_folder, "--output_dir", tmp_path / "out"]
    argv += ["--tracker", tracker.__name__, "--resume", "auto", "--allow_changed_args"]
    run_script(main_pretrain, *argv)
    assert capsys.readouterr().out.count("the log cannot be written: quota exceeded; training continues") == 1
    assert len(plot_log.read(tmp_path / "out")) == 1
    run_script(main_pretrain, *argv, "--epochs", 2)
    shutil.rmtree(tmp_path / "out")
    run_script(main_pretrain, *argv)
    first, again, other = (values["name"] for kind, values in tracker.calls if kind == "init")
    assert first == again != other


def test_a_tracker_that_is_not_there(monkeypatch, image_folder, tmp_path, run_script, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    argv = [*TINY_PRETRAIN, *ONE_EPOCH, "--data_path", image_folder, "--output_dir", tmp_path, "--tracker", "trackio"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *argv)
    assert exit_info.value.code == 2
    assert "error: --tracker trackio: it is not installed: pip install trackio\n" in capsys.readouterr().err


def test_a_tracker_that_does_not_start(tracker, image_folder, tmp_path, run_script, capsys):
    def init(**_):
        raise ConnectionError("no network")

    tracker.init = init
    argv = [*TINY_PRETRAIN, *ONE_EPOCH, "--data_path", image_folder, "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *argv, "--tracker", tracker.__name__)
    assert exit_info.value.code == 1
    assert f"--tracker {tracker.__name__}: no network" in capsys.readouterr().err
