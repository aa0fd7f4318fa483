"""Parity with the released code: float64 values that it computed, see tests/golden/README.md."""

import math

import pytest
import torch
from helpers import golden_json, relative_error
from timm.optim import param_groups_weight_decay

import mamba
import models_arm
from util.checkpoints.convert import load, pretrain_to_classifier
from util.lr_decay import param_groups_layer_decay
from util.lr_sched import lr_at, set_lr
from util.pos_embed import sincos_pos_embed

EXACT, STORED_FLOAT32 = 1e-9, 1e-6  # tolerances of float64 runs, by how the golden value is stored
SIZES = ("arm_base_pz16", "arm_large_pz16", "arm_huge_pz16")


@pytest.fixture(scope="module")
def pretrained(golden):
    values = golden("pretrain_d64_l12")
    model = models_arm.create_pretrain_model("arm_base_pz16", embed_dim=64, dec_embed_dim=64, norm_pix_loss=True)
    load(model.double(), values.under("param/"))  # the file has no mask
    return model, values


@pytest.fixture
def finetuned(golden):
    values = golden("finetune_d64_l2")
    model = models_arm.create_classifier("arm_base_pz16", img_size=96, num_classes=10, embed_dim=64, depth=2)
    load(model.double(), values.under("param/"))
    return model.eval(), values


def check_gradients(model, values) -> None:
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norms = values.under("gradnorm/")
    assert set(trained) == set(norms)
    for name, norm in norms.items():
        assert trained[name].norm().item() == pytest.approx(norm.item(), rel=EXACT), name
    for name, gradient in values.under("grad/").items():
        assert relative_error(trained[name], gradient) < STORED_FLOAT32, name


def test_pretraining_outputs_and_gradients(pretrained):
    model, values = pretrained
    imgs = values["imgs"]
    latents = model.forward_encoder(imgs)
    assert relative_error(latents, values["out/latents"]) < STORED_FLOAT32
    pred = model.forward_decoder(latents)
    assert relative_error(pred, values["out/pred"]) < STORED_FLOAT32
    loss = model.forward_loss(imgs, pred)
    assert relative_error(loss, values["out/loss_per_position"]) < EXACT
    assert torch.equal(model(imgs), loss)
    assert loss.mean().item() == pytest.approx(values["out/loss"].item(), rel=EXACT)
    model.zero_grad()
    loss.mean().backward()
    check_gradients(model, values)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_pretraining_loss_in_float32(pretrained, backend):
    _, values = pretrained
    model = models_arm.create_pretrain_model(
        "arm_base_pz16", embed_dim=64, dec_embed_dim=64, norm_pix_loss=True, scan_backend=backend
    )
    load(model, {name: value.float() for name, value in values.under("param/").items()})
    assert model(values["imgs"].float()).mean().item() == pytest.approx(values["out/loss"].item(), rel=1e-4)


def test_classifier_outputs_and_gradients(finetuned):
    model, values = finetuned
    imgs = values["imgs"]
    features = model.forward_head(model.forward_features(imgs), pre_logits=True)
    assert relative_error(features, values["out/features_global_pool"]) < EXACT
    logits = model(imgs)
    assert relative_error(logits, values["out/logits_global_pool"]) < EXACT
    loss = torch.nn.functional.cross_entropy(logits, values["labels"])
    assert loss.item() == pytest.approx(values["out/ce_loss_global_pool"].item(), rel=EXACT)
    loss.backward()
    check_gradients(model, values)
    model.global_pool = False
    assert relative_error(model(imgs), values["out/logits_cls_token"]) < EXACT


def test_four_direction_mixer(finetuned):
    model, values = finetuned
    out = model.layers[0].mixer(values["mixer/in"], model.order)
    assert relative_error(out, values["mixer/out_layer0"]) < EXACT


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_classifier_logits_in_float32(golden, backend):
    values = golden("finetune_d64_l2")
    model = models_arm.create_classifier(
        "arm_base_pz16", img_size=96, num_classes=10, embed_dim=64, depth=2, scan_backend=backend
    )
    load(model, {name: value.float() for name, value in values.under("param/").items()})
    assert relative_error(model.eval()(values["imgs"].float()), values["out/logits_global_pool"]) < 1e-4


def test_pretraining_checkpoint_becomes_a_classifier(golden, pretrained):
    values, source = golden("convert_d64_l12_192to224"), pretrained[1].under("param/")
    model = models_arm.create_classifier("arm_base_pz16", num_classes=10, embed_dim=64).double().eval()
    state = pretrain_to_classifier(source, model)
    assert set(model.state_dict()) - set(state) == set(values.file["missing"].tolist())
    assert set(source) - set(state) == set(values.file["unexpected"].tolist())
    assert relative_error(state["pos_embed"], values["pos_embed"]) < STORED_FLOAT32
    load(model, {**state, **values.under("param/")})
    assert relative_error(model(values["imgs"]), values["out/logits_global_pool"]) < EXACT
    model.global_pool = False
    assert relative_error(model(values["imgs"]), values["out/logits_cls_token"]) < EXACT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "create"),
    [("pretrain", models_arm.create_pretrain_model), ("finetune", models_arm.create_classifier)],
)
def test_manifest(kind, create, size):
    manifest = golden_json(f"manifest_{kind}")[size]
    with torch.device("meta"):
        model = create(size)
    state = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert list(state.items()) == list(manifest["state"].items())  # the order too: optimizer states are stored by it
    assert sum(p.numel() for p in model.parameters()) == manifest["n_parameters"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == manifest["requires_grad_false"]
    if kind == "pretrain":
        assert model.taps == manifest["skip_after_blocks"]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["n_trainable"]


def test_weight_decay_groups():
    with torch.device("meta"):
        model = models_arm.create_pretrain_model("arm_base_pz16")
    names = {p: name for name, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05)
    got = [(names[p], group["weight_decay"]) for group in groups for p in group["params"]]
    assert dict(got) == golden_json("manifest_pretrain")["arm_base_pz16"]["weight_decay_0.05"]
    assert [decay for _, decay in got] == sorted(decay for _, decay in got)  # undecayed first, as in optimizer states


def test_layer_decay_groups():
    with torch.device("meta"):
        model = models_arm.create_classifier("arm_base_pz16")
    names = {p: name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, 0.65)
    got = [(names[p], [group["lr_scale"], group["weight_decay"]]) for group in groups for p in group["params"]]
    want = golden_json("layer_decay_base")["name_to_[lr_scale,weight_decay]"]
    assert [name for name, _ in got] == list(want)  # the order of the released optimizer state
    for name, (scale, decay) in got:
        assert scale == pytest.approx(want[name][0], rel=1e-12), name
        assert decay == want[name][1], name


def test_drop_path_per_block():
    model = models_arm.create_classifier("arm_base_pz16", drop_path_rate=0.1)
    got = model.drop_path_rates.tolist()
    assert got == golden_json("manifest_finetune")["arm_base_pz16"]["drop_path_per_block_at_rate_0.1"]


def test_learning_rate_table():
    table = golden_json("lr_schedule")
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": 0.65}, {"params": [torch.zeros(1)]}], lr=1.0)
    for recipe, epoch, want, want_scaled in table["rows"]:
        lr = lr_at(epoch, **table["recipes"][recipe])
        assert lr == pytest.approx(want, rel=1e-9, abs=1e-24), (recipe, epoch)
        set_lr(optimizer, lr)
        scaled, plain = (group["lr"] for group in optimizer.param_groups)
        assert scaled == pytest.approx(want_scaled, rel=1e-9, abs=1e-24)
        assert plain == lr


def test_sincos_position_embedding(golden):
    arrays = golden("sincos_pos_embed").under("")
    assert len(arrays) == 2
    for array in arrays.values():
        patches, dim = array.shape[-2:]
        grid = (math.isqrt(patches), math.isqrt(patches))
        assert relative_error(sincos_pos_embed(dim, grid).double().view_as(array), array) < STORED_FLOAT32


@pytest.mark.parametrize(
    ("kind", "create"),
    [("pretrain", models_arm.create_pretrain_model), ("finetune", models_arm.create_classifier)],
)
def test_initialisation_statistics(kind, create):
    torch.manual_seed(0)
    model = create("arm_base_pz16")
    statistics = golden_json(f"init_stats_{kind}_base")
    assert set(statistics) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        mean, std = statistics[name]
        # five standard errors of the difference of two draws
        width = 5 / math.sqrt(parameter.numel())
        assert parameter.mean().item() == pytest.approx(mean, abs=math.sqrt(2) * width * std + 1e-6), name
        assert parameter.std(correction=0).item() == pytest.approx(std, rel=width, abs=1e-6), name


@pytest.mark.parametrize(("side", "channels"), [(16, 3), (8, 1)])
def test_patch_embedding_is_an_untruncated_normal(side, channels):
    """Of the released code's standard deviation, with tails that a cut at two deviations does not leave."""
    torch.manual_seed(0)
    weight = mamba.PatchEmbed(side, 768, channels).proj.weight
    std = 1 / (0.87962566 * math.sqrt(channels * side**2))
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert (weight.abs() > 2 * std).double().mean().item() == pytest.approx(0.0455, rel=0.1)
