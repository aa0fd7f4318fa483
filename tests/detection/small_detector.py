"""A detector of seconds, and coloured rectangles to detect; as a script, it runs another one with it."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from Detection import models_detect  # noqa: E402
from models_arm import create_pyramid  # noqa: E402

FEW = {"PROPOSALS": 30, "SAMPLED_ANCHORS": 64, "SAMPLED_REGIONS": 32, "BOX_CONVS": 1, "MASK_CONVS": 2}
SIZES = {"embed_dim": 32, "depth": 2, "patch_size": 8}
WORDS = [word for name, value in SIZES.items() for word in (f"--{name}", value)]
WORDS += "--device cpu --num_workers 0 --input_size 64 --head_channels 16".split()
WORDS += "--drop_path 0 --warmup_epochs 0 --lr 1e-3".split()
COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}
IDS = {"red": 3, "blue": 90}


def detector(masks: bool = True, **sizes: object) -> models_detect.Detector:
    """Return a detector of two classes with random weights."""
    torch.manual_seed(0)
    encoder = create_pyramid("arm_base_pz16", **{**SIZES, "img_size": 64, "out_chans": 16, **sizes})
    return models_detect.Detector(encoder, len(IDS), masks)


def write_rectangles(root: Path, train: int = 4, val: int = 3) -> Path:
    """Write images of 0, 1, 2 ... rectangles on noise, with odd sizes, as COCO has them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        images, objects = [], []
        for number in range(count):
            height, width = 64 - 4 * (number % 3), 56 + 6 * (number % 2)
            pixels = rng.integers(100, 140, (height, width, 3), dtype=np.uint8)
            for colour in [*IDS, *IDS][: number + (split == "train")]:
                w, h = rng.integers(26, 42, 2).tolist()
                x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
                pixels[y : y + h, x : x + w] = COLOURS[colour]
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                objects.append({"id": len(objects) + 1, "image_id": 10 + number, "category_id": IDS[colour]})
                objects[-1] |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [polygon]}
            Image.fromarray(pixels).save(root / split / f"{number}.png")
            images.append({"id": 10 + number, "file_name": f"{number}.png", "height": height, "width": width})
        categories = [{"id": number, "name": name} for name, number in IDS.items()]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


if __name__ == "__main__":
    from util import cli

    vars(models_detect).update(FEW)
    script = importlib.import_module(sys.argv.pop(1))
    cli.run_main(script.main, script.get_args_parser())
