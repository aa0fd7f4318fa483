"""The encoder with a feature pyramid: maps, gradients, weights, timm, and decoders and detectors of other libraries."""

import copy
import logging
import re

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from helpers import relative_error
from timm.optim import param_groups_layer_decay as timm_groups
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

import models_arm
from pretrained import Checkpoint
from util.checkpoints.convert import load_into_classifier
from util.lr_decay import param_groups_layer_decay

ENCODER = {"embed_dim": 24, "depth": 4, "patch_size": 8, "img_size": (48, 32)}
SMALL = {**ENCODER, "out_chans": 8}


def small(**changes):
    torch.manual_seed(0)
    return models_arm.create_pyramid("arm_base_pz16", **SMALL | changes).eval()


def in_timm(**changes):
    torch.manual_seed(0)
    return timm.create_model("arm_base_pz16_pyramid", **SMALL | changes).eval()


def assert_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (48, 32)),
        ({}, (33, 70)),
        ({"taps": "even", "depth": 3}, (50, 31)),
        ({"patch_size": 4, "directions": 1, "in_chans": 1}, (9, 17)),
        ({"patch_size": 16, "in_chans": 5, "taps": "even", "depth": 1}, (33, 70)),
        ({"patch_size": 16}, (3, 1)),  # within a patch
        ({"patch_size": 16, "output_stride": 16}, (65, 33)),
        ({"output_stride": 2}, (20, 9)),
    ],
)
def test_maps_of_any_image(options, size):
    """Their sides are those of the image over the strides, rounded up, for any patch, taps, channels and directions."""
    model = small(**options)
    patch, last = model.patch_size, options.get("output_stride", 2 * model.patch_size)
    strides = [min(stride, last) for stride in (patch // 4, patch // 2, patch, 2 * patch)]
    maps = model(torch.randn(2, model.in_chans, *size))
    assert [tuple(x.shape) for x in maps] == [(2, 8, -(-size[0] // s), -(-size[1] // s)) for s in strides]
    assert all(x.isfinite().all() and x.std() > 0.1 for x in maps)
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(8, s) for s in strides]


@pytest.mark.parametrize(("taps", "blocks"), [("last", (5, 5, 5, 5)), ("even", (1, 2, 4, 5))])
def test_maps_are_those_of_a_plain_composition(taps, blocks):
    """Of torch's functions, on the padded image; the patches come from a classifier with the same encoder."""
    model = small(depth=6, taps=taps).double()
    encoder = models_arm.create_classifier("arm_base_pz16", **ENCODER | {"depth": 6}, num_classes=0).double().eval()
    encoder.dynamic_img_size = True
    state = model.state_dict()
    encoder.load_state_dict({name: value for name, value in state.items() if not name.startswith("pyramid.")})
    imgs = torch.randn(2, 3, 33, 58, dtype=torch.float64)
    padded = torch.zeros(2, 3, 48, 64, dtype=torch.float64)
    padded[:, :, :33, :58] = imgs
    patches = dict(enumerate(encoder.forward_intermediates(padded, norm=True, intermediates_only=True)))

    def norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def up(x, name):
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    finest, fine, same, coarse = (patches[block] for block in blocks)
    finest = up(F.gelu(norm(up(finest, "pyramid.0.0"), "pyramid.0.1")), "pyramid.0.3")
    inputs = [(finest, 4), (up(fine, "pyramid.1.0"), 1), (same, 0), (F.max_pool2d(coarse, 2), 1)]
    want = []
    for level, (x, first) in enumerate(inputs):
        name = f"pyramid.{level}."
        x = norm(F.conv2d(x, state[f"{name}{first}.weight"]), f"{name}{first + 1}")
        x = norm(F.conv2d(x, state[f"{name}{first + 2}.weight"], padding=1), f"{name}{first + 3}")
        stride = 2 * 2**level
        want.append(x[:, :, : -(-33 // stride), : -(-58 // stride)])
    for got, expected in zip(model(imgs), want, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("taps", ["last", "even"])
def test_checkpointing_gives_the_same_gradients_of_every_parameter(taps):
    """With drop path, of the same blocks."""
    model = small(taps=taps, drop_path_rate=0.3).train()
    imgs, gradients = torch.randn(3, 3, 33, 40), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(2)
        sum((x * torch.linspace(0, 1, x.numel()).view(x.shape)).sum() for x in model(imgs)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert [name for name, p in model.named_parameters() if name not in gradients[0] or not p.grad.any()] == []
    assert_equal(list(gradients[0].values()), list(gradients[1].values()))
    assert not torch.equal(model(imgs)[2], model(imgs)[2])  # each call drops others


def test_frozen_encoder():
    model = small().train()
    model.freeze("all")
    sum(x.square().sum() for x in model(torch.randn(1, 3, 16, 16))).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"pyramid"}


def test_a_new_input_size():
    """Strides follow the patches; the maps are those of a model of that size."""
    model, imgs = small(), torch.randn(1, 3, 64, 96)
    model.set_input_size((64, 96))
    assert_equal(model(imgs), small()(imgs))  # the position embedding is interpolated at once, or for the image
    model.set_input_size(patch_size=16)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert [x.shape[-1] for x in model(imgs)] == [24, 12, 6, 3]
    with pytest.raises(ValueError, match="patches of 6 pixels: the finest stride is a quarter, choose a multiple of 4"):
        model.set_input_size(patch_size=6)
    assert model.patch_size == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 6}, "patches of 6 pixels: .* multiple of 4"),
        ({"taps": "all"}, "unknown taps 'all'; choose from last, even"),
        ({"output_stride": 32}, "output_stride 32: choose from 2, 4, 8, 16"),
        ({"out_chans": 0}, "maps of 0 channels from 24"),
        ({"embed_dim": 3}, "maps of 8 channels from 3"),
        ({"num_classes": 5}, "num_classes=5: a pyramid has num_classes=0"),
        ({"dynamic_img_size": False}, "dynamic_img_size=False: a pyramid has dynamic_img_size=True"),
        ({"img_size": 20}, "image size 20 does not divide into patches of 8 pixels; nearest: 16 or 24"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("name", models_arm.SIZES)
def test_every_size_is_registered(name):
    with torch.device("meta"):
        model = timm.create_model(f"{name}_pyramid")
        features = timm.create_model(f"{name}_pyramid", features_only=True, out_indices=(0, 1, 2, 3))
    assert isinstance(model, models_arm.ARMPyramid)
    assert (model.embed_dim, len(model.layers)) == (
        models_arm.SIZES[name]["embed_dim"],
        models_arm.SIZES[name]["depth"],
    )
    assert features.feature_info.channels() == [256] * 4
    assert features.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("indices", "taps", "kept", "blocks"),
    [
        (None, "last", [0, 1, 2, 3], 4),
        ((0, 1, 2, 3), "even", [0, 1, 2, 3], 4),
        ((2, 1), "even", [1, 2], 3),
        ((-4,), "even", [0], 1),
        (2, "last", [2, 3], 4),
    ],
)
def test_features_only(indices, taps, kept, blocks):
    """Remove what no chosen map needs, so that every parameter gets a gradient."""
    chosen = {} if indices is None else {"out_indices": indices}
    whole, model = small(taps=taps), in_timm(taps=taps, features_only=True, **chosen)
    model.model.load_state_dict(whole.state_dict(), strict=False)
    imgs = torch.randn(1, 3, 33, 70)
    maps, want = model(imgs), whole(imgs)
    assert_equal(maps, [want[level] for level in kept])
    assert_equal(maps, whole.forward_intermediates(imgs, kept, intermediates_only=True))
    assert_equal(maps, model.model(imgs))
    assert model.feature_info.channels() == [8] * len(kept)
    assert sorted(model.feature_info.reduction()) == [2 * 2**level for level in kept]
    modules = dict(model.model.named_modules())
    assert {"pyramid." + name for name in model.model.pyramid} == {*model.feature_info.module_name()} <= modules.keys()
    assert len(model.model.layers) == blocks
    sum(x.square().sum() for x in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if kept == [1, 2]:
        with pytest.raises(ValueError, match="prune_intermediate_layers has removed the maps 0, 3"):
            model.model.forward_intermediates(imgs)


def test_intermediates():
    """As rows of positions, with the class token of the block behind each map, and with the final tokens."""
    model, imgs = small(taps="even"), torch.randn(2, 3, 33, 70)
    final, pairs = model.forward_intermediates(imgs, (1, 3), return_prefix_tokens=True, output_fmt="NLC")
    tokens, states = model.encode(imgs, (1, 3))
    assert torch.equal(final, model.norm_f(tokens))
    maps = model(imgs)
    for (rows, token), level, state in zip(pairs, (1, 3), states, strict=True):
        assert torch.equal(rows, maps[level].flatten(2).mT)
        assert torch.equal(token[:, 0], model.norm_f(state)[:, state.shape[1] // 2])
    early, found = model.forward_intermediates(imgs, (0, 1), stop_early=True)
    assert torch.equal(early, model.norm_f(states[0]))
    assert_equal(found, maps[:2])
    assert_equal(model.get_intermediate_layers(imgs, (0, 2), reshape=True), [maps[0], maps[2]])


def weights_of(kind):
    """A checkpoint of pretraining, finetuning or a task around an encoder, of other images."""
    torch.manual_seed(1)
    sizes = {**ENCODER, "img_size": (64, 32)}
    if kind == "pretraining":
        model = models_arm.create_pretrain_model(
            "arm_base_pz16", **sizes, cluster_size=2, dec_embed_dim=64, dec_depth=2
        )
    else:
        model = models_arm.create_classifier("arm_base_pz16", **sizes, num_classes=3)
        nn.init.normal_(model.norm_f.weight)
    if kind == "detection":
        state = {f"backbone.{name}": value for name, value in model.state_dict().items() if "head" not in name}
        return {"model": state | {"rpn.head.weight": torch.zeros(3)}, "args": {"input_size": [64, 32]}}
    return {"model": model.state_dict(), "args": {"input_size": [64, 32], "norm_pix_loss": True}}


NEW = {
    "pretraining": "scan copied to 4 directions; decoder left out; new: class token, last norm, pyramid",
    "finetuning": "head left out; new: pyramid",
    "detection": "new: pyramid",
}


@pytest.mark.parametrize("by", ["pretrained", "timm", "timm, from memory"])
@pytest.mark.parametrize("kind", NEW)
def test_encoder_weights(kind, by, tmp_path, caplog):
    """All of the encoder is the file's, the pyramid keeps its weights, and one line says what is new."""
    content, size = weights_of(kind), (64, 32) if by == "timm, from memory" else (48, 32)
    saved = {name.removeprefix("backbone."): value for name, value in content["model"].items()}
    fresh = small(img_size=size).state_dict()
    file = tmp_path / "checkpoint.pth"
    torch.save(content, file)
    with caplog.at_level(logging.INFO, "arm"):
        if by == "pretrained":
            model = small()
            assert not Checkpoint(file, content).load_into(model)
        elif by == "timm":
            torch.manual_seed(0)
            options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}, "out_chans": 8}
            model = timm.create_model("arm_tiny_pz16_pyramid", **options, img_size=size)
        else:
            model = in_timm(pretrained=True, pretrained_cfg_overlay={"state_dict": content["model"]}, img_size=size)
    if by != "timm, from memory":
        (line,) = [record.message for record in caplog.records if "parameters loaded" in record.message]
        assert line.endswith(f"position embedding interpolated from 8 x 4 to 6 x 4 patches; {NEW[kind]}")
    state = model.state_dict()
    for name in ("layers.1.mixer.A_log", "layers.3.mlp.w3.weight", "patch_embed.proj.weight"):
        assert torch.equal(state[name], saved[name])
    if kind != "pretraining":
        for name in ("layers.1.mixer.A_c_b_log", "cls_token", "norm_f.weight"):
            assert torch.equal(state[name], saved[name])
    assert_equal(*([s[name] for name in fresh if "pyramid" in name] for s in (state, fresh)))
    assert model(torch.randn(1, 3, 20, 20))[0].shape == (1, 8, 10, 10)


def test_weights_of_a_pyramid():
    """They fit another pyramid; one of other channels keeps its own, a classifier has none."""
    state = {name: value + 1 for name, value in small().state_dict().items()}
    model, other = small(img_size=(16, 24)), small(out_chans=12)
    classifier = models_arm.create_classifier("arm_base_pz16", **ENCODER, num_classes=3)
    assert load_into_classifier(state, model, (48, 32)).notes[1:] == [
        "position embedding interpolated from 6 x 4 to 2 x 3 patches"
    ]
    assert_equal(*([s[name] for name in state if name != "pos_embed"] for s in (model.state_dict(), state)))
    assert load_into_classifier(state, other).notes[1:] == ["new: pyramid"]
    assert torch.equal(other.layers[3].mlp.w3.weight, state["layers.3.mlp.w3.weight"])
    notes = load_into_classifier(state, classifier, keep_head=False).notes
    assert notes[1:] == ["pyramid left out", "new: head"]


def test_layer_decay_finds_the_encoder_of_a_task():
    """As timm does for the encoder alone; what the task adds has the full rate, and decays if it is a matrix."""
    task = nn.Module()
    task.cls_token, task.layers = nn.Parameter(torch.zeros(1, 1, 2)), nn.Linear(2, 2)
    task.backbone = small()
    names = {p: name for name, p in task.named_parameters()}
    groups = param_groups_layer_decay(task, 0.05, 0.5)
    got = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    pyramid = timm_groups(task.backbone, 0.05, task.backbone.no_weight_decay(), layer_decay=0.5)
    want = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in pyramid for p in group["params"]}
    assert got == want | {"cls_token": (1, 0.05), "layers.weight": (1, 0.05), "layers.bias": (1, 0.0)}
    assert got["backbone.pos_embed"] == (0.5**5, 0.0)
    assert got["backbone.layers.3.mlp.w1.weight"] == (0.5, 0.05)
    assert got["backbone.pyramid.0.0.weight"] == got["backbone.pyramid.3.1.weight"] == (1, 0.05)


@pytest.mark.parametrize("how", ["assign", "to_empty", "deepcopy"])
def test_state_dict_round_trip(how):
    want = small(drop_path_rate=0.5, taps="even")
    if how == "deepcopy":
        model = copy.deepcopy(want)
    else:
        with torch.device("meta"):
            model = small(drop_path_rate=0.5, taps="even")
        if how == "to_empty":
            model.to_empty(device="cpu")
        model.load_state_dict(want.state_dict(), assign=how == "assign")
    imgs, outputs = torch.randn(2, 3, 20, 50), []
    for each in (model.train(), want.train()):
        torch.manual_seed(0)
        outputs.append(each(imgs))
    assert_equal(*outputs)


def test_exported():
    """With `exportable` the program holds operators of torch only, and takes any number of images."""
    model, plain = in_timm(depth=1, features_only=True, exportable=True), small(depth=1)
    imgs, more = torch.randn(2, 3, 13, 16), torch.randn(3, 3, 13, 16)
    program = torch.export.export(model, (imgs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if re.match("arm", target)]
    assert max(relative_error(*pair) for pair in zip(program.module()(more), plain(more), strict=True)) < 1e-5


def test_compiled_blocks():
    """The blocks compile in place, and the model stays as it is."""
    model, imgs = small(depth=1), torch.randn(1, 3, 13, 16)
    want = model(imgs)
    model.compile(backend="eager")
    assert model.layers[0]._compiled_call_impl is not None
    assert max(relative_error(*pair) for pair in zip(model(imgs), want, strict=True)) < 1e-5


# Decoders and detectors of other libraries train a step at two image sizes.

PEER = {"embed_dim": 24, "img_size": 64, "out_chans": 16}


def step(model, loss):
    """Take a step; return the parameters without a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss.backward()
    assert loss.isfinite()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    before = [p.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    after = [p for p in model.parameters() if p.grad is not None]
    assert sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) > len(before) / 2
    return missing


@pytest.mark.parametrize(
    "decoder", ["Unet", "FPN", "UPerNet", "DeepLabV3Plus", "PAN", "Linknet", "MAnet", "Segformer", "UnetPlusPlus"]
)
def test_decoders_of_smp(decoder):
    torch.manual_seed(0)
    model = getattr(smp, decoder)("tu-arm_tiny_pz16_pyramid", encoder_weights=None, classes=3, **PEER)
    sizes = [(128, 160), (160, 128)] if decoder == "PAN" else [(64, 96), (96, 32)]
    for size in sizes:
        logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, 3, *size)
        missing = step(model, F.cross_entropy(logits, torch.randint(3, (2, *size))))
        unread = ("pyramid.1.", "pyramid.2.") if decoder == "DeepLabV3Plus" else ()  # it reads the others
        assert [name for name in missing if not any(part in name for part in unread)] == []


def test_upernet_of_transformers():
    torch.manual_seed(0)
    backbone = TimmBackboneConfig(backbone="arm_tiny_pz16_pyramid", out_indices=(0, 1, 2, 3))
    sizes = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 256, "num_labels": 3}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes)).train()
    assert model.backbone.channels == [256] * 4
    for size in ((64, 64), (70, 50)):
        output = model(torch.randn(2, 3, *size), labels=torch.randint(3, (2, *size)))
        assert output.logits.shape == (2, 3, *size)
        assert step(model, output.loss) == set()


class Maps(nn.Module):
    """Name maps, and give their channels, as torchvision's detectors ask for."""

    def __init__(self, pyramid):
        super().__init__()
        self.pyramid, self.out_channels = pyramid, pyramid.out_chans

    def forward(self, imgs):
        return {str(level): image for level, image in enumerate(self.pyramid(imgs))}


@pytest.mark.parametrize("detector", [FasterRCNN, MaskRCNN, RetinaNet, FCOS])
def test_detectors_of_torchvision(detector):
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 128, "num_classes": 3}
    ratios = (1.0,) if detector is FCOS else (0.5, 1.0, 2.0)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), (ratios,) * 4)
    if detector in (RetinaNet, FCOS):
        options["anchor_generator"] = anchors
    else:
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        options |= {"rpn_anchor_generator": anchors, "box_roi_pool": pool}
        options |= {"mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)} if detector is MaskRCNN else {}
    pyramid = models_arm.create_pyramid("arm_tiny_pz16", **PEER | {"depth": 2, "out_chans": 32})
    model = detector(Maps(pyramid), **options)
    for size in ((64, 64), (70, 100)):
        target = {"boxes": torch.tensor([[5.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, *size, dtype=torch.uint8)
        losses = model.train()(list(torch.rand(2, 3, *size)), [target, target])
        assert step(model, sum(losses.values())) == set()
    with torch.no_grad():
        (found,) = model.eval()(list(torch.rand(1, 3, 70, 100)))
    assert found["boxes"].shape[1] == 4
