"""The table with a row per test image."""

from types import SimpleNamespace

import torch

from lightning_modules.callbacks import TestImages as TableOfTestImages

TRAINER = SimpleNamespace(is_global_zero=True, world_size=1)


def test_rows_are_sorted_by_id_and_a_second_test_replaces_the_first(tmp_path):
    callback = TableOfTestImages(tmp_path)
    for dice in (0.1, 0.5):
        callback.on_test_start(TRAINER, None)
        for ids in (["c", "a"], ["b"]):
            scores = {
                "dice": torch.full((len(ids),), dice, dtype=torch.float64),
                "lesion_pixels": torch.arange(len(ids)) + 7,
            }
            callback.on_test_batch_end(TRAINER, None, {"per_image": scores}, {"id": ids}, 0)
        callback.on_test_end(TRAINER, None)
    text = (tmp_path / "test_images.csv").read_text()
    assert text == "id,dice,lesion_pixels\na,0.5,8\nb,0.5,7\nc,0.5,7\n"


def test_without_images_there_is_no_table(tmp_path):
    callback = TableOfTestImages(tmp_path)
    callback.on_test_start(TRAINER, None)
    callback.on_test_end(TRAINER, None)
    assert not (tmp_path / "test_images.csv").exists()
