"""--freeze: part of a classifier is not trained, and costs no backward pass; --nb_classes counts the classes."""

import pytest
import torch
from helpers import TINY_FINETUNE, TINY_PRETRAIN, read_log, torchrun
from training_helpers import FAST

import main_pretrain
import models_arm
from Finetuning import main_finetune
from util.checkpoints import checkpoint_file
from util.checkpoints.convert import pretrain_to_classifier
from util.lr_decay import param_groups_layer_decay

RUN = [*TINY_FINETUNE, *FAST, *"--batch_size 8 --reprob 0 --aa none".split()]
EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed.")


def classifier(**options):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 4, "patch_size": 8, "img_size": (48, 32), "num_classes": 3}
    return models_arm.create_classifier("arm_tiny_pz16", **sizes, **options).double().train()


def gradients_of(model, imgs):
    """Return the gradients by name, and how many numbers were kept for the backward pass."""
    sizes = []
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        loss = model(imgs).square().sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(sizes)


def is_frozen(name, blocks):
    return name.startswith(EMBEDDINGS + tuple(f"layers.{i}." for i in range(blocks)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("blocks", [0, 2, 4])
def test_gradients_are_those_of_the_whole_model(blocks, recompute):
    """Of all parameters that are trained; the others have none. The first two blocks have no drop path anyway."""
    imgs = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    whole = classifier(drop_path_rate=0.5 if blocks <= 2 else 0.0)
    want, kept = gradients_of(whole, imgs)
    model = classifier(drop_path_rate=whole.drop_path_rate)
    model.freeze(blocks)
    model.set_grad_checkpointing(recompute)
    got, less = gradients_of(model, imgs)
    assert got.keys() == {name for name in want if not is_frozen(name, blocks)}
    assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())
    assert less < kept * (1 - blocks / 5) or blocks == 0


def test_all_but_the_head():
    model, imgs = classifier(drop_path_rate=0.9), torch.randn(2, 3, 48, 32, dtype=torch.float64)
    model.freeze("all")
    assert gradients_of(model, imgs)[0].keys() == {"head.weight", "head.bias"}
    tokens = model.forward_features(imgs)
    assert torch.equal(tokens, model.forward_features(imgs))  # no drop path
    assert torch.equal(tokens, model.eval().forward_features(imgs))
    groups = param_groups_layer_decay(model, 0.05, 0.5)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.head.parameters()}
    model.set_input_size((96, 32), patch_size=4)
    model.reset_classifier(7)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_blocks_that_there_are_not():
    with pytest.raises(ValueError, match="the model has 4 blocks, not 5"):
        classifier().freeze(5)


@pytest.fixture(scope="module")
def pretrained(image_folder, tmp_path_factory):
    """A file of pretraining."""
    folder = tmp_path_factory.mktemp("pretrained")
    args = main_pretrain.get_args_parser().parse_args([*TINY_PRETRAIN, "--data_path", str(image_folder)])
    torch.manual_seed(1)
    model = main_pretrain.build_model(args)
    torch.save({"model": model.state_dict(), "args": args}, folder / "pretrained.pth")
    return folder / "pretrained.pth"


def test_a_frozen_run(pretrained, image_folder, tmp_path, run_script, capsys):
    """Frozen weights and their averages stay bitwise, without a state of the optimizer; the run resumes bitwise."""
    words = [*RUN, "--data_path", image_folder, "--freeze", 2, "--ema_decay", 0.5, "--drop_path", 0.3]
    run_script(main_finetune, *words, "--finetune", pretrained, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    content = checkpoint_file.read(tmp_path / "out" / "checkpoint-last.pth")
    model = main_finetune.build_classifier(content["args"], None)
    before = pretrain_to_classifier(checkpoint_file.read(pretrained)["model"], model, (48, 32))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 38391
    assert "--freeze 2: 38,391 of 83,627 parameters are trained; the class token, which is new, keeps its" in said
    for name, value in before.items():
        for key in ("model", "model_ema"):
            assert torch.equal(content[key][name], value) == is_frozen(name, 2), (key, name)
    assert torch.equal(content["model"]["cls_token"], content["model_ema"]["cls_token"])
    assert len(content["optimizer"]["state"]) == len(trained)
    assert content["args"].nb_classes == 3

    resume = ["--resume", tmp_path / "out" / "checkpoint-0.pth", "--output_dir", tmp_path / "again"]
    run_script(main_finetune, *words, *resume)
    again = checkpoint_file.read(tmp_path / "again" / "checkpoint-last.pth")
    for key in ("model", "model_ema"):
        assert all(torch.equal(value, again[key][name]) for name, value in content[key].items())
    with pytest.raises(SystemExit):
        run_script(main_finetune, *words, *resume[:2], "--freeze", 1, "--output_dir", tmp_path / "other")
    assert "is of a run with other arguments: freeze 2 -> 1" in capsys.readouterr().err
    content = checkpoint_file.read(tmp_path / "out" / "checkpoint-0.pth")
    del content["args"].freeze, content["args"].in_chans  # as in a file of an earlier version
    torch.save(content, tmp_path / "earlier.pth")
    earlier = ["--resume", tmp_path / "earlier.pth", "--in_chans", 1]
    with pytest.raises(SystemExit):
        run_script(main_finetune, *words, *earlier, "--output_dir", tmp_path / "other")
    assert "is of a run with other arguments: freeze None -> 2, in_chans 3 -> 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(main_finetune, *words, "--finetune", pretrained, "--freeze", 5, "--output_dir", tmp_path / "other")
    assert "--freeze 5: the model has 4 blocks, not 5" in capsys.readouterr().err


def test_two_processes_equal_one(pretrained, image_folder, tmp_path, run_script):
    """With DDP; and sharded, where blocks are recomputed, too. One process is the reference."""
    words = [*RUN, "--data_path", image_folder, "--finetune", pretrained, "--freeze", 2]
    run_script(main_finetune, *words, "--output_dir", tmp_path / "one")
    want = read_log(tmp_path / "one")
    for name, more in (("ddp", []), ("fsdp", ["--fsdp", "--grad_checkpointing"])):
        folder = ["--output_dir", tmp_path / name]
        torchrun("Finetuning/main_finetune.py", *words, *more, "--batch_size", 4, *folder)
        got = read_log(tmp_path / name)
        assert [row["train_loss"] for row in got] == pytest.approx([row["train_loss"] for row in want], rel=1e-5)
        content, reference = (checkpoint_file.read(tmp_path / n / "checkpoint-last.pth") for n in (name, "one"))
        assert content["optimizer"]["state"].keys() == reference["optimizer"]["state"].keys()
        for parameter, value in reference["model"].items():
            moved = content["model"][parameter] - value
            assert not moved.any() if is_frozen(parameter, 2) else moved.abs().max() < 1e-5, parameter


@pytest.mark.parametrize(("words", "outputs"), [([], 3), (["--nb_classes", 1000], 1000)])
def test_the_number_of_classes(words, outputs, image_folder, tmp_path, run_script, capsys):
    """It is that of train/, or as given; a run that resumes keeps it, and so does an evaluation."""
    at = RUN.index("--nb_classes")
    run = [*RUN[:at], *RUN[at + 2 :], "--data_path", image_folder, "--output_dir", tmp_path]
    run_script(main_finetune, *run, "--epochs", 1, *words)
    run_script(main_finetune, *run, "--resume", "auto", "--allow_changed_args")
    assert ("3 classes, and 1000 outputs: --nb_classes" in capsys.readouterr().out) == (outputs == 1000)
    content = checkpoint_file.read(tmp_path / "checkpoint-last.pth")
    assert (content["epoch"], content["args"].nb_classes, len(content["model"]["head.bias"])) == (1, outputs, outputs)
    run_script(main_finetune, "--eval", "--resume", tmp_path / "checkpoint-last.pth", "--data_path", image_folder)
    assert f"; {outputs} outputs, 4 directions" in capsys.readouterr().out
