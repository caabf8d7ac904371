from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import nrrd
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pe_app.annotation.record import CandidateDecision, Reading
from pe_app.annotation.seg_nrrd import read_segmentation, write_segment
from pe_app.annotation.sparse import (
    ReviewedSlice,
    SparseAnnotation,
    slice_masks,
    slice_schedule,
)
from pe_app.common.errors import InputError
from pe_app.ct.lungs import SliceRange
from pe_app.ct.volume import Volume, axial_affine

SHAPE = (9, 14, 11)
SPACING = (2.5, 0.8, 0.7)
ORIGIN = (-31.0, 12.5, -200.25)
CT = Volume(
    np.random.default_rng(5).integers(-1024, 500, SHAPE).astype(np.int16), axial_affine(SPACING, ORIGIN), "the CT"
)
READERS = st.text(st.characters(categories=("L", "N", "Zs"), include_characters=".,:;-{}[]()'&"), max_size=12).filter(
    str.isprintable
)
TIMES = st.datetimes(min_value=datetime(1900, 1, 1)).map(lambda time: time.isoformat(timespec="seconds") + "Z")
NOTES = st.text(st.characters(categories=("L", "N", "P", "S", "Zs"), include_characters="\n\t"), max_size=12).filter(
    lambda text: all(letter.isprintable() or letter in "\n\t" for letter in text)
)
QUICK = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def annotations(draw):
    annotation = SparseAnnotation.empty(CT)
    for index in draw(st.sets(st.integers(0, SHAPE[0] - 1))):
        state = draw(st.sampled_from(["embolism", "none", "uncertain"]))
        mask, not_outlined = None, state == "embolism" and draw(st.booleans())
        if state == "embolism" and not not_outlined:
            mask = np.random.default_rng(draw(st.integers(0, 99))).random(SHAPE[1:]) < 0.2
            mask[draw(st.integers(0, 13)), draw(st.integers(0, 10))] = True
        z_mm = float(CT.slice_z_mm[index])
        time, note = draw(st.just("") | TIMES), draw(NOTES)
        reviewed = ReviewedSlice(index, z_mm, state, draw(READERS), time, not_outlined, note)
        annotation = annotation.review(reviewed, mask)
    kinds = draw(st.lists(st.sampled_from(["accepted", "rejected", "corrected", "undecided"]), max_size=3))
    decisions = tuple(decision(kind, rank) for rank, kind in enumerate(kinds, start=1))
    reading = draw(
        st.sampled_from([Reading(), Reading("independent", "Bo", 2), Reading("consensus", "", 3, ("r1", "r2"))])
    )
    return replace(annotation, decisions=decisions, note=draw(NOTES), reading=reading)


def same(one: SparseAnnotation, other: SparseAnnotation) -> bool:
    masks = one.masks.keys() == other.masks.keys() and all(
        np.array_equal(one.masks[index], other.masks[index]) for index in one.masks
    )
    return masks and one.to_json() == other.to_json()


def reviewed(index: int, state: str = "none") -> ReviewedSlice:
    return ReviewedSlice(index, float(CT.slice_z_mm[index]), state, "AB", "2024-05-31T08:15:00Z")


def outline(row: int = 3, column: int = 4) -> np.ndarray:
    mask = np.zeros(SHAPE[1:], dtype=bool)
    mask[row : row + 3, column : column + 2] = True
    return mask


def example() -> SparseAnnotation:
    annotation = SparseAnnotation.empty(CT).review(reviewed(2, "embolism"), outline())
    return annotation.review(reviewed(6, "uncertain")).review(reviewed(4))


MODEL = "a" * 64


def decision(kind: str = "rejected", rank: int = 1, slice_index: int = 5, **more: object) -> CandidateDecision:
    centre = (-28.0, 17.0, float(CT.slice_z_mm[slice_index]))
    return CandidateDecision(kind, MODEL, rank, centre, slice_index, reader="AB", time="2024-05-31T08:16:00Z", **more)


def full_example() -> SparseAnnotation:
    """Everything that schema 2 knows."""
    seen = ReviewedSlice(7, float(CT.slice_z_mm[7]), "embolism", "AB", "2024-05-31T08:15:00Z", not_outlined=True)
    seen = replace(seen, note='thin; see 50 % of "vessel" \\ | next\nline, größer')
    return replace(
        example().review(seen),
        decisions=(decision("accepted", 2, 2, extent_mm=(11.0, 22.0, 5.0), score=0.75), decision()),
        note="motion | at the base\n2nd line",
        reading=Reading("independent", "AB", 2, unblinded="2024-05-31T08:17:00Z"),
    )


def header_of(path: Path) -> dict:
    return nrrd.read(str(path), index_order="F")[1]


# what is reviewed


def test_a_slice_that_is_not_listed_is_not_reviewed_and_not_negative():
    annotation = example()
    states = [annotation.state(index) for index in range(SHAPE[0])]
    assert states == [None, None, "embolism", None, "none", None, "uncertain", None, None]


def test_a_schedule_is_complete_when_all_of_its_slices_are_reviewed_whatever_was_seen():
    annotation = example()
    assert annotation.open_slices([0, 2, 4, 6, 8]) == (0, 8)
    assert not annotation.is_complete([0, 2])
    assert annotation.is_complete([2, 4, 6])
    assert SparseAnnotation.empty(CT).open_slices([1, 5]) == (1, 5)


def test_reviewing_a_slice_again_replaces_the_word_and_the_outline():
    first = example()
    second = first.review(reviewed(2, "none"))
    assert second.state(2) == "none"
    assert dict(second.masks) == {}
    assert first.state(2) == "embolism", "the former annotation is unchanged"
    third = second.review(reviewed(2, "embolism"), outline(8, 1))
    assert np.array_equal(third.masks[2], outline(8, 1))
    assert [entry.slice_index for entry in third.slices] == [2, 4, 6]


def test_an_outline_cannot_be_changed_behind_the_annotation():
    mask = outline()
    annotation = SparseAnnotation.empty(CT).review(reviewed(2, "embolism"), mask)
    mask[:] = False
    assert annotation.masks[2].sum() == 6
    with pytest.raises(ValueError, match="read-only"):
        annotation.masks[2][0, 0] = True


@pytest.mark.parametrize("mask", [None, np.zeros(SHAPE[1:], dtype=bool)])
def test_an_outline_that_is_lost_is_refused(mask):
    with pytest.raises(InputError, match="slice 2 is listed as embolism but nothing is outlined"):
        SparseAnnotation.empty(CT).review(reviewed(2, "embolism"), mask)


def test_embolism_may_be_marked_without_an_outline_on_purpose():
    marked = replace(reviewed(2, "embolism"), not_outlined=True)
    annotation = SparseAnnotation.empty(CT).review(marked)
    assert annotation.state(2) == "embolism"
    assert dict(annotation.masks) == {}
    assert annotation.is_complete([2])
    outlined = annotation.review(reviewed(2, "embolism"), outline())
    assert list(outlined.masks) == [2]
    assert dict(outlined.review(marked).masks) == {}, "and back"


@pytest.mark.parametrize("state", ["none", "uncertain"])
def test_an_outline_on_a_slice_without_embolism_is_refused(state):
    with pytest.raises(InputError, match="outline on slice 2, which is not listed as embolism"):
        SparseAnnotation.empty(CT).review(reviewed(2, state), outline())


def test_an_outline_of_another_matrix_is_refused():
    with pytest.raises(InputError, match=r"the mask of slice 2 is \(5, 5\), not \(14, 11\)"):
        SparseAnnotation.empty(CT).review(reviewed(2, "embolism"), np.ones((5, 5), dtype=bool))


def test_a_dense_mask_becomes_reviewed_slices_only_where_somebody_looked():
    dense = np.zeros(SHAPE, dtype=np.uint8)
    dense[2:6] = outline() * 3
    annotation = SparseAnnotation.from_mask(CT, CT.with_voxels(dense), [0, 3, 6], "AB", "2024-05-31T08:15:00Z")
    assert [(entry.slice_index, entry.state) for entry in annotation.slices] == [
        (0, "none"),
        (3, "embolism"),
        (6, "none"),
    ]
    assert list(annotation.masks) == [3]
    assert [entry.z_mm for entry in annotation.slices] == [-200.25, -192.75, -185.25]


def test_a_dense_mask_on_another_grid_or_a_slice_that_does_not_exist_is_refused():
    mask = Volume(np.zeros(SHAPE, dtype=np.uint8), axial_affine(SPACING, (0, 0, 0)), "mask.nrrd")
    with pytest.raises(InputError, match=r"mask\.nrrd: the mask lies on another grid than the CT the CT"):
        SparseAnnotation.from_mask(CT, mask, [0])
    with pytest.raises(InputError, match="no slice 9, the slices are 0 to 8"):
        SparseAnnotation.from_mask(CT, CT.with_voxels(np.zeros(SHAPE, dtype=np.uint8)), [9])


# whose annotation it is


def test_an_annotation_of_other_voxels_is_refused():
    other = CT.with_voxels(CT.voxels + 1)
    with pytest.raises(InputError, match="other voxels than the CT"):
        example().check_belongs_to(other)
    example().check_belongs_to(CT)


def test_an_annotation_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(InputError, match="made on 9 x 14 x 11 voxels, but the CT has 8 x 14 x 11"):
        example().check_belongs_to(Volume(CT.voxels[1:], CT.affine, "the CT"))


def test_an_annotation_at_another_spacing_is_refused():
    with pytest.raises(InputError, match=r"spacing of 2.5 x 0.8 x 0.7 mm, but the CT has 5 x 0.8 x 0.7"):
        example().check_belongs_to(Volume(CT.voxels, axial_affine((5.0, 0.8, 0.7), ORIGIN), "the CT"))


@pytest.mark.parametrize(("shift_mm", "fits"), [(0.0, True), (1.2, True), (-1.2, True), (1.3, False), (-1.3, False)])
def test_z_must_fit_the_slice_within_half_a_slice(shift_mm, fits):
    shifted = ReviewedSlice(4, -200.25 + 4 * 2.5 + shift_mm, "none")
    annotation = SparseAnnotation.empty(CT).review(shifted)
    if fits:
        annotation.check_belongs_to(CT)
    else:
        with pytest.raises(
            InputError, match=r"slice 4 lies, by its annotation, at z -1\d+\.\d\d mm, but in the CT it lies at -190.25"
        ):
            annotation.check_belongs_to(CT)


# JSON


@QUICK
@given(annotations())
def test_json_round_trip(annotation):
    payload = json.loads(json.dumps(annotation.to_json()))
    again = SparseAnnotation.from_json(payload, annotation.masks)
    assert same(annotation, again)
    assert again.to_json() == payload


def test_json_is_the_contract():
    assert example().to_json() == {
        "schema": "pe-annotation/2",
        "image": {"sha256": CT.sha256, "size": [9, 14, 11], "spacing_mm": [2.5, 0.8, 0.7]},
        "slices": [
            {"slice_index": i, "z_mm": z, "state": state, "reader": "AB", "time": "2024-05-31T08:15:00Z"}
            for i, z, state in [(2, -195.25, "embolism"), (4, -190.25, "none"), (6, -185.25, "uncertain")]
        ],
    }


def test_json_of_notes_decisions_and_reads_is_the_contract():
    payload = full_example().to_json()
    assert payload["slices"][3] == {
        "slice_index": 7,
        "z_mm": -182.75,
        "state": "embolism",
        "reader": "AB",
        "time": "2024-05-31T08:15:00Z",
        "not_outlined": True,
        "note": 'thin; see 50 % of "vessel" \\ | next\nline, größer',
    }
    assert payload["decisions"] == [
        {
            "decision": "rejected",
            "model_sha256": "a" * 64,
            "rank": 1,
            "centre_lps_mm": [-28.0, 17.0, -187.75],
            "slice_index": 5,
            "reader": "AB",
            "time": "2024-05-31T08:16:00Z",
        },
        {
            "decision": "accepted",
            "model_sha256": "a" * 64,
            "rank": 2,
            "centre_lps_mm": [-28.0, 17.0, -195.25],
            "slice_index": 2,
            "extent_mm": [11.0, 22.0, 5.0],
            "score": 0.75,
            "reader": "AB",
            "time": "2024-05-31T08:16:00Z",
        },
    ]
    assert payload["note"] == "motion | at the base\n2nd line"
    assert payload["reading"] == {
        "kind": "independent",
        "reader": "AB",
        "number": 2,
        "unblinded": "2024-05-31T08:17:00Z",
    }


def test_schema_1_is_read_as_it_was_written_by_version_0():
    """Bytes of a file that the program wrote before schema 2."""
    text = (
        '{"schema": "pe-annotation/1", "image": {"sha256": "%s", "size": [9, 14, 11], "spacing_mm": [2.5, 0.8, 0.7]}, '
        '"slices": [{"slice_index": 2, "z_mm": -195.25, "state": "embolism", "reader": "AB", '
        '"time": "2024-05-31T08:15:00Z"}, {"slice_index": 4, "z_mm": -190.25, "state": "none", "reader": "AB", '
        '"time": "2024-05-31T08:15:00Z"}, {"slice_index": 6, "z_mm": -185.25, "state": "uncertain", "reader": "AB", '
        '"time": "2024-05-31T08:15:00Z"}], "mask_sha256": null}'
    )
    assert same(SparseAnnotation.from_json(json.loads(text % CT.sha256), example().masks), example())


def test_what_a_newer_minor_version_adds_is_ignored():
    payload = {**full_example().to_json(), "schema": "pe-annotation/2.1", "novelty": {"any": 1}}
    payload["slices"] = [{**entry, "novelty": 1} for entry in payload["slices"]]
    payload["decisions"] = [{**entry, "novelty": 1} for entry in payload["decisions"]]
    assert same(SparseAnnotation.from_json(payload, full_example().masks), full_example())


def test_a_candidate_far_outside_of_the_ct_is_refused():
    away = replace(decision(), centre_lps_mm=(28.0, 17.0, -190.0))
    with pytest.raises(
        InputError, match=r"candidate 1 lies, by its annotation, at \(28.0, 17.0, -190.0\) mm, outside of the CT"
    ):
        replace(example(), decisions=(away,)).check_belongs_to(CT)
    full_example().check_belongs_to(CT)


HOSTILE = [
    (
        ("schema",),
        "pe-annotation/3",
        "'pe-annotation/3' is newer than 'pe-annotation/2', which this program",
    ),
    (("schema",), "pe-annotation/22", "is newer"),
    (("schema",), ["pe-annotation/2"], "unknown schema"),
    (("schema",), None, "unknown schema None"),
    (("image",), [], "image must be a JSON object"),
    (("image", "sha256"), "0" * 63, "image.sha256 must match pattern"),
    (("image", "sha256"), "0" * 64 + "\n", "image.sha256 must match pattern"),
    (("image", "sha256"), 7, "image.sha256 must be a valid string, got 7"),
    (("image", "size"), [9, 14], "entry 3 of image.size is missing"),
    (("image", "size"), [9, 14, True], "entry 3 of image.size must be a valid integer, got True"),
    (("image", "size"), [9, 14, 11.0], "entry 3 of image.size must be a valid integer, got 11.0"),
    (("image", "size"), [9, 14, 10**9], "entry 3 of image.size must be less than 65536"),
    (("image", "spacing_mm"), [2.5, 0.8, 0], "entry 3 of image.spacing_mm must be greater than 0, got 0"),
    (("image", "spacing_mm"), [2.5, 0.8, math.nan], "must be a finite number"),
    (("image", "spacing_mm"), [2.5, 0.8, 10**400], "must be a finite number"),
    (("slices",), {}, "slices must be a list"),
    (("slices",), None, "slices must be a list"),
    (("slices", 1), 3, "entry 2 of slices must be a JSON object, got 3"),
    (("slices", 1), {}, "entry 2 of slices: slice_index is missing"),
    (("slices", 1, "slice_index"), 2, "slice 2 is listed twice"),
    (("slices", 1, "slice_index"), -1, "slice_index must be greater than or equal to 0, got -1"),
    (("slices", 1, "slice_index"), 9, "slice 9 does not exist, the slices are 0 to 8"),
    (("slices", 1, "slice_index"), True, "entry 2 of slices: slice_index must be a valid integer"),
    (("slices", 1, "slice_index"), 4.0, "entry 2 of slices: slice_index must be a valid integer"),
    (("slices", 1, "slice_index"), "4", "entry 2 of slices: slice_index must be a valid integer"),
    (("slices", 1, "z_mm"), math.nan, "entry 2 of slices: z_mm must be a finite number"),
    (("slices", 1, "z_mm"), math.inf, "entry 2 of slices: z_mm must be a finite number"),
    (("slices", 1, "z_mm"), -(10**400), "entry 2 of slices: z_mm must be a finite number"),
    (("slices", 1, "z_mm"), False, "entry 2 of slices: z_mm must be a valid number"),
    (("slices", 1, "z_mm"), None, "entry 2 of slices: z_mm must be a valid number"),
    (("slices", 1, "state"), "negative", "state must be 'embolism', 'none' or 'uncertain', got 'negative'"),
    (("slices", 1, "state"), ["none"], "state must be 'embolism', 'none' or 'uncertain'"),
    (("slices", 1, "state"), "embolism", "nothing is outlined"),
    (("slices", 0, "state"), "none", "outline on slice 2, which is not listed as embolism"),
    (("slices", 0, "not_outlined"), True, "outline on slice 2, which is listed as not_outlined"),
    (("slices", 1, "not_outlined"), True, "slice 4: not_outlined is for slices with embolism only, this one is none"),
    (("slices", 1, "not_outlined"), 1, "not_outlined must be a valid boolean, got 1"),
    (("slices", 1, "reader"), "x" * 65, "at most 64 characters"),
    (("slices", 1, "reader"), None, "reader must be a valid string"),
    (("slices", 1, "reader"), "a|b", "printable"),
    (("slices", 1, "reader"), "a\nb", "printable"),
    (("slices", 1, "reader"), "\ud800", "printable"),
    (("slices", 1, "time"), "yesterday", "ISO 8601 in UTC"),
    (("slices", 1, "time"), "2024-02-31T08:15:00Z", "ISO 8601 in UTC"),
    (("slices", 1, "time"), "2024-05-31T08:15:00+02:00", "ISO 8601 in UTC"),
    (("slices", 1, "time"), "2024-05-31|08:15:00Z", "ISO 8601 in UTC"),
    (("slices", 1, "time"), 1717143300, "time must be a valid string"),
    (("slices", 1, "note"), "x" * 4001, "slice 4: a note has at most 4000 characters, this one has 4001"),
    (("note",), "\x07", "note: the note holds characters that cannot be shown"),
    (("decisions",), {}, "decisions must be a list"),
    (("decisions", 0, "decision"), "maybe", "must be 'accepted', 'rejected', 'corrected' or 'undecided', got 'maybe'"),
    (("decisions", 0, "rank"), 0, "rank must be greater than or equal to 1, got 0"),
    (("decisions", 1, "rank"), 1, "two decisions on candidate 1 of model aaaaaaaaaaaa"),
    (("decisions", 0, "slice_index"), 9, "slice 9 does not exist"),
    (("decisions", 0, "model_sha256"), "best", "model_sha256 must match pattern"),
    (("decisions", 0, "centre_lps_mm"), [0, 1], "entry 3 of entry 1 of decisions: centre_lps_mm is missing"),
    (("decisions", 0, "extent_mm"), [1, 1, 0], "must be greater than 0"),
    (("decisions", 0, "score"), 1.5, "score must be less than or equal to 1, got 1.5"),
    (("decisions", 0, "reader"), "a|b", "decision on candidate 1: reader 'a|b' must be printable"),
    (("reading", "kind"), "consensus", "a consensus is made from at least two versions"),
    (("reading", "derived_from"), ["a", "b"], "derived_from is for a consensus only, this read is independent"),
    (("reading", "number"), 0, "reading.number must be greater than or equal to 1"),
    (("reading", "unblinded"), "now", "reading: time must be ISO 8601"),
]


@pytest.mark.parametrize(("where", "value", "sentence"), HOSTILE)
def test_hostile_json_is_refused_with_a_sentence(where, value, sentence):
    payload = json.loads(json.dumps(full_example().to_json()))
    *folders, last = where
    node = payload
    for step in folders:
        node = node[step]
    node[last] = value
    with pytest.raises(InputError) as error:
        SparseAnnotation.from_json(payload, full_example().masks)
    assert sentence in str(error.value)
    assert len(str(error.value)) < 300


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(JSON_VALUES, st.data())
def test_any_json_is_either_refused_or_kept(value, data):
    with pytest.raises(InputError):
        SparseAnnotation.from_json(value, {})
    payload = json.loads(json.dumps(full_example().to_json()))
    node = payload
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = value
    try:
        kept = SparseAnnotation.from_json(payload, full_example().masks).to_json()
    except InputError:
        return
    assert kept["image"] == payload["image"]
    given_slices = sorted(payload["slices"], key=lambda entry: entry["slice_index"])
    for entry, given_entry in zip(kept["slices"], given_slices, strict=True):
        assert entry == {name: value for name, value in given_entry.items() if value or name not in OPTIONAL}


OPTIONAL = ("not_outlined", "note")


# files


@QUICK
@given(annotations())
def test_write_read_round_trip(tmp_path, annotation):
    annotation.write(tmp_path / "a.b.json", CT)
    assert same(SparseAnnotation.read(tmp_path / "a.b.json", CT), annotation)
    assert same(SparseAnnotation.read(tmp_path / "a.b.json"), annotation)
    assert same(SparseAnnotation.read(tmp_path / "a.b.seg.nrrd", CT), annotation)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.json", "a.b.seg.nrrd"]


def test_pynrrd_finds_every_outlined_voxel_at_its_place_in_the_patient(tmp_path):
    example().write(tmp_path / "a.json", CT)
    voxels, header = nrrd.read(str(tmp_path / "a.seg.nrrd"), index_order="F")
    assert header["space"] == "left-posterior-superior"
    assert voxels.dtype == np.uint8
    found = np.argwhere(voxels == 1) @ header["space directions"] + header["space origin"]
    rows, columns = np.nonzero(outline())
    x, y, z = ORIGIN
    expected = {
        (round(x + 0.7 * c, 3), round(y + 0.8 * r, 3), round(z + 2.5 * 2, 3))
        for r, c in zip(rows, columns, strict=True)
    }
    assert {tuple(np.round(point, 3)) for point in found} == expected


def test_pynrrd_reads_the_fields_that_slicer_knows_a_segmentation_by(tmp_path):
    example().write(tmp_path / "a.json", CT)
    header = header_of(tmp_path / "a.seg.nrrd")
    assert header["encoding"] == "gzip"
    assert list(header["kinds"]) == ["domain"] * 3
    assert header["Segment0_Name"] == "embolism"
    assert header["Segment0_ID"] == "embolism"
    assert header["Segment0_LabelValue"] == "1"
    assert header["Segment0_Layer"] == "0"
    assert header["Segment0_Extent"] == "0 10 0 13 0 8"
    assert header["Segmentation_MasterRepresentation"] == "Binary labelmap"
    tags = dict(tag.split(":", 1) for tag in header["Segment0_Tags"].split("|") if tag)
    assert json.loads(tags["PE.Review"]) == example().to_json()


def test_a_tag_with_every_slice_of_a_long_study_survives(tmp_path):
    volume = Volume(np.zeros((900, 2, 2), dtype=np.int16), axial_affine((1.0, 1.0, 1.0)))
    mask = volume.with_voxels(np.ones((900, 2, 2), dtype=np.uint8))
    annotation = SparseAnnotation.from_mask(volume, mask, range(900), "R" * 64, "2024-05-31T08:15:00Z")
    annotation.write(tmp_path / "a.json", volume)
    assert same(SparseAnnotation.read(tmp_path / "a.seg.nrrd"), annotation)


def test_an_annotation_is_not_written_beside_another_ct(tmp_path):
    with pytest.raises(InputError, match="other voxels"):
        example().write(tmp_path / "a.json", CT.with_voxels(CT.voxels + 1))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.nrrd: an annotation is a \.json file"):
        example().write(tmp_path / "a.nrrd", CT)


def test_a_save_interrupted_between_both_files_is_detected_and_the_newer_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    example().write(path, CT)
    newer = example().review(reviewed(7, "embolism"), outline(1, 1))

    def power_cut(*_):
        raise OSError("power cut")

    monkeypatch.setattr("pe_app.annotation.sparse.write_durably", power_cut)
    with pytest.raises(OSError, match="power cut"):
        newer.write(path, CT)
    with pytest.raises(InputError, match=r"a\.json: the outlines in a\.seg\.nrrd are of another save"):
        SparseAnnotation.read(path, CT)
    assert same(SparseAnnotation.read(tmp_path / "a.seg.nrrd", CT), newer)


def test_a_save_that_fails_at_the_outlines_leaves_the_former_annotation(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    example().write(path, CT)

    def disk_full(image, name, **_):
        Path(name).write_bytes(b"NRRD0004\nhalf")
        raise RuntimeError("disk full")

    monkeypatch.setattr("pe_app.annotation.seg_nrrd.sitk.WriteImage", disk_full)
    with pytest.raises(RuntimeError, match="disk full"):
        example().review(reviewed(0)).write(path, CT)
    assert same(SparseAnnotation.read(path, CT), example())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.seg.nrrd"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "a.json: is not valid JSON"),
        (b'{"schema":', "a.json: is not valid JSON"),
        (b"\xff\xfe{", "a.json: is not UTF-8 text"),
        (b"[" * 100_000, "a.json: is not valid JSON"),
        (b"[]", "a.json: annotation: must be a JSON object"),
    ],
)
def test_a_damaged_json_is_refused_by_name(tmp_path, content, sentence):
    path = tmp_path / "a.json"
    SparseAnnotation.empty(CT).write(path, CT)
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        SparseAnnotation.read(path, CT)
    assert str(error.value).startswith(sentence)


def test_missing_files_are_named(tmp_path):
    example().write(tmp_path / "a.json", CT)
    (tmp_path / "b.json").write_bytes((tmp_path / "a.json").read_bytes())
    with pytest.raises(InputError, match=r"b\.seg\.nrrd: there is no such file"):
        SparseAnnotation.read(tmp_path / "b.json", CT)
    (tmp_path / "a.json").unlink()
    with pytest.raises(InputError, match=r"a\.json: cannot be read: No such file"):
        SparseAnnotation.read(tmp_path / "a.json", CT)


def test_a_segmentation_alone_does_not_say_what_was_reviewed_but_its_masks_can_be_taken(tmp_path):
    path = tmp_path / "s.seg.nrrd"
    voxels = np.zeros(SHAPE, dtype=np.uint8)
    voxels[[2, 5]] = outline()
    write_segment(CT.with_voxels(voxels), path, {"TerminologyEntry": "any"})
    with pytest.raises(InputError, match="does not record which slices were reviewed"):
        SparseAnnotation.read(path, CT)
    mask = read_segmentation(path, CT)
    annotation = SparseAnnotation.from_mask(CT, mask, [*slice_masks(mask.voxels), 8])
    assert [(entry.slice_index, entry.state) for entry in annotation.slices] == [
        (2, "embolism"),
        (5, "embolism"),
        (8, "none"),
    ]


def test_a_part_of_the_grid_cannot_be_placed_without_the_ct(tmp_path):
    example().write(tmp_path / "a.json", CT)
    voxels = np.zeros((4, *SHAPE[1:]), dtype=np.uint8)
    voxels[1] = outline()
    part = Volume(voxels, axial_affine(SPACING, (*ORIGIN[:2], ORIGIN[2] + 2.5)))
    write_segment(part, tmp_path / "a.seg.nrrd", {})
    with pytest.raises(InputError, match="part of the grid only; give its CT too"):
        SparseAnnotation.read(tmp_path / "a.json")
    assert same(SparseAnnotation.read(tmp_path / "a.json", CT), example())


# the schedule


@settings(deadline=None, max_examples=200)
@given(
    st.floats(0.5, 20), st.integers(1, 300), st.floats(3, 40), st.data(), st.floats(-500, 500, allow_subnormal=False)
)
def test_the_schedule_covers_the_lung_about_every_step(spacing_mm, slices, every_mm, data, bottom):
    first = data.draw(st.integers(0, slices - 1))
    last = data.draw(st.integers(first, slices - 1))
    volume = Volume(np.zeros((slices, 1, 1), np.int16), axial_affine((spacing_mm, 1, 1), (0, 0, bottom)))
    schedule = slice_schedule(volume, every_mm, SliceRange(first, last))
    assert list(schedule) == sorted(set(schedule))
    assert first <= schedule[0]
    assert schedule[-1] <= last
    assert (schedule[0] - first) * spacing_mm <= every_mm / 2 + spacing_mm / 2
    assert (last - schedule[-1]) * spacing_mm <= every_mm / 2 + spacing_mm / 2
    if len(schedule) > 1:
        assert (schedule[0], schedule[-1]) == (first, last)
        gaps = np.diff(schedule) * spacing_mm
        assert gaps.max() <= 1.5 * every_mm + spacing_mm + 1e-6
        length = (last - first) * spacing_mm
        if spacing_mm <= every_mm / 2 and length > 10 * every_mm:
            assert np.abs(gaps - every_mm).max() <= spacing_mm + 0.06 * every_mm


@pytest.mark.parametrize(
    ("spacing_mm", "lung", "expected"),
    [
        (1.0, (10, 60), (10, 20, 30, 40, 50, 60)),
        (2.5, (0, 20), (0, 4, 8, 12, 16, 20)),
        (5.0, (1, 9), (1, 3, 5, 7, 9)),
        (10.0, (2, 7), (2, 3, 4, 5, 6, 7)),
        (12.5, (0, 8), tuple(range(9))),
        (3.0, (4, 4), (4,)),
    ],
)
def test_the_schedule_by_hand(spacing_mm, lung, expected):
    volume = Volume(np.zeros((70, 1, 1), np.int16), axial_affine((spacing_mm, 1, 1), (0, 0, -77.7)))
    assert slice_schedule(volume, lung=SliceRange(*lung)) == expected


def test_a_range_shorter_than_half_a_step_gets_its_middle_slice():
    volume = Volume(np.zeros((70, 1, 1), np.int16), axial_affine((1.0, 1, 1), (0, 0, -77.7)))
    assert slice_schedule(volume, lung=SliceRange(7, 11)) == (9,)


def test_the_schedule_finds_the_lung_itself(monkeypatch):
    monkeypatch.setattr("pe_app.annotation.sparse.lung_range", lambda volume: SliceRange(1, 5))
    assert slice_schedule(CT) == (1, 5)


def test_a_step_that_is_none_is_a_programmers_mistake():
    with pytest.raises(ValueError, match="every_mm must be positive"):
        slice_schedule(CT, 0.0, SliceRange(0, 8))
