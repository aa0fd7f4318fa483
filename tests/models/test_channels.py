"""Images of other numbers of channels, and weights of other numbers of channels, patch sizes and grids."""

import argparse
import json
import logging

import pytest
import torch
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv

import models_arm
import pretrained
from pretrained import Checkpoint
from tools import export, replay_nonfinite
from util.checkpoints import convert
from util.tracking import prediction_figures

ENCODER = {"embed_dim": 32, "depth": 2, "patch_size": 8, "img_size": (48, 32)}
DECODER = {"cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 2}


def classifier(**options):
    torch.manual_seed(0)
    return models_arm.create_classifier("arm_tiny_pz16", **{**ENCODER, "num_classes": 3, **options}).eval()


def pretraining(**options):
    torch.manual_seed(0)
    return models_arm.create_pretrain_model("arm_tiny_pz16", **{**ENCODER, **DECODER, **options}).eval()


def images(channels, batch=2):
    return torch.randn(batch, channels, 48, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("objective", ["arm", "mae"])
@pytest.mark.parametrize("channels", [1, 4])
def test_pretraining(objective, channels):
    """Every channel of every pixel is predicted: the loss of a perfect prediction is 0, of any other it is not."""
    model, imgs = pretraining(objective=objective, in_chans=channels, norm_pix_loss=True), images(channels)
    assert model.patch_embed.proj.weight.shape == (32, channels, 8, 8)
    assert model.ar_pred.out_features == channels * 64
    patches = model.patchify(imgs)
    assert patches.shape == (2, 24, channels * 64)
    assert torch.equal(patches[0, 5].view(8, 8, channels)[2, 3], imgs[0, :, 8 + 2, 8 + 3])  # row 1, column 1
    assert torch.equal(model.unpatchify(patches), imgs)
    assert model(imgs).isfinite().all()
    predicted, losses, _ = model.predicted_images(imgs)
    assert predicted.shape == imgs.shape
    assert losses.shape == (2, 6, 4)
    for parameter in model.parameters():
        parameter.grad = None
    model(imgs).mean().backward()
    assert all(p.grad.any() for p in (model.patch_embed.proj.weight, model.ar_pred.weight))


def test_each_channel_is_read():
    model, imgs = pretraining(in_chans=5), images(5, batch=1)
    tokens = model.forward_features(imgs)
    for channel in range(5):
        other = imgs.clone()
        other[:, channel] += 1
        assert not torch.allclose(model.forward_features(other), tokens, atol=1e-4)


@pytest.mark.parametrize("create", [classifier, pretraining])
def test_images_of_other_channels_are_refused(create):
    with pytest.raises(ValueError, match="images of 3 channels, the model takes 1: in_chans"):
        create(in_chans=1)(images(3))


def test_a_patch_of_one_value_cannot_be_standardised():
    with pytest.raises(ValueError, match="norm_pix_loss standardises the values of a patch"):
        pretraining(in_chans=1, patch_size=1, img_size=8, norm_pix_loss=True)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_weights_of_rgb_are_adapted_as_by_timm(channels):
    weight = torch.randn(32, 3, 8, 8)
    assert torch.equal(convert.fit_channels(weight, channels), adapt_input_conv(channels, weight))
    half = convert.fit_channels(weight.bfloat16(), channels)
    assert torch.equal(half, adapt_input_conv(channels, weight.bfloat16()))


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 6), (1, 4), (2, 4)])
def test_grey_images_have_the_same_outputs(before, after, caplog):
    """Equal channels give the same tokens with the model of the file and the one it is loaded into."""
    for source, target in (
        (classifier(in_chans=before), classifier(in_chans=after)),
        (pretraining(in_chans=before), pretraining(in_chans=after)),
        (pretraining(in_chans=before), classifier(in_chans=after, directions=1)),
    ):
        content = {"model": source.state_dict()}
        encoder = isinstance(target, models_arm.PretrainModel)
        with torch.no_grad():
            for parameter in target.patch_embed.parameters():
                parameter.zero_()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            Checkpoint("c.pth", content).load_into(target, encoder=encoder)
        how = "summed" if after == 1 else "repeated"
        assert f"channels of the patch embedding {how} from {before} to {after}" in caplog.text
        grey = images(1)
        got, want = (m.patch_embed(grey.expand(-1, m.in_chans, -1, -1)) for m in (target, source))
        assert torch.allclose(got, want, atol=1e-5)
        if type(source) is type(target):
            got, want = (m.forward_features(grey.expand(-1, m.in_chans, -1, -1)) for m in (target, source))
            assert torch.allclose(got, want, atol=1e-4)


def test_what_was_loaded(caplog):
    """One line: how many parameters, what was adapted, copied, left out, or is new."""

    def line(source, target, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO, "arm"):
            content = {"model": source.state_dict(), "args": argparse.Namespace(input_size=list(source.image_size))}
            Checkpoint("c.pth", content).load_into(target, **options)
        (record,) = (r.message for r in caplog.records if "parameters loaded" in r.message)
        return record

    def count(parameters):
        return f"{sum(p.numel() for p in parameters):,}"

    model = classifier(img_size=48, in_chans=4, patch_size=4)
    new = [model.cls_token, *model.norm_f.parameters(), *model.head.parameters()]
    total = sum(p.numel() for p in model.parameters())
    assert line(pretraining(), model) == (
        f"c.pth: model: {total - sum(p.numel() for p in new):,} of {total:,} parameters loaded; position embedding "
        "interpolated from 6 x 4 to 12 x 12 patches; channels of the patch embedding repeated from 3 to 4; patch "
        "embedding resampled from 8 to 4 pixels; scan copied to 4 directions; decoder left out; new: class token, "
        "head, last norm"
    )
    every = count(model.parameters())
    assert line(model, classifier(img_size=48, in_chans=4, patch_size=4)) == (
        f"c.pth: model: {every} of {every} parameters loaded"
    )
    kept = f"{total - sum(p.numel() for p in model.head.parameters()):,}"
    other = classifier(img_size=48, in_chans=4, patch_size=4, num_classes=9)
    assert f"{kept} of {count(other.parameters())} parameters loaded; new: head" in line(model, other, keep_head=False)
    probe = pretraining(dec_depth=1)
    assert line(pretraining(), probe, encoder=True).endswith(" parameters loaded; only the encoder")


def test_patches_of_another_size():
    """A finetuned model with larger patches: its patch embedding is that of `set_input_size`."""
    source, target = classifier(), classifier(patch_size=16, img_size=(96, 64))
    Checkpoint("c.pth", {"model": source.state_dict()}).load_into(target)
    weight = resample_patch_embed(source.patch_embed.proj.weight, [16, 16])
    assert torch.equal(target.patch_embed.proj.weight, weight)
    assert torch.equal(target.pos_embed, source.pos_embed)  # of the same grid


def test_figures_say_which_channels_they_show():
    assert [prediction_figures.title_of_input(n) for n in (1, 3)] == ["input"] * 2
    assert prediction_figures.title_of_input(5) == "input, channels 1-3 of 5"
    assert prediction_figures.title_of_input(2) == "input, channel 1 of 2"


def saved(path, model, **args):
    content = {"model": model.state_dict(), "args": argparse.Namespace(input_size=[48, 32], **args)}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("encoder", [False, True])
def test_export(encoder, tmp_path, run_script):
    """The exported file has the channels of the checkpoint."""
    want = pretraining(in_chans=4) if encoder else classifier(in_chans=4)
    args = {"cluster_size": 2, "in_chans": 4, "mean": [0.5] * 4, "std": [0.25] * 4}
    path, output = saved(tmp_path / "c.pth", want, **args), tmp_path / "out.safetensors"
    run_script(export, "--no_measure", path, "--to", "safetensors", "--output", output, *["--encoder"] * encoder)
    about = json.loads(output.with_suffix(".json").read_text())
    assert (about["model_args"]["in_chans"], about["pretrained_cfg"]["input_size"]) == (4, [4, 48, 32])
    again, found = pretrained.load(output, encoder=encoder)
    assert found.sizes["in_chans"] == 4
    assert torch.allclose(again.forward_features(images(4)), want.forward_features(images(4)), atol=1e-6)


def test_channels_and_patches_replace_those_of_a_file(tmp_path):
    source = pretraining()
    path = saved(tmp_path / "c.pth", source, cluster_size=2)
    model, found = pretrained.load(
        path, encoder=True, in_chans=1, patch_size=4, img_size=(24, 16), dynamic_img_size=True
    )
    assert (found.sizes["in_chans"], model.in_chans, model.image_size) == (3, 1, (24, 16))
    weight = resample_patch_embed(source.patch_embed.proj.weight.sum(1, keepdim=True), [4, 4])
    assert torch.allclose(model.patch_embed.proj.weight, weight, atol=1e-5)
    assert model.forward_features(torch.randn(1, 1, 32, 32)).shape == (1, 64, 32)


def test_batches_that_are_replayed():
    batch = [torch.zeros(2, 4, 48, 32), torch.zeros(2, dtype=torch.int64)]
    assert replay_nonfinite.is_batch(batch, (4, 48, 32), None)
    assert not replay_nonfinite.is_batch(batch, (3, 48, 32), None)
