"""Measure how long the page takes in headless Chromium, beside onnxruntime in Python, and draw it.

    python demo/web/measure_page.py out_finetune_b/checkpoint-best.onnx photo.jpg --screenshot page.png

opens the page as a user does, classifies the pictures in turns with onnxruntime on one thread, and compares the logits.
Chromium is controlled through a pipe, by the Chrome DevTools Protocol; it reaches nothing but this machine.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from util import arguments, cli, hardware
from util.data.decode import BrokenImage, with_pillow
from util.errors import RunError, UserError, as_user_error
from util.files import figure_of, output_file, printable, read_json, replacing

FOLDER = Path(__file__).resolve().parent
PAGE = "index.html", "page.js", "classifier.js"
RUNTIME = "node_modules/onnxruntime-web/dist/ort.wasm.min.mjs"
TITLE = "ARM in a browser"  # of the picture
NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
WIDTH = 860  # of the picture in pixels
SECONDS = 60  # to wait for an answer of Chromium
IDLE = 'document.querySelector("[aria-busy]")?.ariaBusy === "false"'
# Functions that stay in the page: each takes the name of a file of its server.
OPEN = """
import("./classifier.js").then(({ open, classify }) => {
  const get = async (name) => new File([await (await fetch(name)).blob()], name);
  globalThis.openModel = async (name) => {
    const files = [await get(name), await get(name.replace(/onnx$/, "json"))];
    const start = performance.now();
    globalThis.model = await open(...files);
    return performance.now() - start;
  };
  globalThis.classifyPicture = async (name) => {
    const { logits, ...found } = await classify(model, await get(name));
    return { logits: [...logits], ...found };
  };
})
"""


def find_chromium() -> str:
    """Return the path of Chromium or Chrome; raise UserError if none is on the PATH."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise UserError(f"no Chromium on the PATH: {', '.join(NAMES)}")
    return found


class Tab:
    """A page in Chromium: calls of the DevTools Protocol, and what it has reported meanwhile (`events`)."""

    def __init__(self, to: int, answers: int, log: Path) -> None:
        self.to, self.answers, self.log = to, answers, log
        self.received, self.sent = b"", 0
        self.session: dict[str, str] = {}
        self.events: list[dict] = []
        pages = [of for of in self.call("Target.getTargets")["targetInfos"] if of["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **parameters: object) -> dict:
        """Return the result of a command; raise RunError if Chromium refuses it, ends or does not answer."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.sent:
            self.events.append(answer)
        if "error" in answer:
            raise RunError(f"Chromium refuses {method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self.received:
            ready = select.select([self.answers], [], [], SECONDS)[0]
            block = os.read(self.answers, 1 << 16) if ready else b""
            if not block:
                last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise RunError(f"Chromium has {'ended' if ready else f'not answered for {SECONDS} s'}: {last}")
            self.received += block
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """Return the value of JavaScript, of a promise what it is kept with; raise RunError with its exception."""
        got = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got:
            thrown = got["exceptionDetails"].get("exception", {}).get("description", "JavaScript has failed")
            raise RunError(thrown.partition("\n")[0])
        return got["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until JavaScript is true; raise RunError if that takes too long."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(f"new Promise((f) => setTimeout(() => f(Boolean({condition})), 10))"):
            if time.monotonic() > end:
                raise RunError(f"{condition} is not true after {SECONDS} s: {self.text()}")

    def open(self, address: str) -> None:
        """Load a page, and wait for what its address asks for."""
        self.call("Page.navigate", url=address)
        self.until(f"location.href === {json.dumps(address)} && {IDLE}")

    def text(self) -> str:
        """Return what the page shows."""
        return self.evaluate("document.body.innerText")

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files as a user does, and wait until they are done."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        changed = f'new Promise((done) => document.querySelector("{selector}").addEventListener("change", done))'
        self.evaluate(f"globalThis.changed = {changed}; 0")
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.resolve()) for file in files])
        self.evaluate("changed.then(() => 0)")
        self.until(IDLE)

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        for height in ("1", "document.documentElement.scrollHeight"):
            size = {"width": WIDTH, "height": self.evaluate(height)}
            self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """Let Chromium end."""
        self.session = {}
        with suppress(RunError):
            self.call("Browser.close")
            while True:
                self._receive()


@contextmanager
def chromium(program: str) -> Iterator[Tab]:
    """Start a headless Chromium that reaches only this machine; end it and remove its profile afterwards."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as home, ExitStack() as pipes:

        def pipe() -> list[int]:
            """Return both ends, above the numbers that Chromium gives a meaning."""
            ends = []
            for low in os.pipe():
                ends.append(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10))
                os.close(low)
            return ends

        (theirs, to), (answers, theirs_too) = pipe(), pipe()
        for end in (to, answers):
            pipes.callback(os.close, end)
        # its sandbox is not available everywhere, and the only page is our own
        flags = ["--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={home}/profile"]
        flags += ["--no-first-run", "--disable-breakpad", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        opened: list[Any] = [(os.POSIX_SPAWN_DUP2, theirs, 3), (os.POSIX_SPAWN_DUP2, theirs_too, 4)]
        opened += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)]
        log = Path(home, "stderr")
        opened.append((os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT, 0o600))
        variables = {**os.environ, "HOME": home, "TMPDIR": home}
        pid = os.posix_spawn(program, [program, *flags, "about:blank"], variables, file_actions=opened, setpgroup=0)
        try:
            for end in (theirs, theirs_too):
                os.close(end)
            tab = Tab(to, answers, log)
            yield tab
            tab.close()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Handler(SimpleHTTPRequestHandler):
    """Serves files in silence."""

    def log_message(self, format: str, *values: object) -> None:
        """Print nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder to this machine, as `python -m http.server` does; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def site(*files: Path) -> Iterator[Path]:
    """Make a folder with links to the page, its packages, and other files; remove it afterwards.

    Raises:
        UserError: a file is missing or has the name of another one, or onnxruntime-web is not installed.
    """
    if not (FOLDER / RUNTIME).is_file():
        raise UserError(f"onnxruntime-web is missing: npm install --prefix {printable(FOLDER)}")
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        for file in (*(FOLDER / name for name in (*PAGE, "node_modules")), *files):
            if not file.exists():
                raise UserError(f"no file {printable(file)}")
            try:
                Path(folder, file.name).symlink_to(file.resolve())
            except FileExistsError as error:
                raise UserError(f"two files have the name {printable(file.name)}") from error
        yield Path(folder)


def measure(tab: Tab, model: Path, pictures: list[Path], rounds: int) -> dict:
    """Return milliseconds of the page and of Python, in turns, and how far their logits are apart.

    Raises:
        UserError: the model or a picture cannot be read.
        RunError: the page does not work.
    """
    from Evaluation.opened_models import open_model  # imported here, as it imports torchvision and timm

    opened = open_model(str(model), torch.device("cpu"))
    prepared = opened.preparation
    tab.evaluate(OPEN)
    loaded = tab.evaluate(f"openModel({json.dumps(model.name)})")
    times: dict[str, list[float]] = {"prepared": [], "classified": [], "classified_in_python": []}
    furthest, largest = 0.0, 0.0
    for picture in [picture for _ in range(rounds) for picture in pictures]:
        with as_user_error(BrokenImage, OSError, prefix=f"{printable(picture)}: "):
            imgs = prepared.recipe()(with_pillow(picture.read_bytes(), prepared.pixels))[None]
        start = time.perf_counter()
        (want,) = opened.compute(imgs).tolist()
        times["classified_in_python"].append(1000 * (time.perf_counter() - start))
        found = tab.evaluate(f"classifyPicture({json.dumps(picture.name)})")
        times["prepared"].append(found["prepared"])
        times["classified"].append(found["computed"])
        furthest = max(furthest, *(abs(a - b) for a, b in zip(want, found["logits"], strict=True)))
        largest = max(largest, *map(abs, want))
    spread = {name: {"median": statistics.median(of), "min": min(of), "max": max(of)} for name, of in times.items()}
    logits = {"largest": largest, "largest_difference": furthest}
    return {"input_size": [prepared.pixels.channels, *prepared.size], "loaded": loaded, **spread, "logits": logits}


def main(args: argparse.Namespace) -> None:
    """Measure, print and write the result; draw the page.

    Raises:
        UserError: Chromium, a package or a file is missing, or an output cannot be written.
        RunError: the page does not work, or an output cannot be written.
    """
    program, model = find_chromium(), args.onnx
    if model.suffix != ".onnx":
        raise UserError(f"{printable(model)} is no .onnx file: tools/export.py --to onnx writes one")
    torch.set_num_threads(1)
    machine = hardware.describe(torch.device("cpu"))
    output = hardware.result_file("web", machine, args.output)
    if args.screenshot:
        output_file(args.screenshot, figure_of(TITLE), flag="--screenshot")
    files = [model, model.with_suffix(".json"), *args.pictures]
    with site(*files) as folder, served(folder) as address, chromium(program) as tab:
        tab.open(f"{address}/index.html")
        found = measure(tab, model, args.pictures, args.rounds)
        print_result(model, found)
        if args.screenshot:
            tab.open(f"{address}/index.html?model={quote(model.name)}")
            tab.choose("#pictures", *args.pictures)
            save_png(tab.screenshot(), args.screenshot)
        versions = {"browser": tab.call("Browser.getVersion")["product"], "onnxruntime_web": runtime_version()}
    about = {"model": model.name, "model_bytes": model.stat().st_size, "rounds": args.rounds}
    hardware.write(output, {**machine, **versions, **about, **found})


def print_result(model: Path, found: dict) -> None:
    """Print times and differences."""
    print(f"{printable(model.name)} is open after {found['loaded']:.0f} ms")
    for name in ("prepared", "classified", "classified_in_python"):
        middle, low, high = (found[name][key] for key in ("median", "min", "max"))
        print(f"{name.replace('_', ' '):<{hardware.WIDTH}}{middle:.1f} ms ({low:.1f} to {high:.1f})")
    print("logits differ by at most {largest_difference:.2g} where they reach {largest:.2g}".format(**found["logits"]))


def runtime_version() -> str:
    """Return the version of onnxruntime-web that is installed."""
    return cast(dict, read_json(FOLDER / "node_modules/onnxruntime-web/package.json"))["version"]


def save_png(content: bytes, path: Path) -> None:
    """Write a PNG with a title, by which a later run knows it; raise RunError if that fails."""
    title = PngInfo()
    title.add_text("Title", TITLE)
    try:
        with replacing(path) as temporary:
            Image.open(BytesIO(content)).convert("RGB").quantize().save(temporary, "PNG", pnginfo=title, optimize=True)
    except OSError as error:
        raise RunError(f"--screenshot {printable(path)} cannot be written: {error.strerror}") from error


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("measure_page.py", description=__doc__.splitlines()[0])
    parser.add_argument("onnx", type=Path, metavar="ONNX", help="of tools/export.py, with its JSON file beside it")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="to classify")
    parser.add_argument("--rounds", type=arguments.positive, default=20, help="of all pictures (default: %(default)s)")
    parser.add_argument("--screenshot", type=Path, metavar="PNG", help="draw the page with the pictures")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results/)")
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
