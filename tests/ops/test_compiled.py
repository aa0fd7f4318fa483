"""The C kernels: compiling them, and the cache of compiled files."""

import multiprocessing
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_helpers import assert_same, conv_inputs, public, random_order, scan_inputs

from ops.backends import compiled, cpu_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def load_at_once(barrier, results):
    cpu_backend.load.cache_clear()
    barrier.wait()
    kernels = cpu_backend.load()
    results.put((kernels._name, kernels.scan_groups(1)))


def test_concurrent_builds_give_one_file(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=load_at_once, args=(barrier, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = {results.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    (library,) = (tmp_path / "arm-ops").iterdir()  # and no leftovers
    assert found == {(str(library), 1)}
    built = library.stat().st_mtime_ns
    assert_same("selective_scan", public("selective_scan", "cpu"), scan_inputs())
    assert library.stat().st_mtime_ns == built  # found in the cache, not built again


def test_a_build_appears_atomically(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_here, built = cpu_backend._run, []

    def compile_and_look(command):
        output = run_here(command)
        if "-o" in command:
            assert not list((tmp_path / "arm-ops").glob("*.so"))
            built.append(os.stat(command[command.index("-o") + 1]).st_ino)
        return output

    monkeypatch.setattr(cpu_backend, "_run", compile_and_look)
    assert [os.stat(cpu_backend.load()._name).st_ino] == built  # the same file, renamed and not copied


def test_cache_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = compiled.private_folder().name
    assert cpu_backend.load()._name.startswith(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert str(compiled.cache_folder()) == folder


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "writable", "owner", "link", "fifo"])
def test_an_untrusted_or_damaged_compiled_file_is_built_again(damage, fresh, monkeypatch, tmp_path, caplog):
    """A truncated file would end the process with SIGBUS; a file that others can write could execute their code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = Path(cpu_backend.load()._name)
    content = path.read_bytes()
    # not written to in place: this process has it mapped
    os.rename(path, tmp_path / "loaded")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 16
    changed = {"truncated": content[:5000], "bit": flipped, "empty": b""}.get(damage, content)
    if damage == "link":
        path.symlink_to(tmp_path / "loaded")
    elif damage == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(changed)
        path.chmod(0o722 if damage == "writable" else 0o700)
    if damage == "owner":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(path, 12345, 12345)
    before = path.lstat().st_ino
    cpu_backend.load.cache_clear()
    assert cpu_backend.load()._name == str(path)
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert status.st_ino != before
    assert status.st_uid == os.geteuid()
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert path.read_bytes() == content
    (message,) = [line for line in caplog.messages if line.endswith(": built again")]
    assert message.startswith(f"{path} ")


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_can_write_is_not_used(mode, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "arm-ops").mkdir()
    (tmp_path / "arm-ops").chmod(mode)
    assert cpu_backend.load()._name.startswith(compiled.private_folder().name)
    assert not list((tmp_path / "arm-ops").iterdir())


def test_a_compiled_file_is_private_and_flushed_with_any_umask(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino) or fsync(descriptor)
    )
    before = os.umask(0)
    try:
        path = Path(cpu_backend.load()._name)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert flushed == [path.stat().st_ino]


def test_cache_tells_cpus_and_compilers_apart(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_here, here = cpu_backend._run, cpu_backend.load()._name
    cpu_backend.load.cache_clear()
    monkeypatch.setattr(
        cpu_backend, "_run", lambda command: run_here(command) + (b"#define __OTHER__ 1" if "-dM" in command else b"")
    )
    assert cpu_backend.load()._name != here


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 flags")
@pytest.mark.parametrize("cpu", ["x86-64", "haswell"])
def test_cpu_with_shorter_vectors(cpu, fresh, monkeypatch, tmp_path):
    if cpu == "haswell" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_backend, "NATIVE", f"-march={cpu}")
    for D in (3, 36):
        order = random_order(4, 37)
        assert_same("selective_scan", public("selective_scan", "cpu"), scan_inputs(D=D), order)
        assert_same("causal_conv1d", public("causal_conv1d", "cpu"), conv_inputs(D=D), order)
    assert len(list((tmp_path / "arm-ops").iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_run_on_the_threads_of_torch():
    script = """
import os, torch, ops
threads = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
x = torch.ones(1, 8, 2, 16)
before = threads()
ops.causal_conv1d(x[0], torch.ones(1, 16, 4), torch.ones(1, 16), backend="cpu")
kernel = threads()
torch.ones(1 << 22).exp()
print(kernel - before, threads() - kernel)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0"]  # three workers beside the caller, and torch uses the same
