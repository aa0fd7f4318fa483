"""--grad_checkpointing: blocks run again in the backward pass, and the result is the same, bit for bit."""

import pytest
import torch
from helpers import TINY_PRETRAIN, torchrun
from training_helpers import FAST, SCRIPTS, final_weights

import main_pretrain
import mamba
import models_arm

SIZES = {"img_size": (48, 32), "patch_size": 8, "cluster_size": 2, "embed_dim": 32, "dec_embed_dim": 64, "dec_depth": 2}


def backward(model, imgs):
    """Return the gradients, and how many numbers were kept for the backward pass."""
    sizes = []
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        loss = model(imgs).mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(sizes)


@pytest.mark.parametrize(
    ("switches", "compiled"),
    [({}, False), ({}, True), ({"objective": "mae"}, False), ({"order": "random_per_image", "taps": "last"}, False)],
)
def test_gradients(switches, compiled):
    torch.manual_seed(0)
    model = models_arm.create_pretrain_model("arm_tiny_pz16", **SIZES, depth=4, norm_pix_loss=True, **switches)
    imgs = torch.randn(2, 3, 48, 32)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
    want, kept = backward(model, imgs)
    model.set_grad_checkpointing()
    got, less = backward(model, imgs)
    assert len(got) == len([p for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert less < kept / 2


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run(kind, image_folder, tmp_path, run_script, monkeypatch):
    """With drop path; it resumes a run without it."""
    calls, checkpoint = [], mamba.checkpoint
    monkeypatch.setattr(mamba, "checkpoint", lambda *args, **how: (calls.append(args), checkpoint(*args, **how))[1])
    script, _, words = SCRIPTS[kind]
    words = [*words, *FAST, "--batch_size", 8, "--data_path", image_folder]
    words += ["--drop_path", 0.5] if kind == "finetune" else ["--vis_freq", 0]
    run_script(script, *words, "--output_dir", tmp_path / "kept")
    assert not calls
    resume = ["--resume", tmp_path / "kept" / "checkpoint-0.pth", "--grad_checkpointing"]
    run_script(script, *words, *resume, "--output_dir", tmp_path / "recomputed")
    assert len(calls) == 3 * (4 + 2 * (kind == "pretrain"))  # batches, blocks of the encoder and of the decoder
    want, got = (final_weights(tmp_path / name) for name in ("kept", "recomputed"))
    assert all(torch.equal(value, got[name]) for name, value in want.items())


def test_sharded_pretraining(image_folder, tmp_path, run_script):
    """Two processes compute the same as one."""
    words = [*TINY_PRETRAIN, *FAST, "--data_path", image_folder, "--vis_freq", 0]
    run_script(main_pretrain, *words, "--batch_size", 8, "--output_dir", tmp_path / "one")
    words += ["--batch_size", 4, "--fsdp", "--grad_checkpointing"]
    torchrun("main_pretrain.py", *words, "--output_dir", tmp_path / "fsdp")
    want, got = (final_weights(tmp_path / name) for name in ("one", "fsdp"))
    keys = [name for name in want if "kv.bias" not in name]  # the gradient of the keys' bias is rounding noise
    assert all(torch.allclose(want[name], got[name], rtol=1e-4, atol=1e-6) for name in keys)
