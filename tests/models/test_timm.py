"""The classifiers in timm: create_model and the methods of timm's models, on small models."""

import copy
import pickle
import re

import pytest
import safetensors.torch
import timm
import torch
from helpers import relative_error
from timm.layers import resample_patch_embed
from timm.models import load_checkpoint, save_for_hf
from timm.optim import param_groups_layer_decay as timm_groups
from torchvision.models.feature_extraction import create_feature_extractor

import models_arm
from util.checkpoints.convert import pretrain_to_classifier
from util.lr_decay import param_groups_layer_decay

SMALL = {"embed_dim": 32, "depth": 2, "patch_size": 8, "img_size": (48, 32), "num_classes": 5}
GRID, TOKENS = (6, 4), 25


def small(**changes):
    torch.manual_seed(0)
    return timm.create_model("arm_base_pz16", **{**SMALL, **changes}).eval()


def small_pretrain(**options):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "patch_size": 8, "cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 2}
    return models_arm.create_pretrain_model("arm_base_pz16", img_size=(48, 32), **sizes | options)


def seeded(model, imgs):
    """Return the outputs of a model, with the random numbers of seed 0, as a list of tensors."""
    torch.manual_seed(0)
    outputs = model(imgs)
    return outputs if isinstance(outputs, list) else [outputs]


@pytest.fixture
def imgs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 48, 32)


def test_a_new_input_size(tmp_path):
    """Images and patches of another size: the embeddings are those of timm and of a checkpoint that moves there."""
    model = small()
    moved = copy.deepcopy(model)
    moved.set_input_size((256, 32))
    fixed = small(img_size=(256, 32))
    fixed.load_state_dict(pretrain_to_classifier(model.state_dict(), fixed, (48, 32)))
    imgs = torch.randn(2, 3, 256, 32)
    assert torch.equal(moved(imgs), fixed(imgs))
    data = timm.data.resolve_model_data_config(moved)
    assert (data["input_size"], data["crop_pct"]) == ((3, 256, 32), 1.0)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 48, 32)

    moved.set_input_size(patch_size=16)
    assert (moved.grid_size, moved.pos_embed.shape, moved.order.shape) == ((16, 2), (1, 33, 32), (4, 33))
    weight = resample_patch_embed(model.patch_embed.proj.weight, [16, 16])
    assert torch.equal(moved.patch_embed.proj.weight, weight)
    assert moved.feature_info[0]["reduction"] == 16
    assert moved(imgs).shape == (2, 5)
    save_for_hf(moved, tmp_path, model_args={**SMALL, "patch_size": 16, "img_size": (256, 32)})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(imgs), moved(imgs))
    assert timm.data.resolve_model_data_config(again)["crop_pct"] == 1.0
    for size, message in (
        ({"img_size": 40}, "image size 40 does not divide into patches of 16 pixels"),
        ({"patch_size": (8, 16)}, r"patches of \(8, 16\) pixels: they have to be square"),
    ):
        with pytest.raises(ValueError, match=message):
            moved.set_input_size(**size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factory_dtype(imgs, dtype):
    model = small(dtype=dtype, drop_path_rate=0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, value in small(drop_path_rate=0.5).to(dtype).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.train()(imgs.to(dtype)).dtype == dtype
    assert model.load_state_dict(model.state_dict())
    assert model(imgs.to(dtype)).dtype == dtype  # the rates are of the model's dtype after loading, too


@pytest.mark.parametrize("create", [small, small_pretrain], ids=["classifier", "pretraining"])
def test_factory_device(create):
    model = create(device="meta", dtype=torch.float16)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert {tensor.dtype for tensor in tensors.values()} <= {torch.float16, torch.int64}


@pytest.mark.parametrize("how", ["assign", "to_empty", "without a load", "pickle", "deepcopy"])
@pytest.mark.parametrize(
    ("create", "options"),
    [
        (small, {"drop_path_rate": 0.5, "depth": 4}),
        (small, {"directions": 1}),
        (small, {"features_only": True, "drop_path_rate": 0.5, "depth": 4, "out_indices": (0, 1)}),
        (small_pretrain, {"order": "column"}),
        (small_pretrain, {"order": "random"}),
        (small_pretrain, {"objective": "mae"}),
    ],
)
def test_buffers_that_no_state_dict_holds(create, options, how):
    """They equal those of a model that was built directly, whichever way the weights are loaded."""
    want = create(**options)
    state = {name: value for name, value in want.state_dict().items() if name != "mask"}  # old checkpoints lack it
    if how in ("pickle", "deepcopy"):
        model = copy.deepcopy(want) if how == "deepcopy" else pickle.loads(pickle.dumps(want))
        model.load_state_dict(state)
    else:
        with torch.device("meta"):
            model = create(**options)
        if how == "assign":
            model.load_state_dict(state, assign=True)
        else:
            model.to_empty(device="cpu")
            with torch.no_grad():
                for buffer in model.buffers():
                    buffer.fill_(3)
            if how == "to_empty":
                model.load_state_dict(state)
            else:  # as transformers does it
                for name, value in want.state_dict().items():
                    model.state_dict()[name].copy_(value)
                for module in model.modules():
                    if hasattr(module, "init_non_persistent_buffers"):
                        module.init_non_persistent_buffers()
    assert dict(model.named_buffers()).keys() == dict(want.named_buffers()).keys()
    for name, buffer in want.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    imgs = torch.randn(2, 3, 48, 32)
    got, expected = (seeded(m, imgs) for m in (model.train(), want.train()))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_hugging_face_wrapper(tmp_path, imgs):
    """Saved and loaded by transformers, which builds the model on "meta" and loads the file's tensors."""
    transformers = pytest.importorskip("transformers", minversion="5.0", exc_type=ImportError)
    args = {name: value for name, value in SMALL.items() if name != "num_classes"} | {"drop_path_rate": 0.5}
    config = transformers.TimmWrapperConfig(architecture="arm_base_pz16", num_labels=5, model_args=args)
    torch.manual_seed(0)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    for kind in (transformers.TimmWrapperForImageClassification, transformers.AutoModelForImageClassification):
        again = kind.from_pretrained(tmp_path, local_files_only=True).eval()
        assert torch.equal(again(imgs).logits, model(imgs).logits)
        assert torch.equal(again.timm_model.drop_path_rates, model.timm_model.drop_path_rates)
    encoder = transformers.AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    got = encoder(imgs, output_hidden_states=True)
    assert torch.equal(got.last_hidden_state, model.timm_model.forward_features(imgs))
    assert [x.shape for x in got.hidden_states] == [(2, 32, *GRID)] * 2
    half = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, local_files_only=True, dtype=torch.bfloat16
    )
    assert half.train()(imgs, labels=torch.tensor([0, 1])).loss.isfinite()


@pytest.mark.parametrize("pool", [True, False, "avg", "token"])
def test_forward_is_features_and_head(imgs, pool):
    model = small(global_pool=pool)
    tokens = model.forward_features(imgs)
    assert tokens.shape == (2, TOKENS, 32)
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, TOKENS), atol=1e-5)  # normalised
    pooled = model.forward_head(tokens, pre_logits=True)
    patches = torch.cat([tokens[:, :12], tokens[:, 13:]], dim=1)
    want = patches.mean(1) if pool in (True, "avg") else tokens[:, 12]
    assert torch.allclose(pooled, want, atol=1e-6)
    assert torch.equal(model.forward_head(tokens), model.head(pooled))
    assert torch.equal(model(imgs), model.forward_head(tokens))
    assert model(imgs).shape == (2, 5)


def test_odd_numbers_of_patches():
    """3 x 3 patches: the class token has 4 before it and 5 after it, and halves count alike."""
    model = small(img_size=24)
    tokens = torch.randn(2, 10, 32)
    want = (tokens[:, :4].mean(1) + tokens[:, 5:].mean(1)) / 2
    assert torch.allclose(model.forward_head(tokens, pre_logits=True), want, atol=1e-6)
    model.global_pool = "token"
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 4])


def test_no_head_and_new_heads(imgs):
    model = small(num_classes=0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    assert model(imgs).shape == (2, 32)
    assert "head.weight" not in model.state_dict()
    model.double().reset_classifier(3)
    assert model.get_classifier() is model.head
    assert model.num_classes == 3
    assert model(imgs.double()).shape == (2, 3)
    assert (model.head.weight.std() < 0.03, model.head.bias.abs().max()) == (True, 0)
    model.reset_classifier(0, "")
    assert model(imgs.double()).shape == (2, TOKENS, 32)
    model.reset_classifier(3, "token")
    assert torch.equal(model(imgs.double()), model.head(model.forward_features(imgs.double())[:, 12]))
    with pytest.raises(ValueError, match="unknown global_pool 'max'; choose from 'avg', True"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="unknown global_pool 'max'"):
        small(global_pool="max")


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(in_chans):
    assert small(in_chans=in_chans)(torch.randn(2, in_chans, 48, 32)).shape == (2, 5)


def test_drop_rates(imgs):
    model = small(drop_rate=0.5, drop_path_rate=0.5)
    assert torch.equal(model(imgs), model(imgs))
    assert model.drop_path_rates.tolist() == [0, 0]  # [0] + linspace(0, 0.5, 2), the first two
    model.train()
    tokens = model.forward_features(imgs)
    pooled = model.forward_head(tokens, pre_logits=True)
    kept = model.eval().forward_head(tokens, pre_logits=True)
    dropped = pooled == 0
    assert 0.2 < dropped.float().mean() < 0.8
    assert torch.allclose(pooled[~dropped], 2 * kept[~dropped])


def test_intermediates(imgs):
    model = small(depth=4)
    blocks = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: blocks.append(output))
    tokens, every = model.forward_intermediates(imgs)
    assert torch.equal(tokens, model.forward_features(imgs))
    assert [x.shape for x in every] == [(2, 32, *GRID)] * 4
    for got, block in zip(every, blocks, strict=False):
        # row 4, column 1 is patch 17, which stands behind the class token
        assert torch.equal(got[:, :, 4, 1], block[:, 18])
        assert torch.equal(got[:, :, 1, 2], block[:, 6])
    for indices, want in ((2, [2, 3]), ([0, -1], [0, 3]), ([1], [1])):
        got = model.forward_intermediates(imgs, indices, intermediates_only=True)
        assert len(got) == len(want)
        assert all(torch.equal(g, every[i]) for g, i in zip(got, want, strict=True))
    normed = model.forward_intermediates(
        imgs, 1, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    patches, token = normed[0]
    assert torch.equal(patches, torch.cat([tokens[:, :12], tokens[:, 13:]], dim=1))
    assert torch.equal(token, tokens[:, 12:13])
    blocks.clear()
    early, _ = model.forward_intermediates(imgs, [0, 1], stop_early=True)
    assert len(blocks) == 2
    assert torch.equal(early, model.norm_f(blocks[1]))
    for indices in (5, 0, [4], [-5]):
        with pytest.raises(ValueError, match=r"no blocks .* among 4"):
            model.forward_intermediates(imgs, indices)
    with pytest.raises(ValueError, match="unknown output_fmt 'NHWC'"):
        model.forward_intermediates(imgs, output_fmt="NHWC")
    with pytest.raises(TypeError, match="attn_mask"):  # a scan has no attention to mask
        model.forward_intermediates(imgs, attn_mask=None)


def test_intermediates_as_a_dict(imgs):
    model = small(depth=3)
    tokens, pairs = model.forward_intermediates(imgs, [0, 2], return_prefix_tokens=True, norm=True)
    got = model.forward_intermediates(imgs, [0, 2], return_prefix_tokens=True, norm=True, output_dict=True)
    assert set(got) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    assert torch.equal(got["image_features"], tokens)
    for i, (patches, token) in enumerate(pairs):
        assert torch.equal(got["image_intermediates"][i], patches)
        assert torch.equal(got["image_intermediates_prefix"][i], token)
    got = model.forward_intermediates(imgs, 1, intermediates_only=True, output_dict=True)
    assert set(got) == {"image_intermediates"}


def test_intermediate_layers_as_in_dino(imgs):
    model = small(depth=3)
    _, every = model.forward_intermediates(imgs, output_fmt="NLC", return_prefix_tokens=True)
    got = model.get_intermediate_layers(imgs, 2)
    assert [x.shape for x in got] == [(2, TOKENS - 1, 32)] * 2
    assert all(torch.equal(g, patches) for g, (patches, _) in zip(got, every[1:], strict=True))
    ((patches, token),) = model.get_intermediate_layers(imgs, [0], reshape=True, return_prefix_tokens=True, norm=True)
    want = model.norm_f(torch.cat([every[0][0][:, :12], every[0][1], every[0][0][:, 12:]], dim=1))
    assert patches.shape == (2, 32, *GRID)
    assert torch.allclose(patches[:, :, 1, 2], want[:, 6], atol=1e-6)
    assert torch.allclose(token[:, 0], want[:, 12], atol=1e-6)


@pytest.mark.parametrize(("indices", "kept"), [((0, 2), [0, 2]), (2, [2, 3]), (None, [1, 2, 3])])
def test_features_only(imgs, indices, kept):
    whole = small(depth=4)
    model = small(depth=4, features_only=True, **({} if indices is None else {"out_indices": indices})).eval()
    model.model.load_state_dict(whole.state_dict(), strict=False)
    got = model(imgs)
    want = whole.forward_intermediates(imgs, kept, intermediates_only=True)
    assert len(got) == len(kept)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert model.feature_info.channels() == [32] * len(kept)
    assert model.feature_info.reduction() == [8] * len(kept)
    assert model.feature_info.module_name() == [f"layers.{i}" for i in kept]
    assert len(model.model.layers) == kept[-1] + 1


def test_features_only_with_drop_path(imgs):
    model = small(depth=4, drop_path_rate=0.5, features_only=True, out_indices=(1,)).train()
    assert model(imgs)[0].shape == (2, 32, *GRID)


def test_gradient_checkpointing(imgs):
    """The same gradients, of the same drawn blocks, and less kept for the backward pass."""
    model = small(depth=4, drop_path_rate=0.5).double().train()
    gradients, kept = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            loss = model(imgs.double()).square().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_layers_of_parameters():
    """timm's groups are those of util.lr_decay: layers, decay, and every parameter once."""
    model = small(depth=3)
    names = {p: name for name, p in model.named_parameters()}
    ours = param_groups_layer_decay(model, 0.05, 0.5)
    ours = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in ours for p in group["params"]}
    theirs = timm_groups(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    theirs = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    assert set(ours) == set(names.values())
    assert theirs == ours
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == set(names.values())
    assert layers["pos_embed"] == layers["cls_token"] == layers["patch_embed.proj.weight"] == 0
    assert layers["layers.2.mixer.A_log"] == 3
    assert layers["norm_f.bias"] == layers["head.weight"] == 4


def test_no_weight_decay():
    model = small()
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("size", [(32, 48), (64, 40), (24, 24), (48, 32)])
def test_dynamic_size(size):
    """A dynamic model computes the same as a model of that size with the interpolated embedding."""
    model, fixed = small(dynamic_img_size=True), small(img_size=size)
    fixed.load_state_dict(pretrain_to_classifier(model.state_dict(), fixed, (48, 32)))
    imgs = torch.randn(2, 3, *size)
    assert torch.equal(model(imgs), fixed(imgs))
    (last,) = model.forward_intermediates(imgs, 1, intermediates_only=True)
    assert last.shape == (2, 32, size[0] // 8, size[1] // 8)
    features = small(dynamic_img_size=True, features_only=True, out_indices=(1,))
    assert features(imgs)[0].shape == last.shape


def test_sizes_that_do_not_fit(imgs):
    with pytest.raises(ValueError, match=r"images of \(32, 48\) pixels, the model takes \(48, 32\): .*dynamic"):
        small()(imgs.mT)
    with pytest.raises(ValueError, match="image size 47 does not divide into patches of 8 pixels; nearest: 40 or 48"):
        small(dynamic_img_size=True)(imgs[:, :, :47])


def test_gradients_reach_every_parameter(imgs):
    for pool in ("avg", "token"):
        model = small(global_pool=pool).train()
        model(imgs).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_compiled(imgs):
    model = small(scan_backend="torch")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(imgs), model(imgs)) < 1e-5


def test_exported(imgs):
    """With scan_backend="export" the program holds operators of torch only, and takes any number of images."""
    model = small(scan_backend="export")
    torch._dynamo.reset()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (imgs,), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if re.match("arm", target)]
    more = torch.randn(3, 3, 48, 32)
    assert relative_error(program.module()(more), small()(more)) < 1e-5


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_state_dict_through_timm(tmp_path, imgs, suffix):
    model, path = small(), tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save({"model": model.state_dict()}, path)  # as our checkpoints hold it
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    torch.manual_seed(2)
    other = timm.create_model("arm_base_pz16", **SMALL).eval()
    assert not torch.equal(other(imgs), model(imgs))
    load_checkpoint(other, str(path))
    assert torch.equal(other(imgs), model(imgs))
    created = timm.create_model("arm_base_pz16", checkpoint_path=str(path), **SMALL).eval()
    assert torch.equal(created(imgs), model(imgs))


def test_pretrained_files_are_adapted(tmp_path):
    """`pretrained=True`: another resolution, other classes, and a pretraining checkpoint."""
    source, path = small(img_size=(32, 32)), tmp_path / "model.pth"
    torch.save(source.state_dict(), path)
    overlay = {"file": str(path)}
    model = small(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.pos_embed, pretrain_to_classifier(source.state_dict(), model)["pos_embed"])
    assert torch.equal(model.head.weight, source.head.weight)
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert model.head.weight.shape == (3, 32)
    assert torch.equal(model.norm_f.weight, source.norm_f.weight)

    sizes = {"embed_dim": 32, "depth": 2, "patch_size": 8, "cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 1}
    pretrained = models_arm.create_pretrain_model("arm_base_pz16", img_size=(48, 32), **sizes)
    torch.save({"model": pretrained.state_dict()}, path)
    for classes in (5, 0):
        model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
        assert torch.equal(model.layers[1].mixer.A_c_b_log, pretrained.layers[1].mixer.A_log)
        assert model.num_classes == classes


def test_fx_and_torchscript_are_refused(imgs):
    """The message names the alternatives."""
    model, instead = small(), "use torch.export or torch.compile"
    with pytest.raises(TypeError, match=f"torch.fx cannot trace this model, .*{instead}"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TypeError, match=f"torch.fx cannot trace this model, .*{instead}"):
        create_feature_extractor(model, ["head"])
    for module in (model, torch.nn.Sequential(model)):
        with pytest.raises(TypeError, match=f"TorchScript cannot compile this model, .*{instead}"):
            torch.jit.script(module)
