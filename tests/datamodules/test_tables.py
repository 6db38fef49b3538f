"""Tables in the forms in which they are handed out."""

import pytest

from common.errors import UserError
from datamodules.tables import read_records, read_table


@pytest.mark.parametrize(
    "content",
    [
        b"image,lesion\r\na,1\r\nb,\r\n",
        "\ufeffimage,lesion\na,1\nb,\n".encode(),
        b"image\tlesion\na\t1\nb\t\n",
        b'"lesion","image"\n"1","a"\n"","b"\n',
        b"image,lesion\n a , 1 \nb,\n\n,\n",
        b"image;lesion\na;1\nb;\n",
        b"sep=;\r\nimage;lesion\r\na;1\r\nb;\r\n",
        b" image , lesion \na,1,\nb\n",
        *(
            "\ufeffimage;lesion\r\na;1\r\nb;\r\n".encode(f"utf-16-{order}")
            for order in ("le", "be")
        ),
        *("image\tlesion\na\t1\nb\t\n".encode(f"utf-16-{order}") for order in ("le", "be")),
    ],
)
def test_rows_are_read_by_their_key(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content)
    rows = read_table(tmp_path / "table.csv", "image", ["lesion"], "get it")
    assert {key: row["lesion"] for key, row in rows.items()} == {"a": "1", "b": ""}


def test_columns_may_be_in_any_case(tmp_path):
    (tmp_path / "table.csv").write_bytes("ID;Lesion\na;1\n".encode("utf-16"))
    rows = read_table(tmp_path / "table.csv", "id", ["lesion"], "get it")
    assert rows["a"]["lesion"] == "1"
    (tmp_path / "table.csv").write_text("ID,Id,lesion\na,b,1\n")
    with pytest.raises(UserError, match="no columns id"):
        read_table(tmp_path / "table.csv", "id", ["lesion"], "get it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image\na\n", "table.csv has no columns lesion; get it."),
        (b"", "table.csv has no columns image and lesion; get it."),
        (b"\x89PNG\xff\xfe\x00,", r"table.csv cannot be read \(it is no text\)"),
        (b"\x00\xff\xfe\x89PNG" * 30, r"table.csv cannot be read \(it is no text\)"),
        (b"image,lesion\na,1\na,1\n", "table.csv has two rows of a; remove one of them."),
        (b"image;place;age\na;b;1\n", "no columns lesion; .* columns are image, place, age"),
        (b"image,lesion\na,1\nb,2,3\n", "Row 3 of .*table.csv has 3 fields.* has 2; .*quotes"),
        (b"image,lesion,lesion\na,1,2\n", "table.csv has two columns lesion"),
        (b'image,lesion\na,"1\nb,2\n', "table.csv cannot be read"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, content, message):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "table.csv", "image", ["lesion"], "get it")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_may_stand_in_fields_and_names(tmp_path, encoding, separator):
    rows = [
        ["id", "Befund, histologisch", "größe; mm"],
        ["a", "nävus, junctional", "1,5"],
        ["b", "x\ty", "2;5"],
    ]
    lines = [separator.join(f'"{field}"' for field in row) for row in rows]
    (tmp_path / "table.csv").write_bytes("\r\n".join(lines).encode(encoding))
    header, records = read_records(tmp_path / "table.csv", "get it")
    assert header == rows[0]
    assert [list(record.values()) for record in records] == rows[1:]


def test_the_known_columns_decide_the_separator(tmp_path):
    (tmp_path / "table.csv").write_text("id;label, of two experts\na;nv, mel\nb;bcc, mel\n")
    columns = ["id", "label, of two experts"]
    assert read_records(tmp_path / "table.csv", "get it", columns)[0] == columns
