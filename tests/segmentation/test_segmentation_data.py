"""Views of images with masks: a pixel's class follows it through scale, crop, flip and turn; what is distorted."""

import io

import numpy as np
import pytest
import torch
from data_helpers import write_masked
from helpers import encoded, loader_args
from PIL import Image

from Segmentation.segmentation_data import RandomView, SegmentationDataset, WholeImage, nearest
from util.data.decode import BrokenImage
from util.data.loaders import eval_loader, train_loader
from util.data.pixels import IMAGENET, Pixels
from util.data.sources.mask_folder import IGNORED, open_masks
from util.errors import UserError
from util.seeding import seed_sample

CPU = torch.device("cpu")
COLOURS = np.array([[250, 20, 30], [20, 240, 40], [30, 40, 230], [240, 230, 20]], np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory, photographs):
    return open_masks(str(write_masked(tmp_path_factory.mktemp("masks"), photographs, train=7, val=3)), "train")


def painted(height=45, width=70):
    """An image whose colours say the class of each pixel, without symmetry, and the mask."""
    y, x = np.mgrid[:height, :width]
    mask = (((x - 50) ** 2 + (y - 12) ** 2 < 90) + 2 * (x < 25 + y // 4) * (y > 8)).astype(np.int16)
    return encoded(Image.fromarray(COLOURS[mask]), "PNG"), mask


def classes_of(image):
    """The class that each colour of a view (3, h, w) uint8 is nearest to."""
    distances = (image.permute(1, 2, 0)[:, :, None].int() - torch.from_numpy(COLOURS.astype(np.int32))).abs().sum(dim=3)
    return distances.argmin(dim=2)


def inner(mask):
    """Pixels whose neighbours within 2 pixels all have their class; at others the resize mixes colours."""
    padded = np.pad(mask.numpy(), 2, mode="edge")
    parts = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    return torch.from_numpy((parts == mask.numpy()[:, :, None, None]).all(axis=(2, 3)))


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (90, 130)])
def test_a_class_follows_its_pixel(size):
    data, mask = painted()
    view = RandomView(size, IMAGENET, distort=0)
    seen, shapes = set(), set()
    for seed in range(12):
        seed_sample(seed)
        image, labels = view(data, mask)
        assert image.shape == (3, *size)
        assert image.dtype == torch.uint8
        assert labels.shape == size
        shown = labels != IGNORED
        certain = inner(labels) & shown
        assert certain.sum() > 100
        assert (classes_of(image) == labels)[certain].all()
        rows, columns = shown.any(dim=1).sum().item(), shown.any(dim=0).sum().item()
        shapes.add((rows, columns))
        assert shown[:rows, :columns].all()  # what is padded lies on the right and below
        assert ((image - torch.tensor(view.fill)[:, None, None])[:, ~shown] == 0).all()
        seen |= {*labels[shown].tolist()}
    assert seen == {0, 1, 2}
    assert len(shapes) > 2  # images smaller than the input are padded


def test_the_whole_image_unchanged_and_flipped():
    data, mask = painted(40, 40)
    for hflip in (0, 1):
        image, labels = RandomView((40, 40), IMAGENET, (1, 1), hflip=hflip, distort=0)(data, mask)
        there = mask[:, ::-1] if hflip else mask
        np.testing.assert_array_equal(labels, there)
        np.testing.assert_array_equal(image.permute(1, 2, 0), COLOURS[there])


def test_sizes_of_the_ratio():
    """At a ratio of one half the image has half of the input's side, and the rest is padded."""
    data, mask = painted(60, 60)
    for ratio in (0.5, 1.0):
        _, labels = RandomView((40, 40), IMAGENET, (ratio, ratio), hflip=0, distort=0)(data, mask)
        side = round(40 * ratio)
        assert (labels != IGNORED).sum() == side * side
        np.testing.assert_array_equal(labels[:side, :side], nearest(mask, (side, side)))


def test_nearest_takes_the_centre():
    mask = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert nearest(mask, (4, 6)).tolist() == np.kron(mask, np.ones((2, 2))).tolist()
    assert nearest(np.arange(9, dtype=np.int16)[None], (1, 3)).tolist() == [[1, 4, 7]]


def test_a_crop_of_one_class_is_drawn_again():
    mask = np.zeros((100, 100), np.int16)
    mask[40:60, 40:60] = 1
    data = encoded(Image.fromarray(COLOURS[mask]), "PNG")

    def filled(max_share):
        seed_sample(5)
        view = RandomView((25, 25), IMAGENET, (4, 4), max_share, distort=0)
        return sum(torch.bincount(view(data, mask)[1].flatten()).max() > 0.75 * 625 for _ in range(40))

    assert filled(1) > 30
    assert filled(0.75) < filled(1) / 2


def test_distortion_changes_colours_and_nothing_else():
    data, mask = painted()
    views = {}
    for distort in (0, 1):
        seed_sample(3)
        views[distort] = RandomView((45, 70), IMAGENET, (45 / 70, 45 / 70), distort=distort)(data, mask)
    np.testing.assert_array_equal(views[0][1], views[1][1])
    assert (views[0][0] != views[1][0]).float().mean() > 0.5
    red = encoded(Image.new("RGB", (70, 45), (230, 40, 40)), "PNG")
    distorted = [RandomView((45, 70), IMAGENET, distort=1, max_share=1)(red, mask)[0][:, 0, 0] for _ in range(20)]
    assert {int(colour.argmax()) for colour in distorted} == {0}  # channels are not exchanged
    assert len({tuple(colour.tolist()) for colour in distorted}) > 10
    grey = Pixels((0.5,), (0.2,), 1)
    assert RandomView((16, 16), grey, distort=1)(data, mask)[0].shape == (1, 16, 16)
    with pytest.raises(UserError, match=r"--distort 0\.5 is for images of 1 or 3 channels, not 4: --distort 0"):
        RandomView((16, 16), Pixels((0.5,) * 4, (0.2,) * 4, 4))


def test_images_of_other_channels(source):
    """Arrays of any number of bands are scaled and cropped likewise; a batch can be finished twice."""
    _, mask = painted(20, 30)
    bands = np.stack([np.eye(4)[mask][..., c] for c in range(4)] + [mask / 3], axis=2).astype(np.float32)
    file = io.BytesIO()
    np.save(file, bands)
    view = RandomView((20, 30), Pixels((0.5,) * 5, (2.0,) * 5, 5), (2 / 3, 2 / 3), distort=0, max_share=1)
    image, labels = view(file.getvalue(), mask)
    assert (image[:4].argmax(dim=0) == labels).all()
    batch = [image[None], labels[None]]
    first, again = (SegmentationDataset(source, view).finish(batch, CPU)[0] for _ in range(2))
    torch.testing.assert_close(first, (image[None] - 0.5) / 2)
    assert torch.equal(first, again)


def test_a_whole_image_keeps_its_mask():
    data, mask = painted(45, 70)
    image, labels = WholeImage((90, 30), IMAGENET)(data, mask)
    assert image.shape == (3, 90, 140)  # the shorter side is the longer one of the input
    np.testing.assert_array_equal(labels, mask)
    grown = torch.from_numpy(nearest(mask, (90, 140)))
    assert (classes_of(image) == grown)[inner(grown)].all()


@pytest.mark.parametrize("turn", [3, 6, 7])
def test_a_mask_is_turned_with_its_image(turn):
    """The mask belongs to the pixels that are stored, whatever EXIF says; one size does not fit another."""
    _, mask = painted()
    exif = Image.Exif()
    exif[274] = turn
    data = encoded(Image.fromarray(COLOURS[mask]), "JPEG", quality=95, exif=exif, subsampling=0)
    pixels = IMAGENET._replace(exif=True)
    image, labels = WholeImage((45, 45), pixels)(data, mask)
    assert labels.shape == ((45, 70) if turn == 3 else (70, 45))
    assert (classes_of(image) == labels)[inner(labels)].all()
    image, labels = RandomView((40, 40), pixels, distort=0)(data, mask)
    certain = inner(labels) & (labels != IGNORED)
    assert (classes_of(image) == labels)[certain].all()
    np.testing.assert_array_equal(WholeImage((45, 45), IMAGENET)(data, mask)[1], mask)


@pytest.mark.parametrize("transform", [WholeImage((32, 32), IMAGENET), RandomView((32, 32), IMAGENET)])
def test_a_mask_of_another_size_is_named(source, transform):
    dataset = SegmentationDataset(source, transform)
    read = source.read_mask
    source.read_mask = lambda index: read(index).T
    try:
        with pytest.raises(BrokenImage, match=r"train/2\.jpg: it has 80 x 60 pixels, and its mask 60 x 80$"):
            dataset.sample(2)
    finally:
        source.read_mask = read


def test_training_batches_are_the_same_in_workers_and_for_any_epoch_order(source):
    """Views depend on seed, epoch and image only; blank ones have no class."""
    dataset = SegmentationDataset(source, RandomView((32, 24), IMAGENET))
    batches = {}
    for workers in (0, 2):
        loader = train_loader(dataset, loader_args(batch_size=3, num_workers=workers), CPU)
        loader.sampler.set_epoch(1)
        batches[workers] = list(loader)
    for (images, masks), (others, other_masks) in zip(*batches.values(), strict=True):
        assert images.shape == (3, 3, 32, 24)
        assert images.dtype == torch.float32
        assert masks.shape == (3, 32, 24)
        assert masks.dtype == torch.int64
        assert torch.equal(images, others)
        assert torch.equal(masks, other_masks)
    first, again = ([*train_loader(dataset, loader_args(batch_size=1), CPU)] for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    image, mask = dataset.blank()
    assert (image.shape, mask.unique().tolist()) == ((3, 32, 24), [IGNORED])


def test_padding_is_the_mean_after_normalisation(source):
    data, mask = painted(20, 20)
    images, masks = RandomView((32, 32), IMAGENET, (0.5, 0.5), distort=0)(data, mask)
    finished, labels = SegmentationDataset(source, RandomView((32, 32), IMAGENET)).finish(
        [images[None], masks[None]], CPU
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET.mean, IMAGENET.std))
    torch.testing.assert_close(finished[0], (images / 255 - mean) / std)
    assert finished[0][:, labels[0] == IGNORED].abs().max() < 0.5 / 255 / min(IMAGENET.std)


def test_evaluation_loads_whole_images(source):
    dataset = SegmentationDataset(source, WholeImage((30, 30), IMAGENET))
    seen = 0
    for images, masks in eval_loader(dataset, loader_args(batch_size=2), CPU):
        for image, mask in zip(images, masks, strict=True):
            assert image.shape == (3, 30, 40)
            np.testing.assert_array_equal(mask, source.read_mask(seen))
            seen += 1
    assert seen == 7
