"""Match labels by the names of their classes where the names are known, and by position otherwise."""

from collections.abc import Sequence

import numpy as np

from util.data.sources.source import Source
from util.errors import UserError
from util.files import printable, some


def names_by_output(source: Source, outputs: int) -> list[str]:
    """Return the name of the class that each output of a classifier is trained on, or "" if it has no name."""
    names = [printable(name) for name in source.classes]
    return names + [""] * (outputs - len(names))


def known_names(saved: list[str], outputs: int, classes: Sequence[str], owner: str) -> tuple[list[str], str]:
    """Return the names of a classifier's outputs, and a line to show if the names are assumed.

    1000 outputs without names are assumed to be the classes of ImageNet in the order of their synsets, unless the
    images have classes that are no synsets. In all other cases, unknown names are "".

    Args:
        saved: names from the checkpoint, by output; empty if it has none.
        outputs: number of outputs.
        classes: names of the classes of the images to evaluate, which may be ""; empty without labels.
        owner: name of the checkpoint in messages.
    """
    if any(saved):
        return saved, ""
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo().label_names()
    if outputs == len(synsets) and {*classes} <= {"", *synsets}:
        return synsets, f"{owner} does not name its classes: ImageNet's in the order of their synsets are assumed"
    return [""] * outputs, ""


def match_classes(source: Source, names: Sequence[str], owner: str) -> list[str]:
    """Renumber the labels of a source: each becomes the position of its class in `names`.

    If the source or `names` has no names, labels are taken as positions.

    Args:
        source: its `labels` and `classes` are changed; it may have fewer classes than `names`.
        names: names of the classes by position; "" for a class without a name.
        owner: name of the owner of these classes in messages.

    Returns:
        Lines to show: that labels are taken as positions or were changed, and which classes have no images.

    Raises:
        UserError: there are images of classes that are not in `names`; or the source names its classes, and `names` has
            another number of classes without names, so that positions would be wrong labels.
    """
    names, own = [printable(name) for name in names], [printable(name) for name in source.classes]
    present = np.unique(source.labels).tolist()
    if any(own) and not any(names) and len(own) != len(names):
        raise UserError(
            f"{source.root} has {len(own)} classes; {owner} has {len(names)} and does not name them, so they cannot be "
            "matched: images of all its classes are needed"
        )
    lines = []
    if any(names) and all(own[label] for label in present):
        position = {name: place for place, name in enumerate(names) if name}
        unknown = [own[label] for label in present if own[label] not in position]
    else:
        unnamed = owner if any(own) and not any(names) else source.root
        lines.append(f"{unnamed} does not name its classes: labels are taken as positions")
        position = {}
        other = [n for n in present if n >= len(names) or (own[n] and names[n] and own[n] != names[n])]
        unknown = [own[label] or str(label) for label in other]
    if unknown:
        images = f"images of {len(unknown)} classes"
        raise UserError(f"{source.root} has {images} that {owner} does not have: {some(unknown)}")
    if position:
        places = np.array([position.get(name, -1) for name in own])
        if (places[present] != present).any():
            lines.append(f"{source.root} numbers its classes differently from {owner}: they are matched by name")
        source.classes, source.labels = names, places[source.labels]
    wanted = [place for place, name in enumerate(names) if name or not any(names)]
    present = set(source.labels.tolist())
    missing = [names[place] or str(place) for place in wanted if place not in present]
    if missing:
        found = f"{len(wanted) - len(missing)} of {len(wanted)}"
        lines.append(f"{source.root} has images of {found} classes, none of {some(missing)}")
    return lines


def differing(saved: list[str], names: list[str]) -> list[str]:
    """Return the difference between two lists of names by output; empty if they agree, or one of them has no names."""
    if saved == names or not any(saved) or not any(names):
        return []
    same = "the same names in another order" if len(saved) == len(names) else "a different number of classes"
    return sorted((set(saved) ^ set(names)) - {""}) or [same]
