"""Test export.py --to hf: timm and transformers read the folder and compute what the model computes."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from helpers import REPOSITORY, relative_error
from hub_server import Server
from PIL import ExifTags, Image

import models_arm
import pretrained
from tools import export

transformers = pytest.importorskip("transformers", minversion="5.0", exc_type=ImportError)
from tools import modeling_arm  # noqa: E402 - it imports transformers

NAMES = ["cat", "dog", "emu"]
SIZES = {"embed_dim": 32, "depth": 2, "patch_size": 8, "img_size": (48, 32), "num_classes": 3}
# Loads a folder, or a name on a hub, in a process of its own, and saves what it computes.
READ = """
import sys
if sys.argv[4] == "trust":
    sys.modules.update(dict.fromkeys(("timm", "einops", "mamba", "models_arm"), None))  # they cannot be imported
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

folder, picture, output, trust = *sys.argv[1:4], sys.argv[4] == "trust"
if not trust:
    import models_arm, timm
model, info = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=trust, output_loading_info=True)
assert not any(info.values()), info
image = Image.open(picture)
inputs = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)(image)
encoder = AutoModel.from_pretrained(folder, trust_remote_code=trust)
with torch.no_grad():
    found = {
        "pixels": inputs.pixel_values,
        "logits": model(**inputs).logits,
        "tokens": encoder(**inputs).last_hidden_state,
        "pooled": encoder(**inputs).pooler_output,
        "states": encoder(**inputs, output_hidden_states=True).hidden_states,
    }
    if not trust:
        found["timm"] = timm.create_model(f"hf_hub:{folder}", pretrained=True).eval()(inputs.pixel_values)
answers = pipeline("image-classification", model=folder, trust_remote_code=trust)(picture)
found["answers"] = {answer["label"]: answer["score"] for answer in answers}
if trust:
    more = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=7, ignore_mismatched_sizes=True
    ).train()
    more.gradient_checkpointing_enable()
    more(**inputs, labels=torch.tensor([6])).loss.backward()
    assert more.timm_model.grad_checkpointing
    found["gradients"] = min(p.grad.abs().max() for p in more.parameters())
    model.save_pretrained(f"{output}-again")
    more.save_pretrained(f"{output}-seven")
torch.save(found, output)
"""


def save(path, arguments=None, **sizes):
    """Save a classifier with random weights as finetuning does, with some arguments of the run; return the model."""
    torch.manual_seed(0)
    model = models_arm.create_classifier("arm_tiny_pz16", **SIZES | sizes).eval()
    known = {"input_size": (48, 32), "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2], "class_names": NAMES}
    known |= {"global_pool": model.global_pool} | (arguments or {})
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**known)}, path)
    return model


@pytest.fixture
def exported(run_script, tmp_path):
    """Return the model, its checkpoint and the folder."""
    model = save(tmp_path / "a.pth", global_pool="token")
    run_script(export, tmp_path / "a.pth", "--to", "hf", "--no_measure")
    return model, tmp_path / "a.pth", tmp_path / "a-hf"


@pytest.fixture
def picture(tmp_path, photographs):
    photographs[0].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def read(folder, picture, output, trust, environment, *flags):
    """Return what READ saves, in a process of its own without this repository unless `environment` has it."""
    words = [sys.executable, *flags, "-c", READ, str(folder), str(picture), str(output), trust]
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=known | environment, cwd=output.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(output, weights_only=False)


@torch.no_grad()
def check(found, model, checkpoint, picture):
    image = pretrained.read(checkpoint).read_image(picture)[None]
    assert (found["pixels"] - image).abs().max() < 1e-6
    assert relative_error(found["logits"], model(image)) < 1e-5
    tokens, pooled = model.forward_features(image), model.forward_head(model.forward_features(image), pre_logits=True)
    assert relative_error(found["tokens"], tokens) < 1e-5
    assert relative_error(found["pooled"], pooled) < 1e-5
    assert len(found["states"]) == 2
    want = model(image).softmax(-1)[0]
    assert found["answers"] == pytest.approx(dict(zip(NAMES, want.tolist(), strict=True)), abs=1e-6)


def test_without_this_repository(exported, picture, tmp_path):
    """The folder's own code, offline, in a Python that cannot import this repository."""
    model, checkpoint, folder = exported
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    found = read(folder, picture, tmp_path / "found", "trust", environment, "-I")
    check(found, model, checkpoint, picture)
    assert found["gradients"] > 0
    # what the folder's classes save is again for timm
    again = timm.create_model(f"local-dir:{tmp_path / 'found-again'}", pretrained=True).eval()
    assert relative_error(again(found["pixels"]).detach(), found["logits"]) < 1e-5
    assert again.pretrained_cfg["label_names"] == NAMES
    seven = json.loads((tmp_path / "found-seven" / "config.json").read_text())
    assert (seven["num_classes"], seven["pretrained_cfg"]["num_classes"]) == (7, 7)
    assert not seven.keys() & {"sha256", "files", "parameters", "training"}  # they are of the weights before


def test_from_a_hub(exported, picture, tmp_path):
    """timm and TimmWrapper by a name on the hub, where `import models_arm` has registered the model."""
    model, checkpoint, folder = exported
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with Server() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        hub.repositories["arm/small"] = dict.fromkeys(("main", "c" * 40), ("c" * 40, files))
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
        found = read("arm/small", picture, tmp_path / "found", "local", environment)
        hub.shutdown()
    check(found, model, checkpoint, picture)
    assert relative_error(found["timm"], found["logits"]) < 1e-5


@torch.no_grad()
def test_in_this_process(exported, picture, monkeypatch):
    """timm by local-dir, TimmWrapper by the folder's path, and this repository by the file of the weights."""
    model, checkpoint, folder = exported
    image = pretrained.read(checkpoint).read_image(picture)[None]
    own = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert relative_error(own(image), model(image)) < 1e-6
    data = timm.data.resolve_model_data_config(own)
    with Image.open(picture) as pillow:
        assert torch.equal(timm.data.create_transform(**data)(pillow), image[0])
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert torch.equal(processor(pillow).pixel_values, image)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(wrapped).__name__ == "TimmWrapperForImageClassification"
    assert wrapped.config.id2label == dict(enumerate(NAMES))
    assert relative_error(wrapped(image).logits, model(image)) < 1e-6
    config = json.loads((folder / "config.json").read_text())
    assert config["image_processor_type"] == "TimmWrapperImageProcessor"  # transformers 5.0 asks for it
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\n")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for part in code.split("\n\n# or "):  # by timm, and by the folder's own code
        names = {"imgs": image}
        monkeypatch.chdir(folder.parent)
        exec(part.removeprefix("without the repository, by the code in the folder"), names)
        assert relative_error(names["logits"], model(image)) < 1e-5
    again, found = pretrained.load(folder / "model.safetensors")
    assert found.class_names == NAMES
    assert torch.equal(again(image), model(image))


@torch.no_grad()
def test_an_encoder(run_script, tmp_path):
    model = save(tmp_path / "a.pth")
    run_script(export, tmp_path / "a.pth", "--to", "hf", "--no_measure", "--encoder", "--output", tmp_path / "encoder")
    imgs = torch.randn(2, 3, 48, 32)
    own = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0).eval()
    assert relative_error(own(imgs), model.forward_head(model.forward_features(imgs), pre_logits=True)) < 1e-6
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert relative_error(encoder(imgs).last_hidden_state, model.forward_features(imgs)) < 1e-6
    config = json.loads((tmp_path / "encoder/config.json").read_text())
    assert "AutoModelForImageClassification" not in config["auto_map"]
    assert "label_names" not in config
    assert "pipeline_tag: image-feature-extraction" in (tmp_path / "encoder/README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [{"in_chans": 1, "mean": [0.4], "std": [0.3]}, {"exif": True, "input_size": (256, 232)}],
    ids=["grey", "turned, not cropped"],
)
def test_pixels(run_script, tmp_path, photographs, options):
    """The folder's image processor has the pixels of the evaluation."""
    save(tmp_path / "a.pth", options, in_chans=options.get("in_chans", 3), img_size=options.get("input_size", (48, 32)))
    run_script(export, tmp_path / "a.pth", "--to", "hf", "--no_measure")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photographs[0].save(tmp_path / "turned.png", exif=exif)
    processor = modeling_arm.ARMImageProcessor.from_pretrained(tmp_path / "a-hf")
    with Image.open(tmp_path / "turned.png") as pillow:
        got = processor([pillow, pillow]).pixel_values
    want = pretrained.read(tmp_path / "a.pth").read_image(tmp_path / "turned.png")
    assert (got - want).abs().max() < 1e-6


def test_four_channels(run_script, tmp_path):
    """Pillow has no such images: there is no image processor, and the model takes tensors."""
    save(tmp_path / "a.pth", {"mean": [0.4] * 4, "std": [0.3] * 4}, in_chans=4)
    run_script(export, tmp_path / "a.pth", "--to", "hf", "--no_measure")
    config = json.loads((tmp_path / "a-hf/config.json").read_text())
    assert "AutoImageProcessor" not in config["auto_map"]
    assert config["pretrained_cfg"]["first_conv"] is None  # otherwise timm 1.0.20 gives it random values
    assert not (tmp_path / "a-hf/preprocessor_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_model_alone(exported, dtype, monkeypatch):
    """Outputs and gradients of arm.py are those of this repository; images of other sizes and padding too."""
    _, _, folder = exported
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "arm", raising=False)
    arm = importlib.import_module("arm")
    torch.manual_seed(2)
    options = SIZES | {"global_pool": "avg", "dynamic_img_size": True, "dynamic_img_pad": True, "drop_path_rate": 0.5}
    pair = [kind(**options).to(dtype) for kind in (models_arm.ARMClassifier, arm.ARMClassifier)]
    pair[1].load_state_dict(pair[0].state_dict())
    imgs, results = torch.randn(2, 3, 60, 35, dtype=dtype), []
    for one in pair:
        one.grad_checkpointing = one is pair[1]
        torch.manual_seed(3)  # of the blocks that are left out
        logits = one(imgs)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in one.parameters())])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for want, got in zip(*results, strict=True):
        assert relative_error(got.double(), want.double()) < tolerance


def test_the_code_reads_well(exported):
    """Each name is defined and used, and the files have the layout of this repository."""
    files = [exported[2] / name for name in ("arm.py", "modeling_arm.py")]
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--select", "E,F,W"], ["format", "--check"]):
        options = ["--config", REPOSITORY / "pyproject.toml", "--no-cache"]
        done = subprocess.run([*ruff, *command, *options, *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    text = files[0].read_text()
    assert "Licensed under the Apache License, Version 2.0" in text
    assert len(text.splitlines()) < 850
    assert not {"timm", "einops", "ops", "util"} & set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))


def test_an_earlier_folder(exported, run_script, tmp_path, capsys):
    """It is replaced as long as nobody has changed it."""
    _, checkpoint, folder = exported
    run_script(export, checkpoint, "--to", "hf", "--no_measure")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(folder)
    (folder / "README.md").write_text("my words")
    for output, message in (
        (folder, f"{folder}: README.md is not as the export wrote it: save it elsewhere"),
        (tmp_path / "mine", "mine is there and is no earlier result"),
        (tmp_path / "file", "file is there and is no folder"),
        (tmp_path / "link", "link is there and is no folder"),
        (".", "--output . has no name of its own"),
    ):
        with pytest.raises(SystemExit) as end:
            run_script(export, checkpoint, "--to", "hf", "--no_measure", "--output", output)
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "my words"
    (folder / "README.md").write_bytes(before["README.md"])
    config = json.loads(before["config.json"])
    for name, text in (("config.json", json.dumps(config | {"label_names": ["a", "b", "c"]})), ("more", "")):
        (folder / name).write_text(text)
        with pytest.raises(SystemExit):
            run_script(export, checkpoint, "--to", "hf", "--no_measure")
        assert f"{folder}: {name} is not as the export wrote it" in capsys.readouterr().err
        (folder / "config.json").write_bytes(before["config.json"])
    with pytest.raises(SystemExit):
        run_script(export, folder / "model.safetensors", "--to", "hf", "--no_measure", "--output", folder)
    assert "holds the checkpoint" in capsys.readouterr().err
    assert not [*tmp_path.glob(".export-*")]


def test_an_earlier_folder_stays_after_an_error(exported, run_script, monkeypatch, capsys):
    _, checkpoint, folder = exported
    rename = Path.rename

    def fail(path, target):
        if path.name == folder.name and path.parent != folder.parent:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        run_script(export, checkpoint, "--to", "hf", "--no_measure")
    assert end.value.code == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before


def test_pretraining_is_refused(run_script, tmp_path, capsys):
    sizes = {"embed_dim": 32, "depth": 1, "dec_embed_dim": 64, "dec_depth": 1}
    model = models_arm.create_pretrain_model("arm_tiny_pz16", **sizes)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(SystemExit) as end:
        run_script(export, tmp_path / "a.pth", "--to", "hf", "--no_measure", "--encoder")
    assert end.value.code == 2
    assert "--to hf is for encoders of finetuning: take --to safetensors" in capsys.readouterr().err
