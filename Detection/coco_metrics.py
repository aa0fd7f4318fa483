"""Evaluate detections as COCO does: average precision and recall of boxes and masks (Lin et al. 2014).

faster-coco-eval computes them in C++. It was chosen by measurement (benchmarks/bench_coco.py): its numbers are those of
pycocotools to 1e-12 in less than half of the time. It needs only NumPy, and refuses damaged masks. torchmetrics, which
calls it, rounds to float32 and keeps masks as tensors.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from util.data.sources.coco import CocoSource, mask_library
from util.distributed.processes import gather, on_main
from util.errors import RunError, UserError, as_user_error
from util.files import from_json, open_regular, printable, some, to_json, write_text

LOGGER = logging.getLogger("arm")

SIZES = "", "_small", "_medium", "_large"  # all objects; areas up to 32^2, from there to 96^2, and larger ones
KINDS = {"box": "bbox", "mask": "segm"}  # and how the library calls them


class Found(NamedTuple):
    """The detections in an image.

    Args:
        boxes: (k, 4) float64, left, top, right and bottom in pixels.
        scores: (k,) float64.
        labels: (k,) int64, from 0.
        masks: (k,) objects, run lengths; all None without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


class Results:
    """Detections in the images of a source, and what COCO's metrics say of them.

    Args:
        source: images and their objects.
        masks: whether detections have masks. All objects then need one.
        distributed: whether each process has a share of the images, or all of them.
        max_detections: of a class in an image, those with the highest scores, that count.

    Raises:
        UserError: some objects have no mask, or faster-coco-eval is not installed.
    """

    def __init__(
        self, source: CocoSource, masks: bool = False, distributed: bool = True, max_detections: int = 100
    ) -> None:
        mask_library()
        if masks:
            source.check_masks()
        self.source, self.masks, self.distributed, self.max_detections = source, masks, distributed, max_detections
        self.found: list[tuple[int, Found]] = []
        self.broken = 0

    def add(
        self,
        index: int,
        boxes: Tensor | np.ndarray,
        scores: Tensor | np.ndarray,
        labels: Tensor | np.ndarray,
        masks: Tensor | np.ndarray | Sequence[dict] | None = None,
    ) -> None:
        """Add the detections in an image, also if there are none. A line says if some are not finite and left out.

        Args:
            index: of the image in the source; -1 for a broken one, which counts as an image without detections.
            boxes: (k, 4), left, top, right and bottom in pixels of the original image.
            scores: (k,).
            labels: (k,) from 0, as those of the source.
            masks: (k, H, W) of the original size, bool or uint8; or the run lengths that `encode` returns.
        """
        if index < 0:
            self.broken += 1
            return
        found = to_found(boxes, scores, labels, masks if self.masks else None)
        finite = np.isfinite(found.boxes).all(axis=1) & np.isfinite(found.scores)
        if not finite.all():
            LOGGER.warning("%d detections are not finite and left out: %s", (~finite).sum(), self.source.name(index))
        self.found.append((index, Found(*(part[finite] for part in found))))

    def collect(self) -> None:
        """Gather the detections of all processes, in the order of the images. All processes call it once.

        Raises:
            RunError: an image was evaluated twice, or never.
        """
        shares = gather((self.found, self.broken)) if self.distributed else [(self.found, self.broken)]
        self.found = sorted((pair for share, _ in shares for pair in share), key=lambda pair: pair[0])
        self.broken = sum(broken for _, broken in shares)
        indices = np.array([index for index, _ in self.found], np.int64)
        times = np.bincount(indices, minlength=len(self.source.labels))
        if (times > 1).any() or (times == 0).sum() != self.broken:
            wrong = some([self.source.name(int(index)) for index in np.flatnonzero(times != 1)])
            raise RunError(f"{self.source.root}: not all images were evaluated once: {wrong}")

    def summary(self) -> dict[str, float]:
        """Return the metrics in percent after `collect`, the same on every process. All processes call it.

        Returns:
            box_ap (the mean over IoU thresholds from 0.5 to 0.95), box_ap50, box_ap75, box_ap_small, box_ap_medium,
            box_ap_large; box_ar, the recall, in all and for each size; box_ap/NAME for each class; the same with mask.
            NaN if there are no such objects. `broken` is the number of broken images, if there are some.
        """
        found = on_main(self._evaluate)
        return found | ({"broken": self.broken} if self.broken else {})

    def _evaluate(self) -> dict[str, float]:
        kinds = [*KINDS] if self.masks else ["box"]
        return {name: value for kind in kinds for name, value in self._evaluate_kind(kind).items()}

    def _evaluate_kind(self, kind: str) -> dict[str, float]:
        from faster_coco_eval import COCO, COCOeval_faster

        source, records = self.source, self.records()
        if kind == "mask":
            for record in records:
                del record["bbox"]  # else the size of an object would be that of its box
        images = zip(source.image_ids.tolist(), *source.sizes.T.tolist(), strict=True)
        content = {
            "images": [{"id": number, "height": height, "width": width} for number, height, width in images],
            "categories": [{"id": number} for number in source.known_ids.tolist()],
            "annotations": self._truth(kind == "mask"),
        }
        truth = COCO(content)
        evaluation = COCOeval_faster(truth, truth.loadRes(records), KINDS[kind], print_function=LOGGER.debug)
        evaluation.params.maxDets = [self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        # (10 thresholds, 101 recalls, classes, 4 sizes) and (10 thresholds, classes, 4 sizes); -1 without objects
        precision, recall = (np.asarray(evaluation.eval[name])[..., 0] for name in ("precision", "recall"))
        result = {f"{kind}_ap{size}": precision[..., place] for place, size in enumerate(SIZES)}
        result |= {f"{kind}_ap{50 + 5 * place}": precision[place, ..., 0] for place in (0, 5)}
        result |= {f"{kind}_ar{size}": recall[..., place] for place, size in enumerate(SIZES)}
        result |= {f"{kind}_ap/{name}": precision[:, :, place, 0] for place, name in enumerate(source.categories)}
        return {name: _percent(values[values > -1]) for name, values in result.items()}

    def _truth(self, masks: bool) -> list[dict]:
        """Return all objects, with the boxes and areas of the file.

        They are numbered anew, from 1: to pycocotools an object with the id 0 is never found.
        """
        source = self.source
        records: list[dict] = []
        for index, image_id in enumerate(source.image_ids.tolist()):
            rows, coded = source.rows_of(index), source.rles(index) if masks else []
            for place, (row, area) in enumerate(zip(rows, source.areas(index).tolist(), strict=True)):
                record = {"id": len(records) + 1, "image_id": image_id, "area": area, "iscrowd": int(row["crowd"] != 0)}
                record |= {"category_id": int(source.known_ids[row["category"]]), "bbox": row["box"].tolist()}
                records.append(record | ({"segmentation": coded[place]} if masks else {}))
        return records

    def records(self) -> list[dict]:
        """Return the detections in COCO's format for results, but those of classes that the file does not have."""
        source = self.source
        return [
            record
            for index, found in self.found
            for record in to_records(int(source.image_ids[index]), found, source.category_ids)
            if record["category_id"] >= 0
        ]

    def write(self, path: Path) -> None:
        """Write the detections after `collect` as JSON in COCO's format for results; raises OSError."""
        write_records(path, self.records())

    def read(self, path: Path) -> None:
        """Add the detections of such a file, and none in the images that it does not name.

        Raises:
            UserError: it is damaged, lacks masks, or names other images or categories.
        """
        about = printable(path)
        with as_user_error(OSError), as_user_error(ValueError, prefix=f"{about} is damaged: "):
            records: Any = from_json(path.read_text(encoding="utf-8"))
        places = {number: index for index, number in enumerate(self.source.image_ids.tolist())}
        labels = {number: label for label, number in enumerate(self.source.category_ids.tolist())}
        grouped: dict[int, list] = {index: [] for index in places.values()}
        for number, record in enumerate(records if isinstance(records, list) else [records]):
            try:
                x, y, w, h = record["bbox"]
                mask = [record["segmentation"]] if self.masks else []
                index, label, score = places[record["image_id"]], labels[record["category_id"]], float(record["score"])
                grouped[index].append(([float(x), float(y), float(x + w), float(y + h)], score, label, mask))
            except (KeyError, TypeError, ValueError) as error:
                reason = f"[{number}] is no detection in an image and of a category of {self.source.root}"
                raise UserError(f"{about}: {reason}: {type(error).__name__} {error}") from error
        for index, found in grouped.items():
            boxes, scores, own, coded = zip(*found, strict=True) if found else ((), (), (), ())
            self.add(index, np.array(boxes), np.array(scores), np.array(own), [mask for part in coded for mask in part])


def to_found(
    boxes: Tensor | np.ndarray,
    scores: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    masks: Tensor | np.ndarray | Sequence[dict] | None,
) -> Found:
    """Return detections on the CPU; for the arguments see `Results.add`."""
    values = [part.detach().cpu().numpy() if isinstance(part, Tensor) else part for part in (boxes, scores, labels)]
    coded = np.full(len(values[1]), None, dtype=object)
    if masks is not None:
        coded[:] = encode(masks) if isinstance(masks, (Tensor, np.ndarray)) else masks
    # (k, 4), also if k = 0
    return Found(
        values[0].reshape(-1, 4).astype(np.float64), values[1].astype(np.float64), values[2].astype(int), coded
    )


def encode(masks: Tensor | np.ndarray) -> list[dict]:
    """Return masks (k, H, W), bool or uint8, as run lengths {"size", "counts"}."""
    values = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else masks
    if not len(values):
        return []
    return mask_library().encode(np.asfortranarray(values.transpose(1, 2, 0), dtype=np.uint8))  # (k, H, W) -> (H, W, k)


def to_records(image_id: int, found: Found, category_ids: np.ndarray) -> list[dict]:
    """Return the detections in an image in COCO's format for results.

    Args:
        image_id: of the image.
        found: the detections.
        category_ids: of each label.
    """
    sizes = found.boxes[:, 2:] - found.boxes[:, :2]
    boxes = np.concatenate([found.boxes[:, :2], sizes], axis=1).tolist()  # (k, 4): x, y, width, height
    columns = category_ids[found.labels].tolist(), boxes, found.scores.tolist(), found.masks
    return [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        | ({} if mask is None else {"segmentation": mask})
        for category, box, score, mask in zip(*columns, strict=True)
    ]


def write_records(path: Path, records: list[dict]) -> None:
    """Write detections as JSON; raises OSError."""
    write_text(path, json_of(records) + "\n")


def json_of(records: list[dict]) -> str:
    """Return detections as JSON in one line; run lengths become text."""
    for record in records:
        if "segmentation" in record:
            mask = record["segmentation"]
            record["segmentation"] = mask | {"counts": printable(mask["counts"])}
    return to_json(records)


def is_detections(path: Path) -> bool:
    """Return whether a file holds detections in COCO's format for results, as they are written here."""
    try:
        with open_regular(path) as file:
            return file.read(32).startswith((b"[]", b'[{"image_id": '))
    except OSError:
        return False


def _percent(values: np.ndarray) -> float:
    return 100 * float(values.mean()) if values.size else math.nan
