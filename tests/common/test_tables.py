"""Tables as spreadsheets and databases write them."""

import csv
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pe_app.common.errors import InputError
from pe_app.common.tables import read_table, table_text


def read(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path)


def values(table):
    return [dict(row.values) for row in table.rows]


@pytest.mark.parametrize(
    "content",
    [
        'study,report\n1,"No PE, clear"\n',
        '"study","report"\r\n"1","No PE, clear"\r\n',
        "study;report\n1;No PE, clear\n",
        "study\treport\n1\tNo PE, clear\n",
        "sep=;\nstudy;report\n1;No PE, clear\n",
        'sep=,\r\nstudy,report\r\n1,"No PE, clear"\r\n',
        '"sep=|"\nstudy|report\n1|No PE, clear\n',
        'study, report\n1, "No PE, clear"\n',
        'study,report,\n1,"No PE, clear",\n,,\n',
        "\ufeffStudy;Report\n1;No PE, clear\n",
        "study\treport\r\n1\tNo PE, clear\r\n".encode("utf-16"),  # Excel's "Unicode text"
    ],
)
def test_one_table_in_many_dresses(tmp_path, content):
    assert values(read(tmp_path, content)) == [{"study": "1", "report": "No PE, clear"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("study,report\nA,No prior PE, new defect\n", "t.csv line 2: 3 values for 2 columns"),
        ("study;report\nA;No PE\nB;No; PE\n", "t.csv line 3: 3 values for 2 columns; put values with semicolons"),
        ("study,report\nA,IMPRESSION:\nNo PE\n", "t.csv line 3: 1 value for 2 columns"),
        ('study,report\nA,"one\ntwo"\nB,x,y\n', "t.csv line 4: 3 values"),
        ("sep=;\nstudy;report\nA;x;y\n", "t.csv line 3: 3 values"),
        ("study,report,\nA,No PE, defect\n", "t.csv line 2: a value in a column without a name"),
        ('study,report\nA,"x\n', "in the row that begins on line 2: unexpected end of data"),
        ('study,report\nA,x\nB,"He said "no PE" today"\n', "in the row that begins on line 3"),
        ("study,study\n", "a column stands twice"),
        ("study,report\nA,x\0y\n", "t.csv line 2: holds a NUL character"),
        ("study,report\nA,Müller".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert message in str(error.value)


def test_what_is_written_is_read_again(tmp_path):
    rows = [["1", 'a "quoted", text;\nof two lines'], ["2", "ü\tß"]]
    assert values(read(tmp_path, table_text(("study", "report"), rows))) == [
        {"study": study, "report": report} for study, report in rows
    ]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="'=+-@1e.a ", min_size=1, max_size=6).map(str.strip), min_size=2, max_size=2))
def test_a_spreadsheet_runs_nothing_that_is_written_and_a_program_reads_it_back(tmp_path_factory, cells):
    text = table_text(("study", "report"), [["x", cells[0]], ["y", cells[1]]])
    for cell in (row[1] for row in csv.reader(text.splitlines()[1:])):
        runs = cell[:1] in tuple("=+-@")
        assert not runs or math.isfinite(float(cell))  # "-0.5" is a number to a spreadsheet, too
    found = values(read(tmp_path_factory.mktemp("table"), text))
    assert [row["report"] for row in found] == cells
