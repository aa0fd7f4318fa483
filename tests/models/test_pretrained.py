"""From a checkpoint to a model: `pretrained.load`, and what it finds in each form of file."""

import argparse
import logging
import re
import threading

import pytest
import torch
from hub_server import Server
from PIL import Image

import models_arm
import pretrained
from Evaluation.features import eval_images
from util.checkpoints.checkpoint_file import say_once
from util.data.decode import BrokenImage
from util.data.sources.image_files import FileList
from util.errors import UserError

ENCODER = {"embed_dim": 32, "depth": 2, "patch_size": 8, "in_chans": 3}
PRETRAIN = {**ENCODER, "img_size": (48, 32), "cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 2}
RUN = {"input_size": [48, 32], "order": "row", "taps": "even", "norm_pix_loss": False, "cluster_size": 2}


@pytest.fixture(autouse=True)
def _all_lines():
    say_once.cache_clear()


def pretraining(objective="arm", **options):
    torch.manual_seed(0)
    return models_arm.create_pretrain_model("arm_tiny_pz16", objective, **{**PRETRAIN, **options}).eval()


def classifier(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {**ENCODER, "img_size": (48, 32), "num_classes": 3, **options}
    return models_arm.create_classifier("arm_tiny_pz16", **sizes).eval()


def saved(path, state_dict, content=(), **args):
    """Write a checkpoint in the form of a run; return its path."""
    torch.save({"model": state_dict, "args": argparse.Namespace(**args), **dict(content)}, path)
    return path


def same(model, want):
    return model.state_dict().keys() == want.state_dict().keys() and all(
        torch.equal(value, want.state_dict()[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("objective", ["arm", "mae"])
def test_pretraining(objective, tmp_path, caplog):
    want = pretraining(objective, order="column", taps="last", norm_pix_loss=True)
    args = {**RUN, "objective": objective, "order": "column", "taps": "last", "norm_pix_loss": True}
    with caplog.at_level(logging.INFO):
        model, found = pretrained.load(saved(tmp_path / "c.pth", want.state_dict(), {"epoch": 7}, **args))
    assert type(model) is type(want)
    assert not model.training
    assert same(model, want)
    assert (model.taps, model.order, model.norm_pix_loss) == ([2, 2], "column", True)
    assert (found.is_pretraining, found.has_decoder, found.epoch, found.key) == (True, True, 7, "model")
    assert (found.sizes, found.input_size, found.class_names) == (ENCODER, (48, 32), [])
    assert found.options == {
        "objective": objective, "order": "column", "taps": "last", "norm_pix_loss": True, "cluster_size": 2,
    }  # fmt: skip
    assert "guessed" not in caplog.text
    imgs, outputs = torch.randn(2, 3, 48, 32), []
    for each in (model, want):
        torch.manual_seed(0)
        outputs.append(each(imgs))
    assert torch.equal(*outputs)


def test_classifier_with_and_without_ema(tmp_path, caplog):
    want, ema, names = classifier(global_pool=False), classifier(1, global_pool=False), ["cat", "dog", "eel"]
    args, more = {"input_size": [48, 32], "global_pool": False}, {"class_names": names, "epoch": 0}
    path = saved(tmp_path / "c.pth", want.state_dict(), more, **args)
    model, found = pretrained.load(path)
    assert same(model, want)
    assert (model.global_pool, model.training) == ("token", False)
    assert (found.is_pretraining, found.has_decoder, found.epoch, found.key) == (False, False, 0, "model")
    assert (found.sizes, found.input_size) == (ENCODER | {"num_classes": 3, "directions": 4}, (48, 32))
    assert (found.class_names, found.options) == (names, {"global_pool": False})
    with pytest.raises(UserError, match="the checkpoint has no model_ema; it has model"):
        pretrained.load(path, "model_ema")

    path = saved(tmp_path / "both.pth", want.state_dict(), {**more, "model_ema": ema.state_dict()}, **args)
    with caplog.at_level(logging.INFO):
        model, found = pretrained.load(path)
    assert "the checkpoint holds model and model_ema: model is taken; --model_key chooses" in caplog.text
    assert (same(model, want), found.key) == (True, "model")
    model, found = pretrained.load(path, "model_ema")
    assert (same(model, ema), found.key) == (True, "model_ema")
    torch.save({"model_ema": ema.state_dict()}, path)
    model, found = pretrained.load(path, global_pool=False, img_size=(48, 32))
    assert (same(model, ema), found.key) == (True, "model_ema")


@pytest.mark.parametrize("directions", [1, 4])
def test_bare_state_dict_of_a_classifier(directions, tmp_path, caplog):
    want = classifier(img_size=32, directions=directions)
    torch.save(want.state_dict(), tmp_path / "bare.pth")
    with caplog.at_level(logging.INFO):
        model, found = pretrained.load(tmp_path / "bare.pth")
    assert same(model, want)
    assert (found.key, found.epoch, found.sizes["directions"], model.global_pool) == (None, None, directions, "avg")
    line = r"bare\.pth does not say how it was trained; guessed: global_pool \(mean of the patches\), input_size \(a sq"
    assert re.search(line, caplog.text)


def test_files_of_the_released_code(tmp_path):
    """Their arguments have no order, taps or objective, and a side in place of height and width; some lack the mask."""
    want = pretraining(img_size=64, cluster_size=4, norm_pix_loss=True)
    state_dict = {name: value for name, value in want.state_dict().items() if name != "mask"}
    more = {"optimizer": {}, "epoch": 1599, "scaler": {}}
    path = saved(tmp_path / "released.pth", state_dict, more, input_size=64, norm_pix_loss=True, model="arm_base_pz16")
    model, found = pretrained.load(path)
    assert (type(model), same(model, want)) == (type(want), True)
    assert (model.order, model.cluster_size, model.norm_pix_loss, found.epoch) == ("row", 4, True, 1599)


@pytest.mark.parametrize("objective", ["arm", "mae"])
def test_encoder_at_another_resolution(objective, tmp_path):
    want = pretraining(objective)
    path = saved(tmp_path / "c.pth", want.state_dict(), **RUN)
    for size in ((48, 32), (64, 32)):
        model, found = pretrained.load(path, encoder=True, img_size=size)
        assert (found.input_size, model.image_size, model.dec_depth) == ((48, 32), size, 1)
        for name, value in want.layers.state_dict().items():
            assert torch.equal(model.layers.state_dict()[name], value), name
        assert torch.equal(model.pos_embed, want.pos_embed) == (size == (48, 32))
        assert model.forward_features(torch.randn(1, 3, *size)).shape == (1, size[0] * size[1] // 64, 32)
    with pytest.raises(UserError, match="does not fit the model"):
        pretrained.load(path, img_size=(64, 32))  # the decoder is of one size


def test_random_order_is_of_one_resolution(tmp_path):
    want = pretraining(order="random")
    path = saved(tmp_path / "c.pth", want.state_dict(), **RUN)  # the order in the weights decides, not the argument
    model, found = pretrained.load(path, encoder=True)
    assert (found.options["order"], torch.equal(model.cluster_order, want.cluster_order)) == ("random", True)
    with pytest.raises(UserError, match=r"c\.pth: a random order of clusters is only for \(48, 32\) pixels"):
        pretrained.load(path, encoder=True, img_size=(64, 32))
    square = saved(tmp_path / "square.pth", pretraining(order="random", img_size=32).state_dict(), **RUN)
    assert pretrained.load(square, img_size=32)[0].image_size == (32, 32)


def test_overrides(tmp_path):
    want = classifier()
    path = saved(tmp_path / "c.pth", want.state_dict(), input_size=[48, 32], global_pool=True)
    model, found = pretrained.load(path, img_size=64, global_pool="token", scan_backend="torch", drop_path_rate=0.5)
    assert (model.image_size, model.global_pool, model.drop_path_rate) == ((64, 64), "token", 0.5)
    assert (model.layers[0].mixer.scan_backend, found.input_size) == ("torch", (48, 32))
    assert torch.equal(model.head.weight, want.head.weight)
    state_dict = {**want.state_dict(), "extra.weight": torch.zeros(1)}
    path = saved(tmp_path / "extra.pth", state_dict, input_size=[48, 32], global_pool=True)
    assert same(pretrained.load(path, ignore_keys=["extra.*"])[0], want)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"depth": 3}, r"has 32 channels and 2 blocks, the model 32 and 3: --model, --embed_dim and --depth"),
        ({}, {"colour": "red"}, r"c\.pth: .*unexpected keyword argument 'colour'"),
        ({}, {"order": "spiral"}, r"c\.pth: unknown order 'spiral'; choose from row"),
        ({}, {"scan_backend": "fast"}, r"c\.pth: unknown backend 'fast'"),
        ({}, {"model_key": "model_ema"}, r"has no model_ema; it has model"),
        ({}, {"ignore_keys": ["nothing"]}, r"--ignore_keys nothing: .*c\.pth has no such key"),
        ({"foreign": torch.zeros(1)}, {}, r"unexpected foreign \(--ignore_keys leaves keys out\)"),
        ({"ar_token": None}, {}, r"has no complete decoder"),
        ({"pos_embed": None}, {}, r"is not one of ARM: it has no pos_embed"),
    ],
)
def test_mistakes_take_one_line(change, options, message, tmp_path):
    state_dict = pretraining().state_dict() | change
    state_dict = {name: value for name, value in state_dict.items() if value is not None}
    path = saved(tmp_path / "c.pth", state_dict, **RUN)
    with pytest.raises(UserError, match=message) as caught:
        pretrained.load(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_read_as_in_evaluation(channels, photographs, tmp_path):
    """With the checkpoint's size, channels, mean, deviation and orientation; from a path or its content."""
    values = {"mean": [0.25] * channels, "std": [0.5] * channels, "exif": True}
    path = saved(tmp_path / "c.pth", classifier(in_chans=channels).state_dict(), input_size=[48, 32], **values)
    model, found = pretrained.load(path, global_pool=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    photographs[0].save(tmp_path / "photo.png", exif=exif)
    imgs = found.read_image(tmp_path / "photo.png")
    args = argparse.Namespace(input_size=[48, 32], eval_resize="square", eval_loader="pil", in_chans=channels, **values)
    ((want, _), _) = eval_images(args, FileList([str(tmp_path / "photo.png")]))[0]
    assert torch.equal(imgs, want)
    assert torch.equal(found.read_image((tmp_path / "photo.png").read_bytes()), want)
    assert model(imgs[None]).shape == (1, 3)
    assert found.read_image(tmp_path / "photo.png", "shorter", (64, 64)).shape == (channels, 64, 64)
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "none.png"):
        with pytest.raises(UserError, match=name):
            found.read_image(tmp_path / name)
    with pytest.raises(BrokenImage, match="no image of a known format"):
        found.read_image(b"no image")


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        pretrained.load(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(UserError, match=r"text\.pth"):
        pretrained.load(tmp_path / "text.pth")


def test_a_url(tmp_path, monkeypatch):
    want = classifier()
    content = saved(tmp_path / "c.pth", want.state_dict(), input_size=[48, 32], global_pool=True).read_bytes()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with Server() as server:
        server.files["/c.pth"] = content
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for _ in range(2):
            model, found = pretrained.load(f"{server.url}/c.pth")
            assert same(model, want)
            assert found.name == f"{server.url}/c.pth"
        assert len(server.bodies("/c.pth")) == 1  # then from the cache
        with pytest.raises(UserError, match=r"/missing\.pth is not in the cache, and the server answers 404"):
            pretrained.load(f"{server.url}/missing.pth")
        server.shutdown()
