"""What a reader decides on a study: kept, sent, restored, merged; and the files it travels in."""

import json

import nrrd
import numpy as np
import pytest
import slicer_paths  # noqa: F401
from phantoms import attention, chest, nrrd_bytes
from PulmonaryEmbolismLib import review
from PulmonaryEmbolismLib.answers import Candidate, Row, Saved, Scheduled, Sent, Study
from PulmonaryEmbolismLib.drafts import Draft, Drafts, read_masks
from PulmonaryEmbolismLib.images import Image, ImageError, read_image, write_segmentation
from PulmonaryEmbolismLib.proposals import candidate_region, fill_between, grow, in_range

AFFINE = np.array([[0, 0, 0.8, -10], [0, 0.7, 0, -20], [2.5, 0, 0, -300.0], [0, 0, 0, 1]])
SHAPE = (20, 12, 16)


def session(schedule=(2, 6, 10, 14)):
    image = Image(np.zeros(SHAPE, np.int16), AFFINE)
    listed = tuple(Scheduled(k, image.slice_z_mm[k]) for k in schedule)
    image_json = {"sha256": "ab", "size": list(SHAPE), "spacing_mm": [2.5, 0.7, 0.8]}
    study = Study(Row("s1"), image_json, listed, None, "", None, None)
    return review.ReviewSession("http://x", study, image, "Ada")


def blob(row=3, column=4, size=3):
    mask = np.zeros(SHAPE[1:], bool)
    mask[row : row + size, column : column + size] = True
    return mask


def test_a_slice_with_paint_is_embolism_and_without_it_is_open_again():
    s = session()
    assert s.set_mask(6, blob())
    assert s.state(6) == "embolism"
    s.set_mask(6, np.zeros(SHAPE[1:], bool))
    assert s.state(6) == ""
    assert s.open_slices == [2, 6, 10, 14]


def test_not_reviewed_is_not_negative():
    s = session()
    s.mark(2, "none")
    assert [entry["slice_index"] for entry in s.snapshot().annotation()["slices"]] == [2]
    with pytest.raises(ValueError, match="paint"):
        s.mark(6, "embolism")


def test_embolism_without_an_outline_is_a_mark_of_its_own_and_paint_replaces_it():
    s = session()
    s.mark(6, "not_outlined")
    entry = s.snapshot().annotation()["slices"][0]
    assert (entry["state"], entry["not_outlined"]) == ("embolism", True)
    assert (s.emboli, s.open_slices) == ([6], [2, 10, 14])
    s.set_mask(6, blob())
    assert "not_outlined" not in s.snapshot().annotation()["slices"][0]
    again = session()
    again.adopt(s.snapshot().annotation(), {6: blob()}, "r1")
    assert again.state(6) == "embolism"


def test_what_the_module_writes_is_what_the_method_reads():
    from pe_app.annotation.record import AnnotationRecord

    s = session()
    s.set_mask(6, blob())
    s.mark(2, "not_outlined")
    s.write_note("motion", 2)
    s.write_note("read twice")
    candidate = Candidate(1, 6, -285.0, (0.0, 0.0, -285.0), (9.0, 9.0, 5.0), 0.9, 0.8)
    s.decide(candidate, "rejected", "a" * 64)
    data = s.snapshot().annotation()
    data["image"]["sha256"] = "b" * 64
    record = AnnotationRecord.from_json(data)
    assert [(r.slice_index, r.outlined, r.note) for r in record.slices] == [(2, False, "motion"), (6, True, "")]
    assert (record.decisions[0].decision, record.decisions[0].reader, record.note) == ("rejected", "Ada", "read twice")


def test_an_accepted_candidate_that_is_repainted_is_corrected_and_one_left_open_is_undecided():
    s = session()
    a, b = (Candidate(n, 6 * n, 0.0, (0.0, 0.0, 0.0), (9.0, 9.0, 5.0), 0.9, 0.8) for n in (1, 2))
    s.set_mask(6, blob())
    s.decide(a, "accepted", "m1")
    s.set_mask(6, blob(4, 4))
    s.leave_open([a, b], "m1")
    assert [s.decision(c, "m1") for c in (a, b)] == ["corrected", "undecided"]
    assert s.decision(a, "m2") == ""


def test_reading_begins_at_the_first_open_slice_and_again_at_the_first_embolism():
    s = session()
    s.mark(2, "none")
    assert s.first == 6
    for k in (6, 10):
        s.mark(k, "none")
    s.set_mask(14, blob())
    assert s.first == 14


def test_the_next_open_slice_is_above_and_then_from_the_feet():
    s = session()
    s.mark(10, "none")
    assert s.next_open(6) == 14
    assert s.next_open(14) == 2
    assert s.step(14, 1) is None
    assert s.step(7, -1) == 6


def test_a_text_of_the_scene_brings_back_marks_decisions_and_notes_with_the_paint():
    s = session()
    candidate = Candidate(1, 6, -285.0, (0.0, 0.0, -285.0), (9.0, 9.0, 5.0), 0.9, 0.8)
    s.set_mask(6, blob())
    s.decide(candidate, "accepted", "m1")
    s.write_note("lower lobe", 6)
    before, masks = s.to_text(), dict(s.masks)
    s.mark(6, "uncertain")
    s.decide(candidate, "rejected", "m1")
    assert s.to_text() != before
    assert s.from_text(before, masks) == [6]
    assert (s.state(6), s.decision(candidate, "m1"), s.note_of(6)) == ("embolism", "accepted", "lower lobe")
    assert np.array_equal(s.masks[6], blob())


def test_paint_that_was_saved_for_undo_before_it_was_marked_is_embolism():
    s = session()
    assert s.from_text(s.to_text(), {6: blob()}) == [6]
    assert s.state(6) == "embolism"


def test_a_slice_off_the_schedule_is_reviewed_without_changing_what_is_open():
    s = session()
    s.add(7)
    s.mark(7, "none")
    assert [(line.slice_index, line.why) for line in s.lines() if line.why == "extra"] == [(7, "extra")]
    assert s.progress == (0, 4)


def test_the_annotation_is_schema_2_with_z_in_lps():
    s = session()
    s.set_mask(6, blob())
    data = s.snapshot().annotation()
    assert data["schema"] == "pe-annotation/2"
    assert data["image"] == {"sha256": "ab", "size": [20, 12, 16], "spacing_mm": [2.5, 0.7, 0.8]}
    assert data["slices"][0]["z_mm"] == pytest.approx(-300 + 6 * 2.5)
    assert (data["slices"][0]["state"], data["slices"][0]["reader"]) == ("embolism", "Ada")


def test_a_draft_survives_as_a_file_with_everything_in_it(tmp_path):
    s = session()
    s.set_mask(6, blob())
    s.mark(10, "uncertain")
    s.set_label("positive")
    candidate = Candidate(1, 6, -285.0, (0.0, 0.0, -285.0), (9.0, 9.0, 5.0), 0.9, 0.8)
    s.decide(candidate, "rejected", "m1")
    drafts = Drafts(tmp_path / "drafts")
    drafts.write(s.snapshot())
    found = Drafts(tmp_path / "drafts").read("http://x", "s1")
    restored = session()
    restored.restore(found)
    assert np.array_equal(restored.masks[6], blob())
    found = (restored.state(10), restored.label, restored.decision(candidate, "m1"))
    assert found == ("uncertain", "positive", "rejected")
    assert restored.unsent
    assert drafts.read("http://other", "s1") is None


def test_a_draft_of_the_first_version_is_still_read(tmp_path):
    s = session()
    s.set_mask(6, blob())
    old = s.snapshot().to_json()
    old.update(schema="pe-draft/1", decisions={"1": "accepted"}, model="m1")
    del old["note"], old["label_based_on"]
    found = Draft.from_json(json.loads(json.dumps(old)))
    assert (found.marks[0].state, found.decisions) == ("embolism", ())


def test_an_older_snapshot_never_replaces_a_newer_one(tmp_path):
    s, drafts = session(), Drafts(tmp_path)
    older = s.snapshot()
    s.mark(2, "none")
    drafts.write(s.snapshot())
    drafts.write(older)
    assert len(drafts.read("http://x", "s1").marks) == 1


def test_a_draft_that_is_set_aside_is_kept_but_not_offered_again(tmp_path):
    s, drafts = session(), Drafts(tmp_path)
    s.mark(2, "none")
    drafts.write(s.snapshot())
    aside = drafts.set_aside(s.snapshot())
    assert drafts.read("http://x", "s1") is None
    assert len(Draft.from_json(json.loads(aside.read_text())).marks) == 1


def test_a_damaged_draft_is_set_aside_and_stops_nothing(tmp_path):
    s, drafts = session(), Drafts(tmp_path)
    drafts.write(s.queue())
    path = next(tmp_path.glob("*.json"))
    path.write_text(path.read_text()[:100])
    assert drafts.pending("http://x") == []
    assert len(list(tmp_path.glob("*.unreadable"))) == 1


def test_changes_made_while_a_snapshot_travels_stay_to_be_sent():
    s = session()
    s.mark(2, "none")
    draft = s.queue()
    s.mark(6, "none")
    s.acknowledge(draft, Sent(None, Saved("draft", 1, (6, 10, 14), "r1")))
    assert s.unsent
    s.acknowledge(s.queue(), Sent(None, Saved("draft", 2, (10, 14), "r2")))
    assert not s.unsent
    assert s.revision == "r2"


def test_merging_adds_their_slices_and_keeps_mine():
    s = session()
    s.mark(2, "none")
    s.set_mask(6, blob())
    theirs = {"slices": [{"slice_index": 2, "z_mm": 0, "state": "uncertain", "reader": "Bo"},
                         {"slice_index": 10, "z_mm": 0, "state": "embolism", "reader": "Bo"}]}  # fmt: skip
    s.merge(theirs, {10: blob(5, 6)}, "r9")
    assert [s.state(k) for k in (2, 6, 10)] == ["none", "embolism", "embolism"]
    assert np.array_equal(s.masks[10], blob(5, 6))
    assert s.revision == "r9"


def test_an_embolism_without_its_mask_is_not_taken_over():
    s = session()
    s.adopt({"slices": [{"slice_index": 6, "z_mm": 0, "state": "embolism"}]}, {}, "r1")
    assert s.open_slices == [2, 6, 10, 14]


def test_the_seg_nrrd_is_what_slicer_and_pynrrd_read(tmp_path):
    path = tmp_path / "x.seg.nrrd"
    s = session()
    s.set_mask(6, blob())
    compact = json.dumps(s.snapshot().annotation(), separators=(",", ":"))
    write_segmentation(path, s.masks, SHAPE, AFFINE, compact)
    voxels, header = nrrd.read(str(path), index_order="C")
    assert np.array_equal(voxels[6] == 1, blob())
    assert voxels.sum() == 9
    assert header["space"] == "left-posterior-superior"
    assert np.allclose(header["space directions"][::-1].T, AFFINE[:3, :3])
    assert np.allclose(header["space origin"], AFFINE[:3, 3])
    assert header["Segment0_Name"] == "embolism"
    assert json.loads(header["Segment0_Tags"].removeprefix("PE.Review:").rstrip("|")) == s.snapshot().annotation()
    assert np.array_equal(read_masks(path, s.snapshot().annotation())[6], blob())


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1), (1, -1, -1)])
def test_a_voxel_keeps_its_millimetre_whatever_the_order_of_the_file(tmp_path, order, flips):
    import nibabel as nib

    voxels = np.zeros(SHAPE, np.int16)
    voxels[6, 3, 4] = 1000
    turned, affine = voxels.transpose(order), AFFINE[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip < 0:
            affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
            affine[:3, axis] *= -1
            turned = np.flip(turned, axis)
    path = tmp_path / "x.nii.gz"
    nib.save(nib.Nifti1Image(turned, np.diag([-1, -1, 1, 1.0]) @ affine), path)
    nrrd.write(str(tmp_path / "x.nrrd"), turned, {"space": "LPS", "space directions": affine[:3, :3].T,
                                                  "space origin": affine[:3, 3]})  # fmt: skip
    for file in (path, tmp_path / "x.nrrd"):
        image = read_image(file).canonical()
        assert image.voxels.shape == SHAPE
        assert np.allclose(image.affine, AFFINE, atol=1e-5)
        assert np.argwhere(image.voxels == 1000).tolist() == [[6, 3, 4]]


def test_rescaled_nifti_is_read_in_hounsfield_units(tmp_path):
    import nibabel as nib

    image = nib.Nifti1Image(np.full((3, 4, 5), 40, np.int16), np.eye(4))
    image.header.set_slope_inter(2, -1024)
    nib.save(image, tmp_path / "x.nii")
    expected = nib.load(tmp_path / "x.nii").get_fdata()
    assert np.allclose(read_image(tmp_path / "x.nii").voxels, expected.transpose())


@pytest.mark.parametrize("kept", [0, 9, 200, 400])
def test_a_damaged_file_is_a_sentence(tmp_path, kept):
    path = tmp_path / "x.nrrd"
    path.write_bytes(nrrd_bytes(np.arange(120).reshape(4, 5, 6).astype(np.int16), AFFINE)[:kept])
    with pytest.raises(ImageError, match=r"x\.nrrd"):
        read_image(path)


def test_between_two_discs_lies_the_disc_of_the_mean_radius():
    row, column = np.mgrid[:41, :41] - 20
    disc = {r: row**2 + column**2 <= r**2 for r in (6, 12)}
    between = fill_between({10: disc[6], 14: disc[12]}, [10, 14])
    assert sorted(between) == [11, 12, 13]
    radius = np.sqrt(between[12].sum() / np.pi)
    assert radius == pytest.approx(9, abs=0.5)


def test_a_slice_reviewed_as_none_is_never_bridged():
    assert fill_between({2: blob(), 6: blob()}, [2, 4, 6]) == {}


def test_an_accepted_candidate_begins_where_attention_is_high_and_keeps_to_the_clot_range_when_asked():
    hu, clot, affine = chest(0)
    voxels, coarse = attention(clot, affine)
    centre = affine[:3, :3] @ np.argwhere(clot).mean(0) + affine[:3, 3]
    candidate = Candidate(1, 26, 0.0, tuple(centre), (48.0, 26.0, 20.0), 0.9, 0.9)
    region = candidate_region(candidate, Image(voxels, coarse), hu.shape, affine, None)
    assert (region & clot[26]).sum() > 0.8 * clot[26].sum()
    confined = candidate_region(candidate, Image(voxels, coarse), hu.shape, affine, in_range(hu[26], 0, 100))
    assert confined.any()
    assert (hu[26][confined] <= 100).all()
    assert (hu[26][confined] >= 0).all()
    elsewhere = Candidate(1, 26, 0.0, (900.0, 900.0, 0.0), (9.0, 9.0, 9.0), 0.9, 0.9)
    assert not candidate_region(elsewhere, Image(voxels, coarse), hu.shape, affine, None).any()


def test_a_region_grows_in_its_range_and_not_into_the_next_organ():
    inside = np.zeros((80, 80), bool)
    inside[30:36, 30:50] = True
    inside[10, 10] = True
    inside[33, 50:80] = True
    grown = grow(inside, 32, 32, (0.7, 0.7))
    assert grown[30:36, 30:50].all()
    assert not grown[10, 10]
    row, column = np.argwhere(grown).T
    assert np.hypot(row - 32, column - 32).max() * 0.7 <= 15
    assert not grow(inside, 0, 0, (0.7, 0.7)).any()
    assert not grow(inside, -5, 90, (0.7, 0.7)).any()
