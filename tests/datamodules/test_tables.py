"""Tables in the forms in which they are handed out."""

import pytest

from common.errors import UserError
from datamodules.tables import read_table


@pytest.mark.parametrize(
    "content",
    [
        b"image,lesion\r\na,1\r\nb,\r\n",
        "\ufeffimage,lesion\na,1\nb,\n".encode(),
        b"image\tlesion\na\t1\nb\t\n",
        b'"lesion","image"\n"1","a"\n"","b"\n',
        b"image,lesion\n a , 1 \nb,\n\n,\n",
    ],
)
def test_rows_are_read_by_their_key(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content)
    rows = read_table(tmp_path / "table.csv", "image", ["lesion"], "get it")
    assert {key: row["lesion"] for key, row in rows.items()} == {"a": "1", "b": ""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image\na\n", "table.csv has no columns lesion; get it."),
        (b"", "table.csv has no columns image and lesion; get it."),
        (b"\x89PNG\xff\xfe\x00,", "table.csv has no columns image and lesion; get it."),
        (b"image,lesion\na,1\na,1\n", "table.csv has two rows of a; remove one of them."),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, content, message):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "table.csv", "image", ["lesion"], "get it")
