"""The cache of decoded samples: right, atomic, and never stale."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules.cache import open_cache
from datamodules.decoding import read_image, read_mask
from datamodules.isic2018 import ISIC2018
from datamodules.synthetic import SyntheticSample
from datamodules.transforms import MASK_RESIZE, resize_image, resize_mask


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
    assert cache.meta == {"count": 10, "empty_masks": 0, "full_masks": 0, "mask_resize": "area"}


def test_constant_masks_are_kept_and_counted(isic_copy, tmp_path):
    masks = isic_copy / "isic2018" / "ISIC2018_Task1_Training_GroundTruth"
    for index, value in ((0, 255), (1, 0), (2, 255)):
        path = masks / f"ISIC_{index:07d}_segmentation.png"
        Image.fromarray(np.full((144, 192), value, np.uint8)).save(path)
    cache = open_cache(find(isic_copy), tmp_path / "cache", "isic2018", 16, antialias=True)
    assert cache.masks[0].min() == 1, "a full mask stays full"
    assert cache.masks[1].max() == 0
    counts = {"count": 10, "empty_masks": 1, "full_masks": 2}
    assert cache.meta == counts | {"mask_resize": "area"}


def test_a_second_opening_reads_what_the_first_has_written(isic_copy, tmp_path):
    samples = find(isic_copy)
    first = open_cache(samples, tmp_path / "cache", "isic2018", 16, antialias=True)
    written = (first.folder / "images.npy").stat().st_mtime_ns
    second = open_cache(samples, tmp_path / "cache", "isic2018", 16, antialias=True)
    assert second.folder == first.folder
    assert (second.folder / "images.npy").stat().st_mtime_ns == written


def test_soft_masks_are_kept_in_grey_levels(isic_copy, tmp_path):
    masks = isic_copy / "isic2018" / "ISIC2018_Task1_Training_GroundTruth"
    for index, value in ((0, 255), (1, 0)):
        path = masks / f"ISIC_{index:07d}_segmentation.png"
        Image.fromarray(np.full((144, 192), value, np.uint8)).save(path)
    # A speck that leaves a grey pixel and no lesion.
    speck = np.zeros((144, 192), np.uint8)
    speck[73, 97] = 255
    Image.fromarray(speck).save(masks / "ISIC_0000002_segmentation.png")
    samples = find(isic_copy)
    hard, soft = (
        open_cache(samples, tmp_path / "cache", "isic2018", 16, True, mask_resize=how)
        for how in ("area", "soft")
    )
    assert (hard.soft, soft.soft) == (False, True)
    assert np.array_equal(soft.images, hard.images)
    assert soft.masks.dtype == np.uint8
    expected = resize_mask(read_mask(samples[3].masks[0]), 16, how="soft")
    assert np.array_equal(soft.masks[3], expected)
    assert len(np.unique(expected)) > 10
    assert (soft.masks[0].min(), soft.masks[1].max()) == (255, 0)
    assert soft.masks[2].max() > 0
    rows = np.array([5, 3, 0])
    assert np.array_equal(soft.lesions(rows), soft.masks[rows] > 127)
    assert np.array_equal(hard.lesions(rows), hard.masks[rows])
    assert soft.lesions(rows).dtype == hard.lesions(rows).dtype == np.uint8
    for cache, how in ((soft, "soft"), (hard, "area")):
        counts = {"count": 10, "empty_masks": 2, "full_masks": 1}
        assert cache.meta == counts | {"mask_resize": how}


def test_every_way_to_shrink_masks_has_a_cache_of_its_own(tmp_path):
    samples = [SyntheticSample(0, index) for index in range(2)]
    ways = [{"mask_resize": how} for how in MASK_RESIZE] + [{"letterbox": True}]
    folders = {open_cache(samples, tmp_path, "synthetic", 8, True, **way).folder for way in ways}
    assert len(folders) == 5
    # Those of the version before have masks that lie elsewhere.
    assert "synthetic-8px-f36101b705f1a465" not in {folder.name for folder in folders}


@pytest.mark.parametrize("change", ["size", "antialias", "content", "time", "fewer", "renamed"])
def test_whatever_shapes_the_arrays_makes_another_cache(isic_copy, tmp_path, change):
    root = tmp_path / "cache"
    samples = find(isic_copy)
    first = open_cache(samples, root, "isic2018", 16, antialias=True)
    size, antialias = (24, True) if change == "size" else (16, change != "antialias")
    if change == "content":
        Image.fromarray(np.zeros((144, 192, 3), np.uint8)).save(samples[0].image)
    elif change == "time":
        os.utime(samples[0].masks[0], ns=(1, 1))
    elif change == "fewer":
        samples = samples[:-1]
    elif change == "renamed":
        for path in (samples[0].image, samples[0].masks[0]):
            path.rename(path.with_name(path.name.replace("ISIC_", "ISIC_9")))
        samples = find(isic_copy)
    second = open_cache(samples, root, "isic2018", size, antialias)
    assert second.folder != first.folder
    if change == "content":
        assert second.images[0].max() == 0


ARRAYS = ("images", "masks", "sizes", "digests")


def meta_with(**changes):
    """Damage `meta.json` by changing values."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_array(change):
    """Damage an array by saving another one."""
    return lambda path: np.save(path, change(np.load(path)))


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("meta", lambda path: path.unlink()),
        ("meta", lambda path: path.write_bytes(b"")),
        ("meta", lambda path: path.write_bytes(b"\xff{")),
        ("meta", lambda path: path.write_text("[" * 100_000)),
        ("meta", lambda path: path.write_text("[4]")),
        ("meta", lambda path: path.write_text('{"count": 4}')),
        ("meta", meta_with(count=5)),
        ("meta", meta_with(version=1)),
        ("meta", meta_with(empty_masks="none")),
        ("meta", meta_with(mask_resize="soft")),
        *[(name, lambda path: path.unlink()) for name in ARRAYS],
        *[(name, cut) for name in ARRAYS],
        *[(name, lambda path: path.write_bytes(b"")) for name in ARRAYS],
        *[(name, lambda path: path.write_bytes(bytes(path.stat().st_size))) for name in ARRAYS],
        *[(name, other_array(lambda array: array[:3])) for name in ARRAYS],
        ("images", other_array(lambda array: array.view(np.int8))),
        ("images", other_array(lambda array: array.reshape(4, 3, 8, 8))),
        ("masks", other_array(lambda array: array.astype(float))),
        ("sizes", other_array(lambda array: array.astype(np.int32))),
        ("digests", other_array(lambda array: array.astype("U8"))),
    ],
)
def test_a_damaged_cache_is_built_again(tmp_path, name, damage):
    samples = [SyntheticSample(0, index) for index in range(4)]
    first = open_cache(samples, tmp_path, "synthetic", 8, antialias=True)
    expected = {key: np.array(getattr(first, key)) for key in ARRAYS}
    path = next(first.folder.glob(f"{name}.*"))
    damage(path)
    second = open_cache(samples, tmp_path, "synthetic", 8, antialias=True)
    assert second.folder == first.folder
    for key, array in expected.items():
        assert np.array_equal(getattr(second, key), array)
    assert second.meta == first.meta | {"count": 4, "mask_resize": "area"}
    assert list(tmp_path.iterdir()) == [first.folder]


def test_what_killed_processes_left_of_a_cache_is_removed(tmp_path):
    samples = [SyntheticSample(0, 0)]
    folder = open_cache(samples, tmp_path, "synthetic", 8, antialias=True).folder
    shutil.rmtree(folder)
    folder.write_text("no folder")
    (tmp_path / f".{folder.name}.ab12.part").mkdir()
    (tmp_path / f".{folder.name}.ab12.part" / "images.npy").write_bytes(bytes(100))
    (tmp_path / ".another-8px.ab12.part").mkdir()
    assert len(open_cache(samples, tmp_path, "synthetic", 8, antialias=True).images) == 1
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, ".another-8px.ab12.part"}


class Unreadable(SyntheticSample):
    """A sample that must not be decoded."""

    def load(self):
        raise AssertionError("decoded")


def test_too_little_room_is_known_before_anything_is_decoded(tmp_path, monkeypatch, isic_copy):
    samples = [Unreadable(0, index) for index in range(1000)]
    free = 4096 * 1000
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))
    message = r"4\.1 MB free and the decoded images need 4\.2 MB; .*paths\.cache="
    with pytest.raises(UserError, match=message):
        open_cache(samples, tmp_path / "cache", "synthetic", 32, antialias=True)
    assert list((tmp_path / "cache").iterdir()) == []
    # Masks that are not known need no room; sizes and digests need 80 bytes an image.
    unknown = [dataclasses.replace(sample, masks=()) for sample in find(isic_copy)]
    free = 10 * (3 * 32 * 32 + 80) + 4 * 128
    cache = open_cache(unknown, tmp_path / "cache", "isic2018", 32, antialias=True)
    assert cache.masks.shape == (10, 32, 32)
    assert cache.masks.max() == 0
    with pytest.raises(UserError, match=r"paths\.cache="):
        open_cache(find(isic_copy), tmp_path / "cache", "isic2018", 32, antialias=True)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, small_disk):
    # Three images of 3072 bytes fit.
    samples = [SyntheticSample(0, index) for index in range(5)]
    message = r"cache folder .* cannot be written \(File too large\); set paths\.cache .*21\.4 kB"
    with pytest.raises(UserError, match=message):
        open_cache(samples, tmp_path, "synthetic", 32, antialias=True)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_nothing(isic_copy, tmp_path):
    samples = find(isic_copy)
    samples[7].image.write_bytes(b"broken")
    root = tmp_path / "cache"
    with pytest.raises(UserError, match="ISIC_0000007.jpg cannot be decoded"):
        open_cache(samples, root, "isic2018", 16, antialias=True)
    assert list(root.iterdir()) == []


def test_a_mask_of_another_size_is_named(isic_copy, tmp_path):
    samples = find(isic_copy)
    Image.fromarray(np.zeros((50, 60), np.uint8)).save(samples[2].masks[0])
    message = r"ISIC_0000002.jpg has 192x144 .*ISIC_0000002_segmentation.png has 60x50"
    with pytest.raises(UserError, match=message):
        open_cache(samples, tmp_path / "cache", "isic2018", 16, antialias=True)


def test_a_pickled_cache_is_only_its_folder(isic_copy, tmp_path):
    cache = open_cache(find(isic_copy), tmp_path / "cache", "isic2018", 64, antialias=True)
    assert cache.images.nbytes > 100_000
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).masks, cache.masks)


def build_and_count(root, data, counter):
    """Open a cache in a process of its own and note who has decoded."""
    import datamodules.cache as cache_module

    original = cache_module._build

    def building(*arguments):
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.5)
        original(*arguments)

    cache_module._build = building
    assert open_cache(find(data), root, "isic2018", 16, antialias=True).meta["count"] == 10


def test_of_several_processes_one_builds_and_the_others_wait(isic_copy, tmp_path):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    arguments = (tmp_path / "cache", isic_copy, counter)
    processes = [context.Process(target=build_and_count, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1, "no lock is left behind"


def test_images_may_lie_where_nothing_can_be_written(isic_copy, tmp_path):
    for folder in [*isic_copy.rglob("*"), isic_copy]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    before = sorted(isic_copy.rglob("*"))
    try:
        cache = open_cache(find(isic_copy), tmp_path / "cache", "isic2018", 16, antialias=True)
    finally:
        for folder in [isic_copy, *isic_copy.rglob("*")]:
            folder.chmod(0o755)
    assert len(cache.images) == 10
    assert sorted(isic_copy.rglob("*")) == before


def test_a_cache_folder_that_cannot_be_written_is_named(isic_copy, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache folder .*/cache cannot be written .*paths.cache"):
        open_cache(find(isic_copy), tmp_path / "cache", "isic2018", 16, antialias=True)
