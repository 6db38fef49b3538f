"""The cache of decoded samples: right, atomic, and never stale."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules.cache import open_cache
from datamodules.isic2018 import ISIC2018
from datamodules.transforms import read_image, resize_image


def find(data):
    return ISIC2018(
        cache="unused", image_size=8, batch_size=1, root=data / "isic2018"
    ).find_samples()


def test_arrays_hold_the_resized_samples(isic_copy, tmp_path):
    samples = find(isic_copy)
    cache = open_cache(samples, tmp_path / "cache", "isic2018", 32, antialias=True)
    assert cache.images.shape == (10, 32, 32, 3)
    assert cache.images.dtype == cache.masks.dtype == np.uint8
    assert isinstance(cache.images, np.memmap)
    expected = resize_image(read_image(samples[3].image), 32, antialias=True)
    assert np.array_equal(cache.images[3], expected)
    assert set(np.unique(cache.masks)) == {0, 1}
    assert cache.sizes.tolist() == [[144, 192]] * 10
    assert cache.meta == {"count": 10, "empty_masks": 0, "full_masks": 0}


def test_constant_masks_are_kept_and_counted(isic_copy, tmp_path):
    masks = isic_copy / "isic2018" / "ISIC2018_Task1_Training_GroundTruth"
    for index, value in ((0, 255), (1, 0), (2, 255)):
        path = masks / f"ISIC_{index:07d}_segmentation.png"
        Image.fromarray(np.full((144, 192), value, np.uint8)).save(path)
    cache = open_cache(find(isic_copy), tmp_path / "cache", "isic2018", 16, antialias=True)
    assert cache.masks[0].min() == 1, "a full mask stays full"
    assert cache.masks[1].max() == 0
    assert cache.meta == {"count": 10, "empty_masks": 1, "full_masks": 2}


def test_a_second_opening_reads_what_the_first_has_written(isic_copy, tmp_path):
    samples = find(isic_copy)
    first = open_cache(samples, tmp_path / "cache", "isic2018", 16, antialias=True)
    written = (first.folder / "images.npy").stat().st_mtime_ns
    second = open_cache(samples, tmp_path / "cache", "isic2018", 16, antialias=True)
    assert second.folder == first.folder
    assert (second.folder / "images.npy").stat().st_mtime_ns == written


@pytest.mark.parametrize("change", ["size", "antialias", "content", "time", "fewer", "renamed"])
def test_whatever_shapes_the_arrays_makes_another_cache(isic_copy, tmp_path, change):
    root = tmp_path / "cache"
    samples = find(isic_copy)
    first = open_cache(samples, root, "isic2018", 16, antialias=True)
    size, antialias = (24, True) if change == "size" else (16, change != "antialias")
    if change == "content":
        Image.fromarray(np.zeros((144, 192, 3), np.uint8)).save(samples[0].image)
    elif change == "time":
        os.utime(samples[0].mask, ns=(1, 1))
    elif change == "fewer":
        samples = samples[:-1]
    elif change == "renamed":
        for path in (samples[0].image, samples[0].mask):
            path.rename(path.with_name(path.name.replace("ISIC_", "ISIC_9")))
        samples = find(isic_copy)
    second = open_cache(samples, root, "isic2018", size, antialias)
    assert second.folder != first.folder
    if change == "content":
        assert second.images[0].max() == 0


def test_a_failed_build_leaves_nothing(isic_copy, tmp_path):
    samples = find(isic_copy)
    samples[7].image.write_bytes(b"broken")
    root = tmp_path / "cache"
    with pytest.raises(UserError, match="ISIC_0000007.jpg cannot be decoded"):
        open_cache(samples, root, "isic2018", 16, antialias=True)
    assert list(root.iterdir()) == []


def test_a_mask_of_another_size_is_named(isic_copy, tmp_path):
    samples = find(isic_copy)
    Image.fromarray(np.zeros((50, 60), np.uint8)).save(samples[2].mask)
    message = r"ISIC_0000002.jpg has 192x144 .*ISIC_0000002_segmentation.png has 60x50"
    with pytest.raises(UserError, match=message):
        open_cache(samples, tmp_path / "cache", "isic2018", 16, antialias=True)


def test_a_pickled_cache_is_only_its_folder(isic_copy, tmp_path):
    cache = open_cache(find(isic_copy), tmp_path / "cache", "isic2018", 64, antialias=True)
    assert cache.images.nbytes > 100_000
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).masks, cache.masks)
