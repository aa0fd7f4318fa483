"""The page of demo/web in headless Chromium: it computes Python's pixels and logits, and shows them and mistakes."""

import argparse
import hashlib
import json
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import encoded, relative_error
from PIL import Image

import models_arm
import pretrained
from demo.web import measure_page
from tools import export
from util.data.decode import with_pillow
from util.data.pixels import Pixels
from util.data.transforms import eval_transform
from util.errors import UserError

NAMES = ["<b>cat</b>", "Käse", ""]  # the third class has no name
NPM = "npm install --ignore-scripts --no-audit --no-fund --no-package-lock --fetch-retries 0 --loglevel error".split()
TURN = Image.Exif()
TURN[0x0112] = 6  # a quarter to the right

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder with the page and its packages: the user's, or those that npm installs for these tests."""
    folder, own = tmp_path_factory.mktemp("web"), measure_page.FOLDER
    for name in (*measure_page.PAGE, "package.json"):
        (folder / name).symlink_to(own / name)
    if (own / measure_page.RUNTIME).is_file():
        (folder / "node_modules").symlink_to(own / "node_modules")
    elif shutil.which("npm") is None:
        pytest.skip("onnxruntime-web is not installed in demo/web, and there is no npm")
    else:  # with the user's settings of npm
        variables = {**os.environ, "HOME": pwd.getpwuid(os.getuid()).pw_dir}
        command = [*NPM, "--cache", folder / "cache"]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install onnxruntime-web: {' '.join(done.stderr.split())[:200]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_page, "FOLDER", folder)
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of a classifier that turns pictures as EXIF says, and its ONNX file."""
    path = tmp_path_factory.mktemp("model") / "model.pth"
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "patch_size": 8}
    classifier = models_arm.create_classifier("arm_tiny_pz16", num_classes=3, img_size=(48, 32), **sizes)
    torch.nn.init.normal_(classifier.head.weight)
    saved = {"input_size": [48, 32], "global_pool": True, "class_names": NAMES, **sizes}
    saved |= Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), exif=True).arguments()
    torch.save({"model": classifier.state_dict(), "args": argparse.Namespace(**saved)}, path)
    args = export.get_args_parser().parse_args([str(path), "--to", "onnx"])
    export.main(args)
    return path.with_suffix(".onnx")


@pytest.fixture(scope="module")
def browser(web, model):
    """Chromium with an open page, the page's address, and the folder from which it is served."""
    try:
        program = measure_page.find_chromium()
    except UserError as error:
        pytest.skip(str(error))
    with (
        measure_page.site(model, model.with_suffix(".json")) as folder,
        measure_page.served(folder) as address,
        measure_page.chromium(program) as tab,
    ):
        for domain in ("Network", "Log", "Runtime"):
            tab.call(f"{domain}.enable")
        tab.open(f"{address}/index.html")
        yield SimpleNamespace(tab=tab, address=address, folder=folder)


def noise(height=37, width=53):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def content_of(kind, photograph):
    """The content of an image file."""
    if kind.startswith("turned"):
        return encoded(photograph, kind.split()[1], exif=TURN)
    if kind == "transparent":
        return encoded(Image.merge("RGBA", [*photograph.split(), photograph.convert("L")]), "PNG")
    made = {"noise": noise(), "grey": photograph.convert("L"), "palette": photograph.quantize(50)}
    return encoded(made[kind], "PNG") if kind in made else encoded(photograph, kind, lossless=True)


@pytest.mark.parametrize(
    ("kind", "size", "channels", "exif"),
    [
        ("PNG", (48, 32), 3, False),
        ("PNG", (40, 52), 3, False),  # margins of 2.5 and 3.5 pixels
        ("PNG", (240, 232), 3, False),  # not cropped
        ("noise", (64, 80), 3, False),  # enlarged
        ("PNG", (48, 48), 1, False),
        ("grey", (48, 48), 3, False),
        ("palette", (48, 48), 3, False),
        ("turned PNG", (48, 32), 3, True),
        ("turned PNG", (48, 32), 3, False),
        ("turned JPEG", (48, 32), 3, True),
        ("turned JPEG", (48, 32), 3, False),
        ("WEBP", (48, 32), 3, False),
    ],
)
def test_pixels_are_pillow_s(browser, photographs, kind, size, channels, exif):
    """Those of a JPEG may differ by 2 of 255, where the browser's decoder is another one."""
    content = content_of(kind, photographs[0])
    (browser.folder / "picture").write_bytes(content)
    share = 0.875 if max(size) <= 224 else 1
    given = json.dumps({"input_size": [channels, *size], "crop_pct": share})
    found, transparent = browser.tab.evaluate(
        f"""import("./classifier.js").then(async ({{ readPixels }}) => {{
            const file = await (await fetch("picture", {{ cache: "no-store" }})).blob();
            const {{ pixels, transparent }} = await readPixels(file, {given}, {json.dumps(exif)});
            return [[...pixels], transparent];
        }})"""
    )
    pixels = Pixels((0.0,) * channels, (1.0,) * channels, channels, exif)
    want = 255 * eval_transform(size, "square", pixels)(with_pillow(content, pixels)).permute(1, 2, 0)
    difference = torch.tensor(found) - want.round().flatten()
    assert difference.abs().max() <= (2 if "JPEG" in kind else 0)
    assert transparent is False


def python_logits(model, content):
    found = pretrained.read(str(model.with_suffix(".pth")), None, [])
    with torch.no_grad():
        return found.load_model(scan_backend="torch").eval()(found.read_image(content)[None])[0]


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 1e-5), ("turned PNG", 1e-5), ("JPEG", 1e-2), ("grey", 1e-5)])
def test_logits_are_python_s(browser, model, photographs, kind, tolerance):
    content = content_of(kind, photographs[1])
    (browser.folder / f"picture-{kind}").write_bytes(content)
    browser.tab.evaluate(measure_page.OPEN)
    browser.tab.evaluate(f"openModel({json.dumps(model.name)})")
    logits = browser.tab.evaluate(f"classifyPicture({json.dumps(f'picture-{kind}')})")["logits"]
    assert relative_error(torch.tensor(logits), python_logits(model, content)) < tolerance


CARDS = """
[...document.querySelectorAll("article")].map((card) => [
  card.querySelector("h2").textContent,
  [...card.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent)),
  card.querySelector(".note").textContent,
  [card.querySelector("img").naturalWidth > 0, getComputedStyle(card.querySelector("img")).imageOrientation],
])
"""


def rows_of(logits):
    """The content of a picture's table."""
    shares = logits.softmax(0)
    names = [name or f"class {label}" for label, name in enumerate(NAMES)]
    return [[names[label], f"{100 * shares[label]:.1f} %"] for label in logits.argsort(descending=True).tolist()]


@pytest.fixture
def opened(browser, model):
    """The browser with the page and the model that its address names."""
    browser.tab.events.clear()
    browser.tab.open(f"{browser.address}/index.html?model={model.name}")
    return browser


def test_the_page_shows_classes_and_times(opened, model, photographs, tmp_path):
    """It says nothing on the console, and asks no other server for anything."""
    tab = opened.tab
    assert re.search(r"\nmodel\.onnx: 32 × 48 pixels, 3 classes, 0\.\d MB, loaded in \d+\.\d s\. Choose,", tab.text())
    contents = {"one.png": content_of("turned PNG", photographs[0]), "two.png": content_of("PNG", photographs[1])}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    tab.choose("#pictures", *(tmp_path / name for name in contents))
    cards = {name: [rows, note, image] for name, rows, note, image in tab.evaluate(CARDS)}
    assert list(cards) == ["two.png", "one.png"]  # the last one is at the top
    for name, (rows, note, image) in cards.items():
        assert rows == rows_of(python_logits(model, contents[name]))
        assert re.fullmatch(r"Prepared in \d+ ms, classified in \d+ ms\.", note)
        assert image == [True, "from-image"]
    asked = [
        event["params"]["request"]["url"] for event in tab.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert f"{opened.address}/model.onnx" in asked
    assert [url for url in asked if not url.startswith((opened.address, "blob:", "data:"))] == []
    said = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in tab.events if event["method"] in said] == []


DROP = 'new DragEvent("drop", { dataTransfer })'
PASTE = 'new ClipboardEvent("paste", { clipboardData: dataTransfer })'


@pytest.mark.parametrize("event", [DROP, PASTE])
def test_pictures_are_dropped_and_pasted(opened, model, photographs, event):
    """The last one is transparent: the page says that it is not what Python reads."""
    contents = {kind: content_of(kind, photographs[0]) for kind in ("PNG", "transparent")}
    for kind, content in contents.items():
        (opened.folder / f"given-{kind}").write_bytes(content)
    opened.tab.evaluate(
        f"""(async () => {{
            const dataTransfer = new DataTransfer();
            for (const kind of {json.dumps([*contents])}) {{
              dataTransfer.items.add(new File([await (await fetch(`given-${{kind}}`)).blob()], kind));
            }}
            dispatchEvent({event});
        }})()"""
    )
    opened.tab.until(measure_page.IDLE)
    (_, _, note, _), (_, rows, _, _) = opened.tab.evaluate(CARDS)
    assert rows == rows_of(python_logits(model, contents["PNG"]))
    assert note.endswith("Parts of it are transparent: a browser loses their colours, which Python would classify.")


def test_controls_have_names(opened):
    """Screen readers read them, and each can be reached with the keyboard."""
    nodes = [node for node in opened.tab.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {node["name"]["value"]: node for node in nodes if node["role"]["value"] == "button"}
    assert [name.partition(":")[0] for name in named] == ["Model", "Pictures"]
    for node in named.values():
        assert {"name": "focusable", "value": {"type": "booleanOrUndefined", "value": True}} in node["properties"]


def changed(about, **values):
    return json.dumps({**about, **values})


def changed_input(about, **values):
    return changed(about, pretrained_cfg={**about["pretrained_cfg"], **values})


WRONG = {  # message: content of the .json file
    "model.json is no JSON file.": lambda about: "{",
    "model.json does not describe a model: take the one that tools/export.py wrote": lambda about: "[]",
    "describes x.onnx, and model.onnx has another content.": lambda about: changed(about, files={"x.onnx": "0"}),
    "the model is too large for a browser.": lambda about: changed(about, files={"model.onnx.data": "0"}),
    "model.onnx has no classes: export a classifier, without --encoder.": lambda about: changed(about, num_classes=0),
    "model.onnx finds objects: this page is for classifiers.": lambda about: changed(about, task="detection"),
    "model.onnx is for images of 4 channels;": lambda about: changed_input(about, input_size=[4, 48, 32]),
    "another resize than this page has: bicubic, center.": lambda about: changed_input(about, crop_mode="center"),
}


def test_a_model_that_does_not_fit(opened, model, tmp_path):
    """The page says why, and keeps the model that it has."""
    about = json.loads(model.with_suffix(".json").read_text())
    files = [tmp_path / "model.onnx", tmp_path / "model.json"]
    shutil.copy(model, files[0])
    for message, content in WRONG.items():
        files[1].write_text(content(about))
        opened.tab.choose("#models", *files)
        assert message in problem(opened)
        assert "3 classes" in opened.tab.text()
    opened.tab.choose("#models", files[0])
    assert problem(opened) == "A model is two files: choose or drop its .onnx file and its .json file together."
    files[1].write_text(json.dumps(about))
    opened.tab.choose("#models", *files)
    assert problem(opened) == ""


def problem(opened):
    return opened.tab.evaluate('document.querySelector("[role=alert]").textContent')


def test_a_damaged_model(opened, tmp_path, model):
    damaged, about = model.read_bytes()[:1000], json.loads(model.with_suffix(".json").read_text())
    (tmp_path / "model.onnx").write_bytes(damaged)
    (tmp_path / "model.json").write_text(changed(about, files={"model.onnx": hashlib.sha256(damaged).hexdigest()}))
    opened.tab.choose("#models", tmp_path / "model.onnx", tmp_path / "model.json")
    assert problem(opened).startswith("model.onnx cannot be opened as a model: ")


def test_files_that_cannot_be_classified(opened, tmp_path, photographs):
    """Those beside them are classified; the next choice removes the message."""
    (tmp_path / "text.png").write_text("no picture")
    noise(1, 32768).save(tmp_path / "wide.png")
    (tmp_path / "one.png").write_bytes(content_of("PNG", photographs[0]))
    opened.tab.choose("#pictures", *(tmp_path / f"{name}.png" for name in ("text", "wide", "one")))
    wrong = "text.png is no picture that the browser can decode.", "wide.png is wider than 32767 pixels."
    assert problem(opened) == "".join(wrong)
    assert [name for name, *_ in opened.tab.evaluate(CARDS)] == ["one.png"]
    opened.tab.choose("#pictures", tmp_path / "one.png")
    assert problem(opened) == ""


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("?model=none.onnx", "none.onnx cannot be read from this server: it answers 404."),
        ("?model=model.pth", "?model=model.pth names no .onnx file."),
        ("?model=http://192.0.2.1/model.onnx", "it answers nothing."),
    ],
)
def test_an_address_that_names_no_model(browser, address, message):
    browser.tab.open(f"{browser.address}/index.html{address}")
    assert problem(browser).endswith(message)
    assert "Choose a model, or drop its two files here." in browser.tab.text()


def test_a_picture_before_a_model(browser, photographs, tmp_path):
    (tmp_path / "one.png").write_bytes(content_of("PNG", photographs[0]))
    browser.tab.open(f"{browser.address}/index.html")
    browser.tab.choose("#pictures", tmp_path / "one.png")
    assert problem(browser) == "Choose a model before one.png."


def test_a_page_that_is_opened_as_a_file(browser):
    """Browsers load no modules then."""
    browser.tab.call("Page.navigate", url=f"file://{browser.folder}/index.html")
    browser.tab.until('document.readyState === "complete" && location.protocol === "file:"')
    assert "the page was opened as a file: it must come from a server." in browser.tab.text()


def test_without_the_packages(browser, model):
    (browser.folder / "bare").mkdir()
    for name in (*measure_page.PAGE, model.name, "model.json"):
        (browser.folder / "bare" / name).symlink_to(browser.folder / name)
    browser.tab.open(f"{browser.address}/bare/index.html?model={model.name}")
    assert problem(browser) == "onnxruntime-web is missing: run “npm install” in demo/web, and load this page again."


def test_measuring(browser, model, photographs, run_script, tmp_path, monkeypatch, capsys):
    """It draws the page, and leaves no process and no file behind."""
    picture, drawn = tmp_path / "one.png", tmp_path / "page.png"
    picture.write_bytes(content_of("PNG", photographs[0]))
    temporary = tempfile.mkdtemp()  # a short name, as Chromium makes a socket there
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    words = [model, picture, "--rounds", 2, "--output", tmp_path / "out.json", "--screenshot", drawn]
    run_script(measure_page, *words)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["model_bytes"] == model.stat().st_size
    assert found["onnxruntime_web"] in (measure_page.FOLDER / "package.json").read_text()
    assert found["logits"]["largest_difference"] < 1e-5 * found["logits"]["largest"]
    for name in ("prepared", "classified", "classified_in_python"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"] < 1000
    with Image.open(drawn) as page:
        assert (page.width, page.text) == (measure_page.WIDTH, {"Title": measure_page.TITLE})
        assert len(page.getcolors()) > 200  # the photograph is in it
    assert "model.onnx is open after" in capsys.readouterr().out
    Path(temporary).rmdir()  # nothing is left in it
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert [command for command in commands if temporary.encode() in command] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.onnx", "one.png"], "no file none.onnx"),
        (["model.onnx", "none.png"], "no file none.png"),
        (["model.onnx", "one.png"], "one.png: no image of a known format"),
        (["model.onnx", "one.png", "one.png"], "two files have the name one.png"),
        (
            ["model.onnx", "one.png", "--screenshot", "one.png"],
            "--screenshot one.png is there and is no earlier result",
        ),
        (["model.onnx", "one.png", "--rounds", "0"], "argument --rounds: 0 is not at least 1"),
    ],
)
def test_mistakes_of_measuring(browser, model, run_script, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("one.png").write_bytes(b"")
    Path("model.onnx").symlink_to(model)
    Path("model.json").symlink_to(model.with_suffix(".json"))
    with pytest.raises(SystemExit) as exit_info:
        run_script(measure_page, *words, "--output", "out.json")
    assert exit_info.value.code == 2
    assert re.fullmatch(rf"measure_page\.py: error: {re.escape(message)}.*\n", capsys.readouterr().err)


def test_measuring_without_chromium(run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        run_script(measure_page, "model.onnx", "one.png")
    assert capsys.readouterr().err.startswith("measure_page.py: error: no Chromium on the PATH: chromium, ")


def test_measuring_without_the_packages(run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_page, "FOLDER", tmp_path)
    monkeypatch.setattr(measure_page, "find_chromium", lambda: "chromium")
    with pytest.raises(SystemExit):
        run_script(measure_page, "model.onnx", "one.png", "--output", tmp_path / "out.json")
    assert capsys.readouterr().err.startswith(
        "measure_page.py: error: onnxruntime-web is missing: npm install --prefix"
    )
