"""NumPy files that are written by rows and checked by their size."""

import errno
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common.arrays import ArrayWriter, array_bytes, is_whole_array


@pytest.mark.parametrize(
    "array",
    [
        np.arange(40 * 3 * 5, dtype=np.uint8).reshape(40, 3, 5),
        np.arange(80).reshape(40, 2),
        np.array([f"digest {n}" for n in range(40)], "U16"),
    ],
    ids=["bytes", "integers", "text"],
)
def test_rows_of_several_threads_make_the_file_of_numpy(tmp_path, array):
    kind = (array.shape, array.dtype)
    np.save(tmp_path / "numpy.npy", array)
    order = np.random.default_rng(0).permutation(len(array)).tolist()
    with ArrayWriter(tmp_path / "ours.npy", *kind) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: writer.__setitem__(index, array[index]), order))
    written = (tmp_path / "ours.npy").read_bytes()
    assert written == (tmp_path / "numpy.npy").read_bytes()
    assert len(written) == array_bytes(*kind)
    assert is_whole_array(tmp_path / "ours.npy", *kind)


def test_rows_that_are_not_written_are_zeros(tmp_path):
    with ArrayWriter(tmp_path / "a.npy", (5, 3), "int64") as writer:
        writer[2] = [7, 8, 9]
        for index in (5, -1):
            with pytest.raises(IndexError, match=f"row {index} of 5"):
                writer[index] = [1, 1, 1]
        with pytest.raises(ValueError, match="shape"):
            writer[0] = [1, 1]
    assert np.load(tmp_path / "a.npy").tolist() == [[0] * 3, [0] * 3, [7, 8, 9], [0] * 3, [0] * 3]


def test_what_is_not_the_expected_array_is_not_whole(tmp_path):
    path = tmp_path / "a.npy"
    array = np.ones((6, 4), np.uint8)
    np.save(path, array)
    whole = path.read_bytes()
    assert is_whole_array(path, (6, 4), "uint8")
    for shape, dtype in (((4, 6), "uint8"), ((24,), "uint8"), ((6, 4), "int8"), ((3, 4), "<u2")):
        assert not is_whole_array(path, shape, dtype)
    for content in (b"", whole[:100], whole[:-1], whole + b"1", bytes(len(whole))):
        path.write_bytes(content)
        assert not is_whole_array(path, (6, 4), "uint8")
    np.save(path, np.asfortranarray(array))
    assert not is_whole_array(path, (6, 4), "uint8")
    path.unlink()
    assert not is_whole_array(path, (6, 4), "uint8")
    path.mkdir()
    assert not is_whole_array(path, (6, 4), "uint8")


def test_a_full_disk_raises(tmp_path, small_disk):
    def write():
        with ArrayWriter(tmp_path / "a.npy", (40, 1000), "uint8") as writer:
            for index in range(40):
                writer[index] = np.ones(1000)

    with pytest.raises(OSError, match="large") as raised:
        write()
    assert raised.value.errno == errno.EFBIG
