"""Names of classes: a label counts as the name of its class wherever that is known, not as a position."""

from collections.abc import Sequence

import numpy as np
from timm.data import ImageNetInfo

from util.data.readers import Source
from util.errors import UserError
from util.files import printable, some


def names_by_output(source: Source, outputs: int) -> list[str]:
    """Return the name of the class that each output of a classifier is trained on, "" for one without a name."""
    names = [printable(name) for name in source.classes]
    return names + [""] * (outputs - len(names))


def known_names(saved: list[str], outputs: int, source: Source, owner: str) -> tuple[list[str], str]:
    """Find out what the outputs of a classifier are called.

    Args:
        saved: names from its checkpoint, by output; empty where it has none.
        outputs: their number.
        source: images to evaluate.
        owner: the checkpoint, for messages.

    Returns:
        The names, all of them "" where they are unknown, and a line to show where they are assumed: 1000 outputs
        without names are ImageNet's classes in the order of their synsets, if the source's classes are synsets, too.
    """
    if any(saved):
        return saved, ""
    synsets, own = ImageNetInfo().label_names(), set(source.classes) - {""}
    if outputs == len(synsets) and own and own <= set(synsets):
        return synsets, f"{owner} does not name its classes: ImageNet's in the order of their synsets are assumed"
    return [""] * outputs, ""


def match_classes(source: Source, names: Sequence[str], owner: str) -> list[str]:
    """Renumber the labels of a source: that of a class becomes the position of its name in `names`.

    Where the source or `names` has no names, labels are positions already.

    Args:
        source: its `labels` and `classes` change; it may hold fewer classes.
        names: of the classes by position; "" for one without a name.
        owner: whose classes these are, for messages.

    Returns:
        Lines to show: that labels are taken as positions or have changed, and which classes have no images.

    Raises:
        UserError: images of classes that `names` does not have; or classes with names, where `names` has none and
            another number of them, so that positions cannot be right.
    """
    names, own = [printable(name) for name in names], [printable(name) for name in source.classes]
    present = np.unique(source.labels).tolist()
    if any(own) and not any(names) and len(own) != len(names):
        raise UserError(
            f"{source.root} has {len(own)} classes; {owner} has {len(names)} and does not name them, so positions "
            "among fewer or more would be wrong labels: images of all its classes are needed"
        )
    lines = []
    if any(names) and all(own[label] for label in present):
        position = {name: place for place, name in enumerate(names) if name}
        unknown = [own[label] for label in present if own[label] not in position]
    else:
        unnamed = owner if any(own) and not any(names) else source.root
        lines.append(f"{unnamed} does not name its classes: labels are taken as positions")
        position = {}
        unknown = [
            own[label] or str(label)
            for label in present
            if label >= len(names) or (own[label] and names[label] and own[label] != names[label])
        ]
    if unknown:
        raise UserError(
            f"{source.root} has images of {len(unknown)} classes that {owner} does not have: {some(unknown)}"
        )
    if position:
        places = np.array([position.get(name, -1) for name in own])
        if (places[present] != present).any():
            lines.append(f"{source.root} numbers its classes otherwise than {owner}: they are matched by name")
        source.classes, source.labels = names, places[source.labels]
    wanted = [place for place, name in enumerate(names) if name or not any(names)]
    present = set(source.labels.tolist())
    missing = [names[place] or str(place) for place in wanted if place not in present]
    if missing:
        found = f"{len(wanted) - len(missing)} of {len(wanted)}"
        lines.append(f"{source.root} has images of {found} classes, none of {some(missing)}")
    return lines


def differing(saved: list[str], names: list[str]) -> list[str]:
    """Return what two lists of names by output do not share; nothing where they agree, or one of them has no names."""
    if saved == names or not any(saved) or not any(names):
        return []
    same = "the same names in another order" if len(saved) == len(names) else "another number of them"
    return sorted((set(saved) ^ set(names)) - {""}) or [same]
