"""Reports find their studies: by whatever a hospital's export knows them."""

from pathlib import Path

import pytest

from pe_app.common.errors import InputError
from pe_app.pacs.importing.pseudonyms import Pseudonyms
from pe_app.reports.label_files import (
    iso_date,
    join_labels,
    label_reports,
    label_studies,
    pseudonym_of,
    read_labels,
)
from pe_app.studies import Study

STUDIES = (
    Study("ct-1", Path("a"), "P1", accession="A1", study_uid="1.2.1", date="2026-01-31"),
    Study("ct-2", Path("b"), "P1", accession="A2", study_uid="1.2.2", date="2026-02-01"),
    Study("ct-3", Path("c"), "P2", accession="A2", study_uid="1.2.3", date="2026-02-01"),
)


def labelled(tmp_path, text):
    (tmp_path / "reports.csv").write_text(text)
    return label_reports(tmp_path / "reports.csv", tmp_path / "labels.csv")


def labels_of(tmp_path, text, studies=STUDIES):
    joined = join_labels(labelled(tmp_path, text), studies)
    return {study: found.label for study, found in joined.labels.items()}


@pytest.mark.parametrize(
    ("columns", "value"),
    [
        ("study", "ct-1"),
        ("Accession Number", "A1"),
        ("AccessionNumber", " A1 "),
        ("StudyInstanceUID", "1.2.1"),
        ("study_uid", "1.2.1"),
        ("PatientID,StudyDate", "P1,20260131"),
        ("patient,date", "P1,31.01.2026"),
        ("MRN,study date", "P1,2026-01-31 14:05"),
        ("accession,patient", "A1,P1"),
    ],
)
def test_a_report_is_known_by_what_the_export_has(tmp_path, columns, value):
    assert labels_of(tmp_path, f"{columns},report\n{value},Acute PE.\n") == {"ct-1": "positive"}


def test_several_ways_of_naming_together_tell_studies_of_one_accession_number_apart(tmp_path):
    assert labels_of(tmp_path, "accession,patient,date,report\nA2,P2,2026-02-01,No PE.\n") == {"ct-3": "negative"}


def test_what_does_not_match_or_may_be_several_is_named(tmp_path):
    reports = labelled(tmp_path, "accession,report\nA1,No PE.\nA2,No PE.\nA9,Acute PE.\n")
    joined = join_labels(reports, STUDIES)
    assert [str(one.key) for one in joined.unmatched] == ["A9"]
    assert [str(one.key) for one in joined.ambiguous] == ["A2"]
    assert joined.without_report == ("ct-2", "ct-3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "accession,report\n007,No PE.\n",
            "none of the 1 reports belongs to one of the 1 studies of the list: leading ze",
        ),
        ("study_uid,report\n1.2,No PE.\n", "reports are known by study_uid, and the list has none"),
        ("accession,report\nX7,No PE.\n", "the first report is of X7, the first study is ct-1 7"),
    ],
)
def test_nothing_matched_is_an_error_that_says_why(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        labels_of(tmp_path, text, [Study("ct-1", Path("a"), accession="7")])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accession,patient,report\nA1,P2,No PE.\n", "line 2: A1 is the study ct-1, but not its patient"),
        ("accession,study_uid,report\nA1,1.2.2,No PE.\n", "line 2: A1 names several studies (ct-1, ct-2)"),
        (
            "accession,study,report\nA1,,No PE.\n,ct-1,PE.\n",
            "line 3: belongs to the study ct-1, as does reports.csv line 2",
        ),
        (
            "accession,report\nA1,No PE.\nA1,Addendum: PE.\n",
            "line 3: the report of A1 stands already in reports.csv line 2",
        ),
        ("accession,report\n,No PE.\n", "line 2: nothing identifies the study of this report"),
        ("patient,report\nP1,No PE.\n", "no column identifies the study of a report"),
        ("patient,date,report\nP1,01/02/2026,No PE.\n", "line 2: the date '01/02/2026' cannot be read"),
        ("patient,date,report\nP1,20261301,No PE.\n", "line 2: the date '20261301' cannot be read"),
    ],
)
def test_a_report_of_nobody_or_of_two_is_refused(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        labels_of(tmp_path, text)
    assert message in str(error.value)


def test_labels_keep_whose_they_are_and_can_be_corrected_by_hand(tmp_path):
    found = labelled(tmp_path, "accession;report\nA1;Acute PE, right.\nA9;Keine Lungenembolie.\n")
    assert read_labels(tmp_path / "labels.csv") == tuple(
        one.__class__(one.place.replace("reports", "labels"), one.key, one.found) for one in found
    )
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace("positive", "negative"))
    joined = join_labels(read_labels(tmp_path / "labels.csv"), STUDIES)
    assert [study.label for study in label_studies(STUDIES, joined.labels)] == ["negative", "", ""]


def test_the_key_of_a_deidentified_import_finds_its_studies(tmp_path):
    key = Pseudonyms(b"0123456789abcdef")
    hidden = Study("ct-9", Path("a"), key.code("patient", "P1"), accession=key.code("accession", "A1"),
                   study_uid=key.uid("1.2.1"), date=key.date("P1", "2026-01-31"))  # fmt: skip
    for text in (
        "accession,report\nA1,PE.\n",
        "patient,date,report\nP1,20260131,PE.\n",
        "study_uid,report\n1.2.1,PE.\n",
    ):
        reports = labelled(tmp_path, text)
        assert join_labels(reports, [hidden], lambda one: pseudonym_of(one, key)).studies == {
            "reports.csv line 2": "ct-9"
        }
    with pytest.raises(InputError, match="a de-identified list needs its --key"):
        join_labels(labelled(tmp_path, "accession,report\nA1,PE.\n"), [hidden])


def test_days_are_read_in_spellings_that_cannot_be_mistaken():
    assert {iso_date(text, "x") for text in ("20260103", "2026-01-03", "2026/1/3", "3.1.2026", "20260103T1200")} == {
        "2026-01-03"
    }
