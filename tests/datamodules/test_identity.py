"""Which images are the same photograph."""

import numpy as np
import pytest

from datamodules.decoding import read_image
from datamodules.identity import image_keys, photograph_digest
from datamodules.isic2018 import ISIC2018


def same(first, second, namespaces=(None, None), digests=(None, None)):
    keys = [
        image_keys([name], space, digest and {name: digest})[name]
        for name, space, digest in zip((first, second), namespaces, digests, strict=True)
    ]
    return bool(keys[0] & keys[1])


@pytest.mark.parametrize(
    ("first", "second", "namespaces", "expected"),
    [
        ("ISIC_0000123", "ISIC_0000123", ("ISIC2017", "ISIC2018"), True),
        ("ISIC_0000123_downsampled", "test/isic_0000123", ("ISIC2019", None), True),
        ("p1/ISIC_0000123", "p2/ISIC_0000124", (None, None), False),
        ("ISIC_00001234", "ISIC_0000123", (None, None), False),
        ("IMD001", "IMD001", ("PH2", "PH2"), True),
        ("IMD001", "IMD001", ("PH2", "MediqaMagic"), False),
        ("001", "001", (None, None), False),
        ("train/001", "test/001", (None, None), False),
    ],
)
def test_names_identify_published_photographs(first, second, namespaces, expected):
    assert same(first, second, namespaces) is expected


def test_content_identifies_photographs_under_any_name():
    assert same("a", "test/b", digests=("0" * 16, "0" * 16))
    assert not same("a", "a", digests=("0" * 16, "1" * 16))
    # The archive has published one photograph in several sizes.
    assert same("ISIC_0000123", "ISIC_0000123", digests=("0" * 16, "1" * 16))


def test_keys_do_not_give_names_away():
    (keys,) = image_keys(["Doe_Jane"], "PH2", {"Doe_Jane": "0" * 16}).values()
    assert len(keys) == 2
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_a_digest_changes_with_pixels_and_shape():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    digest = photograph_digest(image)
    assert photograph_digest(np.asfortranarray(image)) == digest
    assert photograph_digest(image.reshape(7, 5, 3)) != digest
    changed = image.copy()
    changed[4, 6, 2] += 1
    assert photograph_digest(changed) != digest


def test_a_datamodule_has_the_digests_of_its_photographs(isic_copy, load):
    datamodule = load(ISIC2018, isic_copy / "isic2018")
    samples = datamodule.find_samples()
    assert datamodule.find_parts() == datamodule.parts
    expected = {sample.id: photograph_digest(read_image(sample.image)) for sample in samples}
    assert datamodule.digests == expected
    assert len(set(expected.values())) == 10
    assert load(ISIC2018, isic_copy / "isic2018", image_size=24).digests == expected
