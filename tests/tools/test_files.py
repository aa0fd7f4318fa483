"""Small files: atomic writes, strict JSON, no writing through links."""

import json
import os

import pytest

from util.errors import UserError
from util.files import MAX_JSON, open_lock, printable, read_json, replacing, to_json, write_json


def test_names_are_printable():
    assert printable("plain name.jpg") == "plain name.jpg"
    assert printable("Käse.jpg") == "Käse.jpg"
    assert printable(b"caf\xe9") == "caf\\xe9"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("\ud800") == "\\ud800"
    assert printable("two\nlines\x1b[31m") == "two\\nlines\\x1b[31m"


def test_json_is_strict(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"loss": float("nan"), "rest": [1.5, float("inf"), (2, None)], "name": os.fsdecode(b"\xe9")})
    assert json.loads(path.read_text(encoding="ascii"), parse_constant=pytest.fail) == {
        "loss": None,
        "rest": [1.5, None, [2, None]],
        "name": "\udce9",
    }
    assert to_json([float("-inf")]) == "[null]"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"1" * 5000, "damaged"),
        (b" " * (MAX_JSON + 1), "larger than"),
    ],
)
def test_invalid_json_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        read_json(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_is_replaced_and_never_followed(tmp_path):
    target, link = tmp_path / "other", tmp_path / "link"
    target.write_text("other")
    link.symlink_to(target)
    with pytest.raises(OSError, match="link"):
        open_lock(link)
    write_json(link, 1)
    assert target.read_text() == "other"
    assert not link.is_symlink()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="no regular file"):
        open_lock(tmp_path / "fifo")
    with open_lock(tmp_path / "lock") as file:
        file.write("held")
    with open_lock(tmp_path / "lock") as file:
        assert file.read() == "held"
