"""CSV files are whole, and one process has its own rows."""

import csv

from common.tables import gather_rows, write_rows


def test_rows_come_back(tmp_path):
    rows = [{"id": "a,b", "dice": 0.5}, {"id": 'c"d', "dice": 1}]
    write_rows(tmp_path / "out" / "rows.csv", gather_rows(rows))
    with (tmp_path / "out" / "rows.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"id": "a,b", "dice": "0.5"},
            {"id": 'c"d', "dice": "1"},
        ]
    write_rows(tmp_path / "out" / "rows.csv", [{"id": "=cmd|calc", "dice": -0.5}])
    assert (tmp_path / "out" / "rows.csv").read_text() == "id,dice\n'=cmd|calc,-0.5\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows.csv"]
