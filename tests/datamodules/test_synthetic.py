"""Made-up images: deterministic, hard for a threshold, exact in their masks."""

import numpy as np
import pytest

from common.errors import UserError
from datamodules import Synthetic
from datamodules.synthetic import synthesise_lesion


def test_images_are_a_function_of_seed_and_index():
    image, mask = synthesise_lesion(0, 3)
    again, mask_again = synthesise_lesion(0, 3)
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)
    assert not np.array_equal(image, synthesise_lesion(0, 4)[0])
    assert not np.array_equal(image, synthesise_lesion(1, 3)[0])


def test_lesions_are_plausible():
    samples = [synthesise_lesion(0, index) for index in range(40)]
    areas = np.array([mask.mean() for _, mask in samples])
    assert areas.min() > 0.02
    assert areas.max() < 0.7
    assert areas.std() > 0.05
    for image, mask in samples:
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == (*mask.shape, 3)
        assert set(np.unique(mask)) == {0, 1}
    # Lesions are darker than the skin around them, but not by much.
    contrast = [i[m == 1].mean() / i[m == 0].mean() for i, m in samples]
    assert 0.6 < np.median(contrast) < 1.05


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"datamodule.root=photos .* add datamodule=folder"):
        Synthetic(root="photos", cache=tmp_path, image_size=8, batch_size=2)


def test_splits_are_disjoint_and_the_seed_keeps_the_content(tmp_path):
    def parts(seed):
        datamodule = Synthetic(
            num_samples=20, cache=tmp_path, image_size=8, batch_size=2, seed=seed
        )
        datamodule.prepare_data()
        datamodule.setup()
        return datamodule

    one, two = parts(0), parts(1)
    assert one.split_sha == two.split_sha
    assert one.cache == two.cache
    assert [len(one.datasets[p]) for p in ("train", "val", "test")] == [14, 2, 4]
    assert len({sample for dataset in one.datasets.values() for sample in dataset.ids}) == 20
