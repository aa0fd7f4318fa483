"""List the files of a hub's repository or of a folder, and tell what each file of weights is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.checkpoints import checkpoint_file, hub, inspection
from util.errors import UserError, as_user_error
from util.files import printable, sha256_of, some

if TYPE_CHECKING:
    from pretrained import Checkpoint

KINDS = {"classification": "classifier", "pretraining": "encoder of pretraining"}
UNREADABLE, FOREIGN = "cannot be read", "is not of ARM"
SAVED = "max_accuracy", "ema_max_accuracy"  # top-1 in percent that finetuning wrote into a file


def listed(weights: str) -> tuple[str | None, dict[str, str], list[str]]:
    """Return the commit of a hub's repository, the name to open each file of weights by, and all other files.

    Raises:
        UserError: the folder or the repository cannot be listed.
    """
    if weights.startswith("hf://"):
        revision, files = hub.files(weights)
        repository = weights.partition("@")[0].rstrip("/")
        names = {file.name: f"{repository}@{revision}/{file.name}" for file in files}
    else:
        folder, revision = Path(weights), None
        if not folder.is_dir():
            raise UserError(f"{printable(weights)} is no folder and no hf://OWNER/REPO")
        with as_user_error(OSError):
            found = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {str(path.relative_to(folder)): str(path) for path in found}
    opened = {name: full for name, full in sorted(names.items()) if name.endswith(hub.WEIGHT_FILES)}
    if not opened:
        raise UserError(f"{printable(weights)} has no weights among its {len(names)} files")
    return revision, opened, sorted(set(names) - set(opened))


def describe(name: str, opened: str) -> tuple[dict, dict[str | None, Checkpoint]]:
    """Return what a file of weights is, and its weights by key; none with a `problem`.

    Args:
        name: of the file, in the table.
        opened: path or hf:// name.
    """
    import pretrained

    file: dict[str, Any] = {"file": printable(name), "sha256": "", "bytes": 0, "problem": "", "what": "",
        "left_out": []}  # fmt: skip
    found: dict[str | None, Checkpoint] = {}
    keys: list[str | None]
    kind, path = UNREADABLE, Path(opened)
    try:
        path, _ = hub.locate(opened)
        with as_user_error(OSError):
            file |= {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        content = checkpoint_file.read(opened)
        kind = FOREIGN
        keys = [*checkpoint_file.weight_keys(content)] or [None]
        for key in keys:
            found[key] = pretrained.Checkpoint(opened, content, key)
        first = next(iter(found.values()))
        kind, size = first.task, first.input_size
        file |= {"input_size": [*size], **first.sizes, "guesses": first.guesses()}
    except UserError as error:
        reason = str(error).replace(opened, printable(name)).replace(str(path), printable(name))
        return file | {"kind": kind if kind in (UNREADABLE, FOREIGN) else FOREIGN, "problem": printable(reason)}, {}
    classes = first.sizes.get("num_classes", 0)
    saved = map(checkpoint_file.unwrapped_name, content[first.key] if first.key else content)
    if dropped := [name for name in saved if name.removeprefix(inspection.VISUAL) not in first.state_dict]:
        file["left_out"].append(f"{len(dropped)} tensors that ARM does not have: {some(dropped)}")
    words = [KINDS.get(kind, f"model of {kind}"), f"{first.sizes['embed_dim']} channels",
        f"{first.sizes['depth']} blocks", f"{' x '.join(map(str, size))} pixels",
        *[f"{classes} classes"] * bool(classes), " and ".join(key for key in found if key) or "a bare state dict",
        *[f"{name} {content[name]:.2f} saved" for name in SAVED if isinstance(content.get(name), float)],
        *[f"guessed {name} ({value})" for name, value in first.guesses().items()]]  # fmt: skip
    return file | {"kind": kind, "what": ", ".join(words)}, found
