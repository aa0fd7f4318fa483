"""The models beyond the golden values: sizes and grids that fit, and which pixels each prediction depends on."""

import math
import re

import pytest
import torch
from helpers import relative_error

import decoder
import models_arm
from mamba import ONE_DIRECTION, ORDERS, Block, SwiGLU, drop_path_factors, scan_orders
from objectives import encoder_part
from ops import fused
from util.checkpoints import convert

SMALL = {"embed_dim": 32, "depth": 4, "dec_embed_dim": 64}


def small_pretrain(**overrides):
    torch.manual_seed(0)
    sizes = {**SMALL, "img_size": (48, 32), "patch_size": 8, "cluster_size": 2, "dec_depth": 2, "norm_pix_loss": True}
    model = models_arm.create_pretrain_model("arm_tiny_pz16", **{**sizes, **overrides})
    return model.double()


@pytest.mark.parametrize(
    ("depth", "dec_depth", "taps"),
    [(12, 4, [6, 8, 10, 12]), (24, 4, [12, 16, 20, 24]), (6, 4, [3, 4, 5, 6]), (6, 2, [3, 6]), (5, 1, [5])],
)
def test_taps(depth, dec_depth, taps):
    assert decoder.decoder_taps(depth, dec_depth) == taps
    assert decoder.decoder_taps(depth, dec_depth, "last") == [depth] * dec_depth


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"img_size": 200},
            "image size 200 does not divide into 4 x 4-patch clusters of 64 pixels; nearest: 192 or 256",
        ),
        ({"img_size": (192, 30)}, "image size 30 .* nearest: 64"),
        ({"img_size": 64}, "single cluster"),
        ({"dec_embed_dim": 100}, "decoder width 100 is not a multiple of 64"),
        ({"depth": 4, "dec_depth": 4}, "depth 4 is too small for 4 decoder blocks"),
        ({"depth": 12, "dec_depth": 0}, "at least one block"),
        ({"order": "spiral"}, "unknown order 'spiral'; choose from row, row_reverse"),
        ({"taps": "first"}, "unknown taps 'first'; choose from even, last"),
        ({"objective": "simmim"}, "unknown objective 'simmim'; choose from arm, mae"),
        ({"objective": "mae", "img_size": 16, "cluster_size": 1}, "single patch"),
        ({"scan_backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_pretraining_sizes_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        models_arm.create_pretrain_model("arm_base_pz16", **{**SMALL, "dec_depth": 2, **overrides})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": 225}, "image size 225 does not divide into patches of 16 pixels; nearest: 224 or 240"),
        ({"img_size": 16}, "single patch"),
        ({"directions": 2}, "2 scan directions: choose 1 or 4"),
        ({"directions": 1, "global_pool": False}, "sees half of the image with one direction"),
    ],
)
def test_classifier_sizes_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        models_arm.create_classifier("arm_tiny_pz16", embed_dim=32, depth=1, **overrides)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'arm_giant'.*arm_base_pz16.*arm_tiny_pz16"):
        models_arm.create_pretrain_model("arm_giant")


@pytest.mark.parametrize(("name", "width"), [("arm_tiny_pz16", 192), ("arm_small_pz16", 384)])
def test_own_sizes(name, width):
    with torch.device("meta"):
        model = models_arm.create_pretrain_model(name)
    assert model.pos_embed.shape == (1, 144, width)
    assert len(model.layers) == 12


def test_clusters_are_in_raster_order():
    """Against indices worked out by hand: 2 x 2 clusters of 2 x 2 patches on a 4 x 4 grid."""
    model = small_pretrain(img_size=32)
    clusters = model.to_clusters(torch.arange(16).view(1, 16, 1))
    want = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert clusters[0, :, :, 0].tolist() == want


@pytest.mark.parametrize("cluster_size", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_permutation(order, cluster_size):
    """Of the patches; undone, it gives the images back."""
    model = small_pretrain(order=order, cluster_size=cluster_size)
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    drawn = model.draw_order(2)
    index = model.to_clusters(torch.arange(24).view(1, 24, 1), drawn).flatten(1).expand(2, -1)  # (2, M)
    assert index.sort(dim=1).values.tolist() == [list(range(24))] * 2
    patches = model.to_clusters(model.patchify(imgs), drawn).flatten(1, 2)  # (2, M, 3pp)
    assert torch.equal(model.unpatchify(patches.take_along_dim(index.argsort(dim=1)[:, :, None], dim=1)), imgs)
    assert torch.equal(
        model.unpatchify(torch.empty_like(patches).scatter(1, index[..., None].expand_as(patches), patches)), imgs
    )


def test_orders_by_hand():
    """Clusters 0 1 / 2 3 / 4 5; inside one, patches stay in raster order."""
    for order, want in {
        "row": [0, 1, 2, 3, 4, 5],
        "row_reverse": [5, 4, 3, 2, 1, 0],
        "column": [0, 2, 4, 1, 3, 5],
        "column_reverse": [5, 3, 1, 4, 2, 0],
    }.items():
        model = small_pretrain(order=order)
        index = model.to_clusters(torch.arange(24).view(1, 24, 1))[0, :, :, 0]  # (clusters, c * c)
        firsts = [0, 2, 8, 10, 16, 18]  # patches, in rows of four
        assert index[:, 0].tolist() == [firsts[i] for i in want]
        assert (index - index[:, :1]).tolist() == [[0, 1, 4, 5]] * 6


def test_a_random_order_is_the_models():
    """Drawn from the seed, kept in the state dict; the other weights are those of the model in rows."""
    first, again = small_pretrain(order="random"), small_pretrain(order="random")
    assert torch.equal(first.cluster_order, again.cluster_order)
    assert first.cluster_order.tolist() != list(range(6))
    for name, value in small_pretrain().state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    torch.manual_seed(7)
    other = models_arm.create_pretrain_model("arm_tiny_pz16", **SMALL, img_size=(48, 32), patch_size=8, cluster_size=2,
                                             dec_depth=2, norm_pix_loss=True, order="random").double()  # fmt: skip
    assert not torch.equal(first.cluster_order, other.cluster_order)
    other.load_state_dict(first.state_dict())
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    assert torch.equal(first(imgs), other(imgs))
    for order in set(ORDERS) - {"random"}:
        assert small_pretrain(order=order).state_dict().keys() == small_pretrain().state_dict().keys()


def test_every_image_has_its_order():
    model = small_pretrain(order="random_per_image")
    orders = model.draw_order(64)
    assert len({tuple(order) for order in orders.tolist()}) > 32
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    both = model.forward_encoder(imgs, orders[:2])
    for i in (0, 1):
        assert relative_error(both[i : i + 1], model.forward_encoder(imgs[i : i + 1], orders[i : i + 1])) < 1e-12
    fixed = small_pretrain(order="column")
    fixed.load_state_dict(model.state_dict())
    order = fixed.cluster_order.expand(2, -1)
    pred = model.forward_decoder(model.forward_encoder(imgs, order), order)
    assert relative_error(model.forward_loss(imgs, pred, order), fixed(imgs)) < 1e-12


def test_a_reversed_order_is_the_order_on_the_turned_image():
    """With one patch a cluster: reading backward is reading the patches of the turned image forward."""
    turned = small_pretrain(order="row_reverse", cluster_size=1)
    plain = small_pretrain(cluster_size=1)
    plain.load_state_dict(turned.state_dict())
    for table in (plain.pos_embed, plain.dec_pos_embed):
        table.data = table.data.flip(1)
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    backward = plain.unpatchify(plain.patchify(imgs).flip(1))
    assert relative_error(turned(imgs), plain(backward)) < 1e-12


@pytest.mark.parametrize("objective", models_arm.OBJECTIVES)
def test_images_of_another_size_are_refused(objective):
    with pytest.raises(ValueError, match=r"images of \(48, 48\) pixels, the model takes \(48, 32\)"):
        small_pretrain(objective=objective)(torch.zeros(1, 3, 48, 48, dtype=torch.float64))


def test_target_is_the_pixels_of_the_next_clusters():
    model = small_pretrain(norm_pix_loss=False)
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    target = model.target(imgs)
    # second token of the third cluster in raster order (row 1, column 0): patch row 2, column 1
    patch = imgs[:, :, 16:24, 8:16]
    assert torch.equal(target[:, 4 + 1], patch.permute(0, 2, 3, 1).flatten(1))  # cluster 0 is no target


def test_norm_pix_loss_decides_about_normalisation():
    plain, normalised = small_pretrain(norm_pix_loss=False), small_pretrain(norm_pix_loss=True)
    normalised.load_state_dict(plain.state_dict())
    imgs = 3 + 2 * torch.randn(2, 3, 48, 32, dtype=torch.float64)
    target = plain.target(imgs)
    want = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    assert relative_error(normalised.target(imgs), want) < 1e-12
    pred = plain.forward_decoder(plain.forward_encoder(imgs))
    assert torch.allclose(plain(imgs), (pred - target).square().mean((0, 2)), rtol=1e-12)
    assert torch.allclose(normalised(imgs), (pred - want).square().mean((0, 2)), rtol=1e-12)


@pytest.mark.parametrize("taps", decoder.TAPS)
@pytest.mark.parametrize("cluster_size", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_no_prediction_sees_its_own_or_later_clusters(order, cluster_size, taps):
    """The gradient of a cluster's prediction is zero at its own pixels and later ones, and not at every earlier one."""
    model = small_pretrain(order=order, cluster_size=cluster_size, taps=taps)
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64, requires_grad=True)
    drawn, size = model.draw_order(2), cluster_size**2
    pred = model.forward_decoder(model.forward_encoder(imgs, drawn), drawn)  # (2, (clusters - 1) * c * c, 3pp)
    for target_cluster in range(1, 24 // size):
        tokens = pred[:, (target_cluster - 1) * size : target_cluster * size]
        (gradient,) = torch.autograd.grad(tokens.square().sum(), imgs, retain_graph=True)
        seen = model.to_clusters(model.patchify(gradient), drawn).abs().sum((2, 3))  # (2, clusters)
        assert (seen[:, target_cluster:] == 0).all(), target_cluster
        assert (seen[:, :target_cluster] > 0).all(), target_cluster


def test_hidden_patches_are_not_seen():
    """The loss counts only hidden patches. Gradients show that neither rule is broken."""
    model = small_pretrain(objective="mae", order="column")
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64, requires_grad=True)
    hidden = model.draw_hidden(2)
    assert hidden.shape == (2, 18)
    is_hidden = torch.zeros(2, 24, dtype=torch.bool).scatter(1, hidden, True)
    assert is_hidden.sum(1).tolist() == [18, 18]
    pred = model.forward_decoder(model.forward_encoder(imgs, hidden), hidden)  # (2, 18, 3pp)
    (gradient,) = torch.autograd.grad(pred.square().sum(), imgs)
    seen = model.patchify(gradient).abs().sum(2)  # (2, M)
    assert (seen[is_hidden] == 0).all()
    assert (seen[~is_hidden] > 0).all()
    loss = model.forward_loss(imgs, pred.detach(), hidden)
    (gradient,) = torch.autograd.grad(loss.sum(), imgs)
    counts = model.patchify(gradient).abs().sum(2)
    assert (counts[~is_hidden] == 0).all()
    assert (counts[is_hidden] > 0).all()
    target = model.as_target(model.patchify(imgs))
    error = torch.stack([(pred[i] - target[i, hidden[i]]).square().mean() for i in (0, 1)])
    assert relative_error(loss, error) < 1e-12


def test_masks_differ_from_image_to_image():
    hidden = small_pretrain(objective="mae").draw_hidden(64)
    assert len({tuple(sorted(patches)) for patches in hidden.tolist()}) == 64


def test_every_parameter_of_every_objective_learns():
    for objective in models_arm.OBJECTIVES:
        model = small_pretrain(objective=objective, taps="last")
        model(torch.randn(2, 3, 48, 32, dtype=torch.float64)).mean().backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []


def test_one_direction_is_the_pretrained_scan():
    """A classifier of one direction carries the parameters of pretraining, one by one, and reads rows forward."""
    sizes = {"embed_dim": 32, "depth": 2, "img_size": (48, 32), "patch_size": 8, "num_classes": 3}
    model = models_arm.create_classifier("arm_tiny_pz16", **sizes, directions=1).double()
    pretrained = small_pretrain(depth=2).state_dict()
    own = {*encoder_part(pretrained), "cls_token", "norm_f.weight", "norm_f.bias", "head.weight", "head.bias"}
    assert model.state_dict().keys() == own
    convert.load_into_classifier(pretrained, model)
    imgs = torch.randn(1, 3, 48, 32, dtype=torch.float64)
    changed = imgs.clone()
    changed[:, :, 40:, 24:] += 1  # the last patch
    tokens, after = model.forward_features(imgs), model.forward_features(changed)
    assert torch.equal(tokens[:, :-1], after[:, :-1])
    assert not torch.equal(tokens[:, -1], after[:, -1])


def test_a_built_classifier_refuses_one_patch_and_its_token():
    model = models_arm.create_classifier("arm_tiny_pz16", embed_dim=32, depth=1, directions=1, dynamic_img_size=True)
    assert model(torch.zeros(1, 3, 16, 32)).isfinite().all()
    with pytest.raises(ValueError, match="single patch"):
        model(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="sees half of the image"):
        model.reset_classifier(3, "token")


def test_weights_replaced_by_tensors():
    """As torch.func and torch.nn.utils.prune replace parameters."""
    model = small_pretrain()
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    doubled = {name: 2 * value for name, value in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, (imgs,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(got, model(imgs))


def test_state_dict_without_mask_loads():
    model = small_pretrain()
    state = {name: value for name, value in model.state_dict().items() if name != "mask"}
    other = small_pretrain()
    assert not other.load_state_dict(state).missing_keys
    assert torch.equal(other.mask, model.mask)
    assert "mask" not in state


def test_scan_orders_on_a_rectangle():
    """2 x 3 patches, class token at index 3: rows read a b c T d e f, columns a d b T e c f by position."""
    orders = scan_orders((2, 3))
    assert orders.tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [6, 5, 4, 3, 2, 1, 0],
        [0, 4, 1, 3, 5, 2, 6],
        [6, 2, 5, 3, 1, 4, 0],
    ]


@pytest.mark.parametrize("grid", [(1, 2), (4, 4), (3, 3), (5, 2), (14, 14)])
def test_scan_orders_are_permutations(grid):
    tokens = grid[0] * grid[1] + 1
    for order in scan_orders(grid):
        assert sorted(order.tolist()) == list(range(tokens))
    middle = (tokens - 1) // 2  # the class token keeps its index in both forward orders
    assert scan_orders(grid)[[0, 2], middle].tolist() == [middle, middle]


def test_transposed_image_with_rows_and_columns_swapped():
    """Rectangular grids are right: transposing everything and swapping row and column parameters changes nothing."""
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2}
    wide = models_arm.create_classifier("arm_tiny_pz16", img_size=(16, 32), **sizes).double()
    tall = models_arm.create_classifier("arm_tiny_pz16", img_size=(32, 16), **sizes).double()
    swapped = {
        re.sub(
            r"(mixer\.(?:A|D|conv1d|x_proj|dt_proj))(_c)?(?=_b|_log|\.|$)",
            lambda match: match[1] + ("" if match[2] else "_c"),
            name,
        ): value
        for name, value in wide.state_dict().items()
    }
    order = scan_orders((2, 4))[2]  # where each row-major token of the tall grid lies in the wide one
    swapped["pos_embed"] = wide.pos_embed[:, order]
    swapped["patch_embed.proj.weight"] = wide.patch_embed.proj.weight.mT
    tall.load_state_dict(swapped)
    imgs = torch.randn(2, 3, 16, 32, dtype=torch.float64)
    assert relative_error(tall.eval()(imgs.mT), wide.eval()(imgs)) < 1e-12


def test_bf16_autocast_keeps_the_recurrence_in_float32(monkeypatch):
    """Under autocast A, D and dt's bias reach the scan in float32, the activations in bf16."""
    seen = {}

    def spy(u, dt, A, B, C, D, dt_bias, order, backend):
        seen.update(u=u.dtype, dt=dt.dtype, A=A.dtype, B=B.dtype, C=C.dtype, D=D.dtype, dt_bias=dt_bias.dtype)
        return scan(u, dt, A, B, C, D, dt_bias, order, "torch")

    scan = fused.selective_scan
    monkeypatch.setattr(fused, "selective_scan", spy)
    model = small_pretrain(scan_backend="torch").float()
    imgs = torch.randn(2, 3, 48, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(imgs).mean()
    assert {k for k, v in seen.items() if v == torch.float32} == {"A", "D", "dt_bias"}
    assert {k for k, v in seen.items() if v == torch.bfloat16} == {"u", "dt", "B", "C"}
    assert loss.item() == pytest.approx(model(imgs).mean().item(), rel=2e-2)


def test_initial_step_sizes_lie_in_their_range():
    """dt = softplus(bias) of the pretraining scan is log-uniform in [0.001, 0.1]."""
    torch.manual_seed(0)
    mixer = Block(768, 1, ONE_DIRECTION, "torch").mixer
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias).log()
    low, high = math.log(0.001), math.log(0.1)
    assert low - 1e-4 < dt.min()
    assert dt.max() < high + 1e-4
    assert dt.mean().item() == pytest.approx((low + high) / 2, abs=0.25)
    assert torch.equal(mixer.A_log[5], torch.arange(1.0, 17.0).log())


def test_drop_path_factors():
    """A branch is dropped for an image as a whole, at the block's rate; the others are scaled to keep the mean."""
    torch.manual_seed(0)
    rates = torch.tensor([0.0, 0.25, 0.5])
    keep = drop_path_factors(rates, 4000)
    assert keep.shape == (3, 2, 4000, 1, 1)
    for factors, rate in zip(keep, rates.tolist(), strict=True):
        assert factors.unique().tolist() == pytest.approx([0, 1 / (1 - rate)][rate == 0 :])
        assert factors.mean(dim=1).flatten().tolist() == pytest.approx([1, 1], abs=0.06)
        assert (factors == 0).float().mean(dim=1).flatten().tolist() == pytest.approx([rate, rate], abs=0.03)
    assert not torch.equal(keep[2, 0], keep[2, 1])


def test_drop_path_leaves_out_branches_in_training_only():
    torch.manual_seed(0)
    block = Block(32, 2, ONE_DIRECTION, "torch").double()
    h = torch.randn(3, 5, 32, dtype=torch.float64)
    keep = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64).view(2, 3, 1, 1)
    got = block(h, keep=keep)
    assert torch.equal(got[0], h[0])
    assert torch.allclose(got[1], (h + 2 * block.mixer(block.norm1(h)))[1], rtol=1e-12)
    assert torch.allclose(got[2], (h + 4 * block.mlp(block.norm2(h)))[2], rtol=1e-12)
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 4}
    model = models_arm.create_classifier("arm_tiny_pz16", **sizes, drop_path_rate=0.9)
    imgs = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(imgs), model(imgs))
    assert not torch.equal(model.train()(imgs), model(imgs))


@pytest.mark.parametrize("dim", [64, 40])  # hidden widths of 170 and 106, padded to 176 and 112
def test_swiglu_is_its_formula(dim):
    torch.manual_seed(0)
    mlp, x = SwiGLU(dim).double(), torch.randn(2, 3, dim, dtype=torch.float64)
    for w in (mlp.w1, mlp.w2, mlp.w3):
        torch.nn.init.normal_(w.bias)
    assert mlp.w1.out_features % 8
    want = mlp.w3(torch.nn.functional.silu(mlp.w1(x)) * mlp.w2(x))
    got = mlp(x)
    assert relative_error(got, want) < 1e-12
    parameters = list(mlp.parameters())
    for g, w in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        assert relative_error(g, w) < 1e-12


def test_sizes_that_no_memory_holds_are_refused():
    """Before anything is allocated: together they would take terabytes."""
    for create in (models_arm.create_pretrain_model, models_arm.create_classifier):
        with pytest.raises(ValueError, match="1000 blocks of 16384 channels are too many"):
            create("arm_tiny_pz16", embed_dim=16384, depth=1000)
    with pytest.raises(ValueError, match="262144 patches are more than 16384: the mask has"):
        models_arm.create_pretrain_model(
            "arm_tiny_pz16", img_size=1024, patch_size=2, embed_dim=4, depth=1, dec_embed_dim=64, dec_depth=1
        )
    with pytest.raises(ValueError, match="patches of 0 pixels: they need at least one"):
        models_arm.create_classifier("arm_tiny_pz16", patch_size=0)
