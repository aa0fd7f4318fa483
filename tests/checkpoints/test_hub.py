"""Names of checkpoints: paths, URLs and hf:// names, downloaded from `hub_server`."""

import json
import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import REPOSITORY, TINY_FINETUNE, end_of_torchrun
from hub_server import Server, sha256
from safetensors.torch import save_file

from Finetuning import main_finetune
from models_arm import create_classifier
from util.checkpoints import checkpoint_file, inspection
from util.checkpoints.hub import beside, locate
from util.errors import UserError

OLD, NEW = "1" * 40, "2" * 40  # commits
BIG = bytes(range(256)) * 8192  # 2 MiB
HUGE = BIG * 12  # huggingface_hub keeps an interrupted download in steps of 10 MB


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def cached(tmp_path):
    """Return all files but locks in torch.hub's cache."""
    return [file for file in (tmp_path / "torch/hub/checkpoints").glob("*") if file.suffix != ".lock"]


# a process of its own, because huggingface_hub reads its environment when it is imported; hf:// must not need torch
DRIVER = """
import json, sys
from util.errors import UserError
from util.checkpoints.hub import locate
for name in sys.argv[1:]:
    try:
        path = locate(name)[0]
        print(json.dumps([str(path), path.read_bytes()[:20].decode("latin1")]))
    except UserError as error:
        print(json.dumps(str(error)))
assert "torch" not in sys.modules
"""


def on_the_hub(endpoint, home, *names, **environment):
    """Return [path, first bytes of the file] or the message for each name, and the log, of a new process."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    command = [sys.executable, "-c", DRIVER, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture
def hub(server):
    files = {"w.pth": b"new weights", "sub/v.safetensors": b"more", "README.md": b"text", "half.pth": HUGE}
    server.repositories["arm/base"] = {
        "main": (NEW, {**files, "lie.pth": b"changed on the way"}),
        "v1": (OLD, {"w.pth": b"old weights"}),
    }
    server.repositories["arm/text"] = {"main": (NEW, {"README.md": b"text"})}
    server.etags["/arm/base/resolve/main/lie.pth"] = sha256(b"as uploaded")
    server.faults |= {
        "/arm/base/resolve/main/half.pth": "half",
        "/arm/base/resolve/main/broken.pth": 500,
        "/arm/base/resolve/main/forbidden.pth": 403,
    }
    return server


def test_hub_files(hub, tmp_path):
    """Downloads, the cache, revisions, hashes, and an interrupted download that is resumed."""
    right, wrong = sha256(b"new weights"), sha256(b"other weights")
    results, _ = on_the_hub(
        hub.url,
        tmp_path,
        "hf://arm/base/w.pth",
        "hf://arm/base/w.pth",
        "hf://arm/base@v1/w.pth",
        f"hf://arm/base/w.pth#sha256={right.upper()}",
        f"hf://arm/base/w.pth#sha256={wrong}",
        "hf://arm/base/sub/v.safetensors",
        "hf://arm/base/half.pth",
        "hf://arm/base/lie.pth",
    )
    first, second, old, hashed, other, sub, half, lie = results
    assert first[1] == "new weights"
    assert second == hashed == first
    assert old[1] == "old weights"
    assert len(hub.bodies("main/w.pth")) == 1
    assert other == f"hf://arm/base/w.pth: its sha256 is {right}, not {wrong}"
    assert sub[0].endswith("sub/v.safetensors")
    with open(half[0], "rb") as file:
        assert file.read() == HUGE
    assert re.fullmatch(r"bytes=\d+-", hub.bodies("half.pth")[1])
    told = f"its sha256 is {sha256(b'changed on the way')}, not {sha256(b'as uploaded')}: removed"
    assert lie == f"hf://arm/base/lie.pth: {told}"
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.read_bytes() == b"changed on the way"]
    assert os.path.exists(first[0])


def test_mistakes_in_hub_names(hub, tmp_path):
    """Each gives one line that says what is wrong, without a long wait."""
    start = time.monotonic()
    results, _ = on_the_hub(
        hub.url,
        tmp_path,
        "hf://arm/base@v9/w.pth",
        "hf://arm/base@v9",
        "hf://arm/base/x.pth",
        "hf://arm/base",
        "hf://arm/base@v1/",
        "hf://arm/text",
        "hf://arm/none/w.pth",
        "hf://arm/none",
        "hf://arm/gated/w.pth",
        "hf://arm/base/forbidden.pth",
        "hf://arm/base/broken.pth",
        "hf://arm",
        "hf://arm/base/w.pth#sha256=12",
        "hf://arm/base--b/w.pth",
        "hf://arm/base/../../../w.pth",
        "hf://arm/base//w.pth",
        "hf://arm/base@a%2F..%2Fb/w.pth",
    )
    assert time.monotonic() - start < 20
    offers = "arm/base has w.pth, sub/v.safetensors, half.pth, lie.pth"
    absent = "there is no such repository, or it is private: then `hf auth login` or set HF_TOKEN"
    *results, invalid, above, absolute, revision = results
    assert invalid.startswith("hf://arm/base--b/w.pth: Cannot have -- or ..")
    assert above.startswith("hf://arm/base/../../../w.pth")
    assert absolute.startswith("hf://arm/base//w.pth")
    assert revision == "hf://arm/base@a%2F..%2Fb/w.pth: arm/base has no revision a/../b"
    assert "\n" not in invalid + above + absolute
    assert results == [
        "hf://arm/base@v9/w.pth: arm/base has no revision v9",
        "hf://arm/base@v9: arm/base has no revision v9",
        f"hf://arm/base/x.pth: no such file; {offers}",
        f"hf://arm/base names no file; {offers}",
        "hf://arm/base@v1/ names no file; arm/base has w.pth",
        "hf://arm/text names no file; arm/text has no weights among its 1 files",
        f"hf://arm/none/w.pth is not in the cache, and {absent}",
        f"hf://arm/none is not in the cache, and {absent}",
        "hf://arm/gated/w.pth is not in the cache, and the repository is gated: ask for access on its page, then "
        "`hf auth login` or set HF_TOKEN",
        f"hf://arm/base/forbidden.pth is not in the cache, and {hub.url} answers 403 Forbidden",
        f"hf://arm/base/broken.pth is not in the cache, and {hub.url} answers 500 Internal Server Error",
        "hf://arm: the form is hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE",
        "hf://arm/base/w.pth#sha256=12: a sha256 has 64 hexadecimal digits",
    ]


@pytest.mark.parametrize("absence", ["offline", "refused", "silent"])
def test_cache_without_a_hub(hub, tmp_path, absence):
    """The cached file is used if the hub is switched off, unreachable or silent; other names fail soon."""
    names = ["hf://arm/base/w.pth", "hf://arm/base@v1/w.pth"]
    online, _ = on_the_hub(hub.url, tmp_path, *names)
    before = len(hub.requests)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # listens, never accepts
        endpoint = {"offline": hub.url, "refused": "http://127.0.0.1:1"}.get(
            absence, f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        offline = {"HF_HUB_OFFLINE": "1"} if absence == "offline" else {"HF_HUB_ETAG_TIMEOUT": "1"}
        start = time.monotonic()
        (*found, none), stderr = on_the_hub(endpoint, tmp_path, *names, "hf://arm/base/sub/v.safetensors", **offline)
    assert time.monotonic() - start < 20
    assert len(hub.requests) == before
    assert found == online
    assert "hf://arm/base/w.pth is taken from the cache" in stderr
    why = "HF_HUB_OFFLINE is set" if absence == "offline" else f"{endpoint} cannot deliver it: "
    assert none.startswith(f"hf://arm/base/sub/v.safetensors is not in the cache, and {why}")
    assert "\n" not in none


@pytest.mark.parametrize("status", [403, 500])
def test_cache_after_an_error_of_the_hub(hub, tmp_path, status):
    """The cached file is used if the hub has an internal error, not if it refuses permission."""
    name = "hf://arm/base/w.pth"
    (online,), _ = on_the_hub(hub.url, tmp_path, name)
    hub.faults["/arm/base/resolve/main/w.pth"] = status
    (again,), stderr = on_the_hub(hub.url, tmp_path, name)
    if status == 500:
        assert again == online
        assert "is taken from the cache" in stderr
    else:
        assert again == f"{name}: {hub.url} answers 403 Forbidden"


def test_results_go_beside_the_weights():
    assert beside("out/checkpoint-best.pth") == Path("out/checkpoint-best.pth")
    for name in ("https://host/a/w.pth?download=1", "hf://o/r/sub/w.pth", "hf://o/r@v1/w.pth#sha256=" + 64 * "0"):
        assert beside(name) == Path("w.pth")


def test_url_is_downloaded_once(server, tmp_path):
    server.files |= {"/a/w.pth": BIG, "/b/w.pth": b"another w.pth"}
    path = locate(f"{server.url}/a/w.pth")[0]
    assert path.read_bytes() == BIG
    assert path.name.endswith("w.pth")
    requests = len(server.requests)
    assert locate(f"{server.url}/a/w.pth#sha256={sha256(BIG)}")[0] == path
    assert len(server.requests) == requests
    assert locate(f"{server.url}/b/w.pth?download=1")[0].read_bytes() == b"another w.pth"
    assert len(cached(tmp_path)) == 2


def test_damaged_download(server, tmp_path):
    """Without a sha256, the CRCs of the archive show the damage; the message names the file to delete."""
    content = BytesIO()
    torch.save({"x": torch.arange(1000.0)}, content)
    data = bytearray(content.getvalue())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 5] ^= 1
    server.files["/w.pth"] = bytes(data)
    with pytest.raises(checkpoint_file.DamagedCheckpoint, match=r"data/0 is damaged: it has another CRC-32$") as caught:
        checkpoint_file.read(f"{server.url}/w.pth")
    (path,) = cached(tmp_path)
    assert f"checkpoint {server.url}/w.pth (delete {path} to fetch it again): " in str(caught.value)
    path.unlink()
    server.files["/w.pth"] = content.getvalue()
    assert torch.equal(checkpoint_file.read(f"{server.url}/w.pth")["x"], torch.arange(1000.0))


def test_cached_url_needs_no_server(server):
    server.files["/w.pth"] = b"weights"
    path = locate(f"{server.url}/w.pth")[0]
    server.shutdown()
    server.server_close()
    assert locate(f"{server.url}/w.pth")[0] == path
    with pytest.raises(UserError, match=r"other\.pth is not in the cache, and cannot be fetched: .*Connection refused"):
        locate(f"{server.url}/other.pth")


@pytest.mark.parametrize("fault", ["half", "half, no ranges"])
def test_truncated_transfer(server, tmp_path, fault):
    """Nothing of it is kept; the next attempt downloads everything."""
    server.files["/w.pth"] = BIG
    server.faults["/w.pth"] = fault
    with pytest.raises(UserError, match=f"the transfer ended after {len(BIG) // 2} of {len(BIG)} bytes: try again"):
        locate(f"{server.url}/w.pth")
    assert not cached(tmp_path)
    server.faults["/w.pth"] = "no ranges"
    assert locate(f"{server.url}/w.pth")[0].read_bytes() == BIG


def test_leftovers_of_a_killed_process_are_removed(server, tmp_path):
    server.files["/w.pth"] = BIG
    server.faults["/w.pth"] = "half, then silent"
    process = multiprocessing.get_context("fork").Process(target=locate, args=(f"{server.url}/w.pth",))
    process.start()
    while not any(file.stat().st_size for file in cached(tmp_path)):
        time.sleep(0.05)
    process.kill()
    process.join()
    assert cached(tmp_path)
    server.faults.clear()
    path = locate(f"{server.url}/w.pth")[0]
    assert cached(tmp_path) == [path]


def test_mistakes_are_found_before_the_lock(server):
    """All processes find them at the same time, so that rank 0 can print them."""
    server.files["/w.pth"] = BIG
    path = locate(f"{server.url}/w.pth")[0]
    path.unlink()
    server.faults["/w.pth"] = 404
    with FileLock(f"{path}.lock"), pytest.raises(UserError, match="answers 404 Not Found"):
        locate(f"{server.url}/w.pth")


def test_full_disk(server, tmp_path):
    """Simulated by a limit on the size of files."""
    server.files["/w.pth"] = BIG
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BIG) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"/w\.pth is not in the cache, and cannot be fetched: .*File too large"):
            locate(f"{server.url}/w.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not cached(tmp_path)


def test_wrong_hash_of_a_url(server, tmp_path):
    """A wrong download is removed. A wrong file in the cache is replaced once a download has the right hash."""
    url, wrong = f"{server.url}/w.pth", sha256(b"wanted")
    server.files["/w.pth"] = b"found"
    message = f"its sha256 is {sha256(b'found')}, not {wrong}: removed"
    with pytest.raises(UserError, match=message):
        locate(f"{url}#sha256={wrong}")
    assert not cached(tmp_path)
    path = locate(url)[0]
    with pytest.raises(UserError, match=message):
        locate(f"{url}#sha256={wrong}")
    assert path.read_bytes() == b"found"
    server.files["/w.pth"] = b"wanted"
    assert locate(f"{url}#sha256={wrong}")[0].read_bytes() == b"wanted"


@pytest.mark.parametrize(
    ("fault", "message"),
    [(404, "answers 404 Not Found"), (500, "answers 500 Internal"), (401, "answers 401"), (403, "answers 403")],
)
def test_refusals_of_a_url(server, fault, message, run_script, capsys):
    server.faults["/w.pth"] = fault
    with pytest.raises(SystemExit) as ended:
        run_script(main_finetune, "--eval", "--resume", f"{server.url}/w.pth", "--data_path", "nowhere")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{server.url}/w.pth is not in the cache, and the server {message}" in error


@pytest.mark.parametrize(
    "url", ["http://", "http://[x/w.pth", "http://127.0.0.1:x/w.pth", "https://a b/w.pth", "http://é/é"]
)
def test_invalid_urls(server, url):
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        locate(url)
    assert "\n" not in str(caught.value)


def test_silent_server(server, monkeypatch):
    """Silent from the beginning, or in the middle of a transfer."""
    monkeypatch.setattr("util.checkpoints.hub.TIMEOUT", 0.2)
    server.files["/w.pth"] = BIG
    server.faults["/w.pth"] = "half, then silent"
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url in (f"http://127.0.0.1:{silent.getsockname()[1]}", server.url):
            with pytest.raises(UserError, match=f"{url}/w.pth is not in the cache, and cannot be fetched: .*timed out"):
                locate(f"{url}/w.pth")
    assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


def test_one_process_downloads(server):
    """The others wait. Threads stand in for processes: the file lock treats them alike."""
    server.files["/w.pth"] = BIG
    server.faults["/w.pth"] = "slow"
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(locate(f"{server.url}/w.pth")[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(paths) == 4
    assert len(server.bodies("w.pth")) == 1


def test_hash_of_a_path(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"found")
    assert locate(f"{path}#sha256={sha256(b'found')}")[0] == locate(path)[0] == path
    with pytest.raises(UserError, match=f"its sha256 is {sha256(b'found')}, not {sha256(b'wanted')}$"):
        locate(f"{path}#sha256={sha256(b'wanted')}")
    assert path.exists()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    sizes = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_classes": 3}
    model = create_classifier("arm_tiny_pz16", **sizes)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_safetensors(classifier, tmp_path):
    """A bare state dict is read without the metadata of its file."""
    path = tmp_path / "w.safetensors"
    state = classifier.state_dict()
    save_file(state, path, metadata={"format": "pt", "model": "of the metadata"})
    content = checkpoint_file.read(path)
    assert content.keys() == state.keys()
    assert all(torch.equal(content[name], value) for name, value in state.items())
    assert checkpoint_file.weight_keys(content) == []
    assert inspection.weights(content).keys() == state.keys()
    for broken in (path.read_bytes()[:-9], b"", b"not safetensors"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"unreadable checkpoint .*w\.safetensors"):
            checkpoint_file.read(path)


def test_evaluation_by_name(hub, classifier, image_folder, tmp_path, run_script, capsys):
    """Two processes evaluate a file of the hub like a path; one of them downloads it."""
    path = tmp_path / "w.safetensors"
    save_file(classifier.state_dict(), path)
    hub.repositories["arm/base"]["main"][1]["w.safetensors"] = path.read_bytes()
    words = [*TINY_FINETUNE, "--eval", "--data_path", image_folder, "--resume"]
    run_script(main_finetune, *words, path)
    want = re.search(r"weights: top-1 .*", capsys.readouterr().out)[0]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    words += ["hf://arm/base/w.safetensors", "--output", tmp_path / "report"]
    done = end_of_torchrun("Finetuning/main_finetune.py", *words, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert want in done.stdout
    assert len(hub.bodies("w.safetensors")) == 1
