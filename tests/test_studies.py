from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pe_app.common.errors import InputError
from pe_app.studies import (
    Study,
    StudyAttributes,
    annotated,
    label_only,
    missing,
    read_studies,
    split_studies,
    unfit,
    write_studies,
)

HEADER = "study,path,patient,label,annotation,split\n"


def listed(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "studies.csv"
    path.write_bytes(text.encode(encoding))
    return path


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(InputError) as error:
        read_studies(listed(tmp_path, text))
    return str(error.value)


# the CSV


def test_a_study_list_by_hand(tmp_path):
    text = (
        HEADER + 'a,ct/a.nrrd,p1,positive,notes/a.json,train\n"b, second",ct/b,,,,\nc,/elsewhere/c,p2,Negative,,test\n'
    )
    assert read_studies(listed(tmp_path, text)) == (
        Study("a", tmp_path / "ct/a.nrrd", "p1", "positive", tmp_path / "notes/a.json", "train"),
        Study("b, second", tmp_path / "ct/b"),
        Study("c", Path("/elsewhere/c"), "p2", "negative", None, "test"),
    )


def test_columns_may_come_in_any_order_and_only_two_are_required(tmp_path):
    assert read_studies(listed(tmp_path, "Path, Study\nx.nrrd,x\n\n,\ny.nrrd,y\n")) == (
        Study("x", tmp_path / "x.nrrd"),
        Study("y", tmp_path / "y.nrrd"),
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_excels_byte_order_mark_and_line_ends_do_not_matter(tmp_path, encoding):
    text = HEADER + "a,é.nrrd,,positive,,\n"
    path = listed(tmp_path, text.replace("\n", "\r\n"), encoding)
    assert read_studies(path) == (Study("a", tmp_path / "é.nrrd", label="positive"),)


def test_a_list_with_source_terms_and_attributes_is_written_and_read_back(tmp_path):
    text = (
        "study,path,label,source,terms,central,side,chronicity,rv_lv,quality,mimic\n"
        "a,a.nrrd,positive,rspect,non-commercial,yes,both,acute,1 or above,motion,\n"
        "b,b.nrrd,negative,,,,,,,,flow artifact\n"
    )
    studies = read_studies(listed(tmp_path, text))
    attributes = StudyAttributes("yes", "both", "acute", "1 or above", "motion")
    assert studies[0] == Study(
        "a", tmp_path / "a.nrrd", "", "positive", None, "", "rspect", "non-commercial", attributes
    )
    assert studies[1].attributes == StudyAttributes(mimic="flow artifact")
    write_studies(split_studies(studies), tmp_path / "again.csv")
    again = read_studies(tmp_path / "again.csv")
    assert [replace(study, split="") for study in again] == list(studies)
    write_studies(studies[1:], tmp_path / "few.csv")
    assert (tmp_path / "few.csv").read_text().splitlines()[0] == HEADER.strip() + ",mimic"


NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
FILES = st.lists(st.text("abcé ,;\"'", min_size=1).map(lambda name: f"x{name}x"), min_size=1, max_size=3).map("/".join)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            NAMES,
            FILES,
            NAMES | st.just(""),
            st.sampled_from(["positive", "negative", "uncertain", ""]),
            FILES | st.none(),
        ),
        unique_by=(lambda row: row[0], lambda row: row[1]),
        max_size=6,
    )
)
def test_write_read_round_trip(tmp_path, rows):
    folder = tmp_path / "list"
    studies = tuple(
        Study(study, folder / path, patient, label, annotation and folder / annotation, "validation")
        for study, path, patient, label, annotation in rows
    )
    write_studies(studies, folder / "studies.csv")
    assert read_studies(folder / "studies.csv") == studies


def test_a_folder_of_studies_can_be_moved_as_a_whole(tmp_path):
    (tmp_path / "old" / "ct").mkdir(parents=True)
    (tmp_path / "old" / "ct" / "a.nrrd").write_bytes(b"")
    write_studies([Study("a", tmp_path / "old" / "ct" / "a.nrrd")], tmp_path / "old" / "studies.csv")
    assert (tmp_path / "old" / "studies.csv").read_text() == HEADER + "a,ct/a.nrrd,,,,\n"
    (tmp_path / "old").rename(tmp_path / "new")
    (study,) = read_studies(tmp_path / "new" / "studies.csv")
    assert study.path.is_file()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "studies.csv: the column 'study' is missing"),
        ("study,label\na,positive\n", "studies.csv: the column 'path' is missing"),
        ("study,path,side\na,b," + "x" * 201 + "\n", "line 2: the side must be at most 200 printable characters"),
        ("study,path,lable\n", "studies.csv: unknown column 'lable'; the columns are study, path, patient"),
        ("study,path,path\n", "studies.csv: a column stands twice"),
        (HEADER + "a,a.nrrd,,,\n", "studies.csv line 2: 5 values for 6 columns"),
        (HEADER + "\na,b,c,d,e,f,g\n", "studies.csv line 3: 7 values for 6 columns"),
        (HEADER + ",a.nrrd,,,,\n", "studies.csv line 2: the study is empty"),
        (HEADER + "a, ,,,,\n", "studies.csv line 2: the path is empty"),
        (HEADER + "a,a.nrrd,,1,,\n", "studies.csv line 2: unknown label '1'; write positive, negative, uncertain"),
        (HEADER + "a,a.nrrd,,,,val\n", "studies.csv line 2: unknown split 'val'; write train, validation, test"),
        (HEADER + "a,a,,,,\nb,b,,,,\na,c,,,,\n", "line 4: the study a stands already in studies.csv line 2"),
        (HEADER + "a,a,,,,\nb,a,,,,\n", "line 3: the CT a stands already in studies.csv line 2"),
        (
            HEADER + "a,a,p,,,train\nb,b,p,,,\nc,c,p,,,test\n",
            "studies.csv line 4: patient p is in test here but in train in studies.csv line 2",
        ),
        (HEADER + 'a,"b\n', "studies.csv: is not a CSV file: in the row that begins on line 2"),
        (HEADER + "a,v/a,,,,train\nb,v/../v/a,,,,test\n", "line 3: the CT a stands already in studies.csv line 2"),
        (HEADER.strip() + ",fitness\na,a,,,,,bad\n", "line 2: unknown fitness 'bad'; write fit, warned, refused"),
    ],
)
def test_bad_lists_are_refused_naming_the_line(tmp_path, text, sentence):
    assert sentence in refused(tmp_path, text)


def test_a_list_in_another_encoding_or_none_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match=r'is not UTF-8 text: in Excel save it as "CSV UTF-8"'):
        read_studies(listed(tmp_path, HEADER + "a,é.nrrd,,,,\n", "latin-1"))
    with pytest.raises(InputError, match=r"none\.csv: cannot be read: No such file"):
        read_studies(tmp_path / "none.csv")


def test_a_ct_and_a_link_to_it_are_one_study(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"")
    (tmp_path / "b.nrrd").symlink_to("a.nrrd")
    assert "the CT b.nrrd stands already" in refused(tmp_path, HEADER + "a,a.nrrd,,,,train\nb,b.nrrd,,,,test\n")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_semicolons_and_tabs_separate_columns_as_well(tmp_path, separator):
    text = (
        separator.join(("study", "path", "label")) + "\n" + separator.join(("a", "Müller, ct.nrrd", "positive")) + "\n"
    )
    assert read_studies(listed(tmp_path, text)) == (Study("a", tmp_path / "Müller, ct.nrrd", label="positive"),)


def test_what_an_import_knows_is_kept_and_columns_that_nobody_fills_are_not_written(tmp_path):
    known = Study(
        "a",
        tmp_path / "a",
        "p",
        accession="007",
        study_uid="1.2.3",
        date="2026-01-31",
        fitness="refused",
        reasons="no_contrast tilted",
    )
    plain = Study("b", tmp_path / "b")
    write_studies([known, plain], tmp_path / "studies.csv")
    assert read_studies(tmp_path / "studies.csv") == (known, plain)
    assert unfit([known, plain]) == (known,)
    write_studies([plain], tmp_path / "studies.csv")
    assert (tmp_path / "studies.csv").read_text() == HEADER + "b,b,,,,\n"


def test_missing_files_are_listed(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"")
    studies = [
        Study("a", tmp_path / "a.nrrd", annotation=tmp_path / "a.json"),
        Study("b", tmp_path / "b.nrrd"),
        Study("c", tmp_path),
    ]
    assert missing(studies) == (tmp_path / "a.json", tmp_path / "b.nrrd")


def test_annotated_and_label_only_share_out_the_list():
    one, two = Study("a", Path("a"), annotation=Path("a.json")), Study("b", Path("b"))
    assert annotated([one, two]) == (one,)
    assert label_only([one, two]) == (two,)


# the split


def studies_of(*rows: tuple[str, str]) -> list[Study]:
    return [Study(str(n), Path(str(n)), patient, label) for n, (patient, label) in enumerate(rows)]


def share(studies, label: str) -> float:
    chosen = [study.split == "validation" for study in studies if study.label == label]
    return sum(chosen) / len(chosen)


def test_the_split_is_stratified_exactly_and_repeatable():
    studies = studies_of(*[("", "positive")] * 50, *[("", "negative")] * 100, *[("", "")] * 10)
    done = split_studies(studies, 0.2, seed=3)
    assert [share(done, label) for label in ("positive", "negative", "")] == [0.2, 0.2, 0.2]
    assert done == split_studies(studies, 0.2, seed=3)
    assert done != split_studies(studies, 0.2, seed=4)
    assert {study.study: study.split for study in done} == {
        study.study: study.split for study in split_studies(studies[::-1], 0.2, seed=3)
    }, "the order of the list does not matter"


def test_annotated_studies_are_shared_out_too():
    studies = [replace(study, annotation=Path("x")) for study in studies_of(*[("", "positive")] * 10)]
    studies += [replace(study, study=f"l{study.study}") for study in studies_of(*[("", "positive")] * 40)]
    assert share(annotated(split_studies(studies)), "positive") == 0.2


def test_a_study_added_later_moves_at_most_one_other():
    studies = studies_of(*[("", "positive")] * 23, *[("", "negative")] * 31)
    for seed in range(20):
        before = split_studies(studies, seed=seed)
        after = split_studies([*studies, Study("new", Path("new"), "", "positive")], seed=seed)
        assert sum(one.split != other.split for one, other in zip(before, after, strict=False)) <= 1


def test_splits_that_are_written_down_stay_and_count():
    studies = studies_of(*[("", "positive")] * 20, *[("", "negative")] * 20)
    once = split_studies(studies)
    more = [replace(study, study=f"n{study.study}") for study in studies]
    twice = split_studies([*once, *more])
    assert twice[:40] == once
    assert share(twice, "positive") == share(twice, "negative") == 0.2
    fixed = [replace(study, split="test") for study in studies]
    assert split_studies(fixed) == tuple(fixed)


def test_a_patient_already_in_test_stays_there_with_new_studies():
    studies = [Study("a", Path("a"), "p", "positive", split="test"), Study("b", Path("b"), "p", "negative")]
    assert [study.split for study in split_studies(studies)] == ["test", "test"]


def test_a_patient_on_both_sides_is_refused():
    studies = [Study("a", Path("a"), "p", split="train"), Study("b", Path("b"), "p", split="validation")]
    with pytest.raises(InputError, match="study b: patient p is in validation here but in train in study a"):
        split_studies(studies)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, float("nan")])
def test_a_fraction_that_leaves_one_side_empty_is_a_programmers_mistake(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_studies([], fraction)


def lacking(pairs) -> int:
    """How many of (side, class) are missing among (split, label) pairs."""
    return 4 - len(set(pairs) & set(product(("train", "validation"), ("positive", "negative"))))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "p", "q", "r"]),
            st.sampled_from(["positive", "positive", "negative", "uncertain", ""]),
            st.sampled_from(["", "", "", "train", "validation", "test"]),
        ),
        max_size=7,
    ),
    st.sampled_from([0.05, 0.2, 0.5, 0.9]),
    st.integers(0, 5),
)
def test_both_sides_have_both_classes_wherever_any_split_by_patient_can(rows, fraction, seed):
    known: dict[str, str] = {}
    studies = []
    for number, (patient, label, split) in enumerate(rows):
        fixed = known.setdefault(patient, split) if patient else split
        studies.append(Study(str(number), Path(str(number)), patient, label, split=fixed))
    done = split_studies(studies, fraction, seed)

    groups = [study.patient or f"study {study.study}" for study in studies]
    assert all(study.split for study in done)
    assert all(not before.split or before == after for before, after in zip(studies, done, strict=True))
    assert len({(group, study.split) for group, study in zip(groups, done, strict=True)}) == len(set(groups))

    decided = {group: study.split for group, study in zip(groups, studies, strict=True) if study.split}
    undecided = sorted(set(groups) - set(decided))
    fewest = 4
    for sides in product(("train", "validation"), repeat=len(undecided)):
        side = decided | dict(zip(undecided, sides, strict=True))
        fewest = min(fewest, lacking((side[group], study.label) for group, study in zip(groups, studies, strict=True)))
    assert lacking((study.split, study.label) for study in done) == fewest


def test_thousands_of_studies_are_split_at_once():
    studies = studies_of(*[(f"p{n % 4000}", "positive") for n in range(8000)])
    assert share(split_studies(studies), "positive") == 0.2
