import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_studies import CLASSIFIER, ENCODER, LUNG, SLABS, small_chest, small_studies

from pe_app.annotation.record import CandidateDecision, ReviewedSlice
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli.options import preparation
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled, Progress
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import SlabConfig, study_slabs
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.model.detector import Detector
from pe_app.studies import Study
from pe_app.training.datasets import (
    AnnotatedSlabs,
    Augmentation,
    Preparation,
    SlabItem,
    StudyFeatures,
    TwinSlabs,
    augmented,
    encode_sources,
    encode_studies,
    feature_bytes,
    prepare_slabs,
    read_sources,
)
from pe_app.training.datasets.cache import PreparedFile


def prepared(studies: tuple[Study, ...], cache: Path, seed: int = 0, config: SlabConfig = SLABS) -> AnnotatedSlabs:
    return prepare_slabs(read_sources(studies), config, cache, seed)


def used_slices(slabs: AnnotatedSlabs, studies: tuple[Study, ...]) -> dict[tuple[str, int], int]:
    """Label by (study, slice): a slab's middle is looked up among the slices of its own CT; noise makes each unique."""
    windowed = {s.study: (np.clip(read_volume(s.path).voxels, -1024, 500) + 1024.0) / 1524 for s in studies}
    found = {}
    for item in slabs:
        study = slabs.files[int(item.study)].study
        distance = np.abs(windowed[study] - item.slab[2].numpy()).max(axis=(1, 2))
        assert distance.min() < 1e-3
        assert (study, int(distance.argmin())) not in found
        found[study, int(distance.argmin())] = int(item.label)
    return found


def reviewed(study: Study, *slices: tuple[int, str]) -> Study:
    """The study with those slices reviewed in addition."""
    volume = read_volume(study.path)
    annotation = SparseAnnotation.read(study.annotation) if study.annotation else SparseAnnotation.empty(volume)
    for index, state in slices:
        annotation = annotation.review(ReviewedSlice(index, float(volume.slice_z_mm[index]), state))
    path = study.path.with_name(f"{study.study}-more.json")
    annotation.write(path, volume)
    return replace(study, annotation=path)


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> tuple[Study, ...]:
    return small_studies(tmp_path_factory.mktemp("studies"), count=6)


def truth(study: Study) -> np.ndarray:
    """Where the emboli of a study are, from the recipe and not from its annotation."""
    number = int(study.study.removeprefix("study"))
    return small_chest(number, emboli=3 if study.label == "positive" else 0)[1].voxels > 0


def test_every_embolism_slice_is_a_positive_slab_and_as_many_negatives_are_drawn(studies, tmp_path):
    slabs = prepared(studies, tmp_path)
    used = used_slices(slabs, studies)
    expected = {(s.study, z) for s in studies[::2] for z in range(LUNG.start, LUNG.stop, 3) if truth(s)[z].any()}
    assert {place for place, label in used.items() if label == 1} == expected
    assert len(slabs) == 2 * len(expected)
    assert slabs.labels.sum() == len(expected)


def test_negatives_come_half_from_slices_marked_none_and_half_from_the_lung_of_negative_studies(tmp_path):
    studies = small_studies(tmp_path / "studies", count=4)
    clear = [z for z in LUNG if z % 3 != LUNG.start % 3 and not truth(studies[0])[z].any()]
    studies = (reviewed(studies[0], *((z, "none") for z in clear)), *studies[1:])
    used = used_slices(prepared(studies, tmp_path), studies)
    negative = [place for place, label in used.items() if label == 0]
    by_name = {study.study: study for study in studies}
    marked = [(name, z) for name, z in negative if by_name[name].label == "positive"]
    random = [(name, z) for name, z in negative if by_name[name].label == "negative"]
    assert abs(len(marked) - len(random)) <= 1
    for name, z in marked:
        assert SparseAnnotation.read(by_name[name].annotation).state(z) == "none"
    assert all(z in LUNG for _, z in random)
    shares = [sum(name == study.study for name, _ in random) for study in studies[1::2]]
    assert max(shares) - min(shares) <= 1


def test_random_slices_fill_up_where_few_are_marked_none(studies, tmp_path):
    used = used_slices(prepared(studies, tmp_path), studies)
    marked = sum(len(range(LUNG.start, LUNG.stop, 3)) for _ in studies[::2]) - sum(used.values())
    assert marked < sum(used.values()) // 2
    assert (
        sum(label == 0 and name in {study.study for study in studies[::2]} for (name, _), label in used.items())
        == marked
    )
    assert sum(label == 0 for label in used.values()) == sum(used.values())


def test_slabs_are_the_ct_in_the_window_and_targets_cover_the_mask(studies, tmp_path):
    for item in prepared(studies, tmp_path):
        assert item.slab.shape == (5, 64, 64)
        assert item.slab.dtype == torch.float32
        assert 0 <= item.slab.min() <= item.slab.max() <= 1
        bright = torch.nn.functional.max_pool2d((item.slab[2] > 0.9).float()[None], 16)[0]  # 400 HU is 0.93, 40 is 0.70
        assert item.target.shape == (4, 4)
        assert (item.target >= bright).all()
        assert bool(item.target.any()) == bool(item.label == 1)


def test_uncertain_and_unreviewed_slices_never_reach_training(studies, tmp_path):
    uncertain = {(studies[1].study, z) for z in LUNG if z % 2}  # of a negative study
    changed = (
        reviewed(studies[0], *((z, "uncertain") for z in range(LUNG.start, LUNG.stop, 3))),
        reviewed(studies[1], *((z, "uncertain") for _, z in sorted(uncertain))),
        *studies[2:],
    )
    used = used_slices(prepared(changed, tmp_path), changed)
    assert not any(name == studies[0].study for name, _ in used)
    assert not uncertain & used.keys()


def without_outlines(study: Study, folder: Path) -> Study:
    """The study with the same answers and no outline."""
    annotation = SparseAnnotation.read(study.annotation)
    said = [replace(entry, not_outlined=entry.state == "embolism") for entry in annotation.slices]
    path = folder / f"{study.study}-answers.json"
    replace(annotation, slices=tuple(said), masks={}).write(path, read_volume(study.path))
    return replace(study, annotation=path)


def test_embolism_that_is_not_outlined_is_a_positive_slab_of_which_no_cell_is_known(studies, tmp_path):
    listed = (without_outlines(studies[0], tmp_path), *studies[1:])
    before, slabs = prepared(studies, tmp_path / "a"), prepared(listed, tmp_path / "b")
    assert used_slices(slabs, listed) == used_slices(before, studies), "the same slices with the same labels"
    answered = 0
    for item, outlined in zip(slabs, slabs.outlined, strict=True):
        if slabs.files[int(item.study)].study == "study0" and item.label == 1:
            assert (item.target == -1).all()
            assert not outlined
            answered += 1
        else:
            assert set(item.target.unique().tolist()) <= {0.0, 1.0}
            assert outlined == (item.label == 1)
    assert answered == sum(truth(studies[0])[z].any() for z in range(LUNG.start, LUNG.stop, 3))
    left_out = prepare_slabs(read_sources(listed), SLABS, tmp_path / "c", not_outlined=False)
    assert left_out.outlined.sum() == left_out.labels.sum() == before.labels.sum() - answered


def test_a_negative_label_with_an_embolism_that_is_not_outlined_is_refused(studies, tmp_path):
    listed = replace(without_outlines(studies[0], tmp_path), label="negative")
    with pytest.raises(InputError, match="study0: its label is 'negative', but slice"):
        prepared((listed, *studies[1:]), tmp_path)


@pytest.mark.parametrize(
    ("outlined", "others", "expected"),
    [(10, 30, (20, 20)), (30, 10, (20, 20)), (3, 97, (12, 88)), (7, 0, (7, 0)), (0, 7, (0, 7)), (5, 6, (5, 6))],
)
def test_an_epoch_is_half_outlined_as_far_as_no_slab_comes_more_than_four_times(tmp_path, outlined, others, expected):
    count = 2 * (outlined + others)
    kind = [("target", "i1", (2, 2)), ("label", "i1"), ("slice", "<i4"), ("hard", "u1")]
    records = np.zeros(count, kind)
    records["label"][: outlined + others] = 1
    records["target"][outlined : outlined + others] = -1
    np.save(tmp_path / "a.npy", records)
    slabs = AnnotatedSlabs([PreparedFile("a", "", tmp_path / "a.npy")])
    orders = [slabs.epoch_order(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert len(order) == count
        drawn = np.bincount(order, minlength=count)
        assert (drawn[:outlined].sum(), drawn[outlined : outlined + others].sum()) == expected
        assert (drawn[outlined + others :] == 1).all()
        for part in (drawn[:outlined], drawn[outlined : outlined + others]):
            assert len(part) == 0 or part.max() - part.min() <= 1


def test_hard_slabs_come_twice_as_often_as_others_of_their_kind(tmp_path):
    kind = [("target", "i1", (2, 2)), ("label", "i1"), ("slice", "<i4"), ("hard", "u1")]
    records = np.zeros(120, kind)
    records["label"][:60] = 1
    records["label"][100:] = -1
    records["hard"][[0, 1, 70, 100]] = 1
    np.save(tmp_path / "a.npy", records)
    slabs = AnnotatedSlabs([PreparedFile("a", "", tmp_path / "a.npy")])
    drawn = np.zeros(120)
    for seed in range(300):
        order = slabs.epoch_order(torch.Generator().manual_seed(seed))
        assert len(order) == 120
        assert sum(place < 60 for place in order) == 60
        drawn += np.bincount(order, minlength=120)
    assert drawn[[0, 1]].mean() / drawn[2:60].mean() == pytest.approx(2, rel=0.05)
    assert drawn[[70, 100]].mean() / np.delete(drawn, [*range(60), 70, 100]).mean() == pytest.approx(2, rel=0.05)


def decided(study: Study, folder: Path, *decisions: tuple[str, int, tuple[float, float]]) -> Study:
    """The study with decisions on candidates at (row, column) of a slice, boxes of 30 mm."""
    volume = read_volume(study.path)
    annotation = SparseAnnotation.read(study.annotation) if study.annotation else SparseAnnotation.empty(volume)
    made = tuple(
        CandidateDecision(kind, "a" * 64, rank, tuple(volume.to_lps_mm((z, *place)).tolist()), z, (30.0, 30.0, 10.0))
        for rank, (kind, z, place) in enumerate(decisions, start=1)
    )
    path = folder / f"{study.study}-decided.json"
    replace(annotation, decisions=made).write(path, volume)
    return replace(study, annotation=path)


def test_a_rejected_candidate_is_a_slab_whose_place_attention_must_leave(studies, tmp_path):
    """Rows and columns are 5 mm and a cell is 16 of them; slices 5 and 8 of the positive study are not reviewed."""
    emboli = truth(studies[0])
    clear = next(z for z in range(LUNG.start, LUNG.stop, 3) if not emboli[z].any())
    unread = next(z for z in LUNG if (z - LUNG.start) % 3 == 1)
    listed = (
        decided(studies[0], tmp_path, ("rejected", clear, (40.0, 40.0)), ("rejected", unread, (40.0, 40.0))),
        decided(studies[1], tmp_path, ("rejected", 12, (8.0, 8.0))),
        *studies[2:],
    )
    slabs = prepare_slabs(read_sources(listed), SLABS, tmp_path / "cache", decisions=True)
    found = {
        (slabs.files[file].study, int(index)): (int(label), slabs[number].target)
        for number, ((file, _), index, label) in enumerate(zip(slabs.places, slabs.slices, slabs.labels, strict=True))
        if slabs.hard[number] and label != 1
    }
    assert set(found) == {("study0", clear), ("study0", unread), ("study1", 12)}
    for place in (("study0", clear), ("study1", 12)):
        assert found[place][0] == 0
        assert not found[place][1].any()
    label, target = found["study0", unread]
    assert label == -1
    assert target[2, 2] == 0
    assert (target == -1).sum() == 15
    plain = prepare_slabs(read_sources(listed), SLABS, tmp_path / "cache")
    assert not plain.hard.any()
    assert set(plain.labels.tolist()) == {0, 1}


def test_an_embolism_without_an_accepted_candidate_is_a_hard_positive(studies, tmp_path):
    emboli = truth(studies[0])
    shown = [z for z in range(LUNG.start, LUNG.stop, 3) if emboli[z].any()]
    place = np.argwhere(emboli[shown[0]]).mean(axis=0)
    listed = (decided(studies[0], tmp_path, ("accepted", shown[0], tuple(place.tolist()))), *studies[1:])
    slabs = prepare_slabs(read_sources(listed), SLABS, tmp_path / "cache", decisions=True)
    hard = {int(index) for index, hard in zip(slabs.slices, slabs.hard, strict=True) if hard}
    volume = read_volume(studies[0].path)
    spacing = np.array(volume.spacing_mm)
    centre = np.array([shown[0], *place])
    for z in shown:
        outlined = np.argwhere(emboli[z])
        in_plane = np.linalg.norm((outlined - centre[1:]) * spacing[1:], axis=1).min()
        near = abs(z - shown[0]) * spacing[0] <= 12 and in_plane <= 12
        assert (z in hard) == (not near), z
    assert shown[0] not in hard


def test_a_negative_label_with_embolism_marked_is_refused(studies, tmp_path):
    with pytest.raises(InputError, match=r"study study0: its label is 'negative', but slice \d+ is marked 'embolism'"):
        prepared((replace(studies[0], label="negative"), *studies[1:]), tmp_path)


def test_a_mask_outside_the_crop_is_left_out_with_a_warning(tmp_path, caplog):
    volume, mask = small_chest(0, emboli=3)
    drawn = np.zeros_like(mask.voxels)
    drawn[10, :3, :3] = 1  # in the corner, beyond the centre 32 x 32
    drawn[13, 30:34, 30:34] = 1
    write_volume(volume, tmp_path / "ct.nrrd")
    annotation = SparseAnnotation.from_mask(volume, volume.with_voxels(drawn), (10, 13, 16), "reader")
    annotation.write(tmp_path / "ct.json", volume)
    study = Study("corner", tmp_path / "ct.nrrd", label="positive", annotation=tmp_path / "ct.json")
    slabs = prepared((study,), tmp_path / "cache", config=SlabConfig(matrix=64, crop=32, slab_count=6))
    assert slabs.labels.tolist() == [1, 0]
    assert "study corner: the mask on slice 10 lies outside the centre crop" in caplog.text


def test_the_draw_follows_the_seed(studies, tmp_path):
    draws = [
        used_slices(prepared(studies, tmp_path / name, seed), studies) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_without_an_embolism_slice_it_says_what_is_missing(studies, tmp_path):
    with pytest.raises(InputError, match=r"no annotated embolism slice in 3 studies \(0 with an annotation\)"):
        prepared(studies[1::2], tmp_path)


def test_without_a_negative_slice_it_says_what_is_missing(tmp_path):
    volume, mask = small_chest(0, emboli=3)
    write_volume(volume, tmp_path / "ct.nrrd")
    drawn = np.flatnonzero(mask.voxels.any(axis=(1, 2)))
    SparseAnnotation.from_mask(volume, mask, drawn.tolist(), "reader").write(tmp_path / "ct.json", volume)
    study = Study("ct", tmp_path / "ct.nrrd", annotation=tmp_path / "ct.json")
    with pytest.raises(
        InputError, match="no slice without embolism in 1 studies: add studies with the label 'negative'"
    ):
        prepared((study,), tmp_path / "cache")


def test_a_missing_ct_is_refused_by_the_name_of_its_study(studies, tmp_path):
    with pytest.raises(InputError, match=r"study study0: .*gone.nrrd cannot be read \(No such file"):
        prepared((replace(studies[0], path=tmp_path / "gone.nrrd"), *studies[1:]), tmp_path)


def test_a_broken_ct_is_refused_by_the_name_of_its_study(studies, tmp_path):
    broken = tmp_path / "broken.nrrd"
    broken.write_bytes(studies[1].path.read_bytes()[:500])
    with pytest.raises(InputError, match="study study1: "):
        prepared((studies[0], replace(studies[1], path=broken), *studies[2:]), tmp_path / "cache")


def test_an_annotation_of_another_ct_is_refused_by_the_name_of_its_study(studies, tmp_path):
    swapped = (replace(studies[0], annotation=studies[2].annotation), *studies[1:2])
    with pytest.raises(InputError, match="study study0: annotation: made on other voxels"):
        prepared(swapped, tmp_path)


def test_prepared_slabs_are_not_prepared_again(studies, tmp_path, monkeypatch):
    before = [item.slab for item in prepared(studies, tmp_path)]

    def refuse(path: Path) -> Volume:
        raise AssertionError(f"{path} was read again")

    for module in ("cache", "slabs"):
        monkeypatch.setattr(f"pe_app.training.datasets.{module}.read_volume", refuse)
    again = prepared(studies, tmp_path)
    assert all(torch.equal(one, item.slab) for one, item in zip(before, again, strict=True))


def test_slabs_of_a_former_ct_or_annotation_or_setting_are_not_used(studies, tmp_path):
    own = small_studies(tmp_path / "studies", count=2)
    cache = tmp_path / "cache"
    first = {file.path for file in prepared(own, cache).files}
    assert {file.path for file in prepared(own, cache).files} == first

    volume = read_volume(own[1].path)
    write_volume(volume.with_voxels(volume.voxels + np.int16(7)), own[1].path)
    second = prepared(own, cache)
    assert second.files[0].path in first
    assert second.files[1].path not in first

    more = (reviewed(own[0], (LUNG.start + 1, "none")), own[1])
    assert prepared(more, cache).files[0].path not in first
    assert not first & {file.path for file in prepared(own, cache, config=replace(SLABS, hu_window=(-500, 500))).files}


def test_a_folder_of_files_is_known_by_all_of_its_bytes(tmp_path):
    folder = tmp_path / "series"
    (folder / "part").mkdir(parents=True)
    (folder / "a.dcm").write_bytes(b"first")
    (folder / "part" / "b.dcm").write_bytes(b"second")
    study = Study("study", folder)
    known = {read_sources([study])[0].files_sha256}
    assert {read_sources([study])[0].files_sha256} == known
    (folder / "part" / "b.dcm").write_bytes(b"Second")
    known |= {read_sources([study])[0].files_sha256}
    (folder / "c.dcm").write_bytes(b"")
    known |= {read_sources([study])[0].files_sha256}
    assert len(known) == 3


def test_files_that_nobody_touched_are_not_read_again_and_others_are(studies, tmp_path, monkeypatch):
    path = tmp_path / "ct.nrrd"
    path.write_bytes(studies[0].path.read_bytes())
    os.utime(path, (1e9, 1e9))
    study, cache = replace(studies[0], path=path, annotation=None), tmp_path / "cache"
    first = read_sources([study], cache_dir=cache)[0].files_sha256
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert read_sources([study], cache_dir=cache)[0].files_sha256 == first
    path.write_bytes(path.read_bytes()[::-1])  # as long as before
    second = read_sources([study], cache_dir=cache)[0].files_sha256
    assert second != first
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=times)  # changed again at once: the time that the file shows is the same
    assert read_sources([study], cache_dir=cache)[0].files_sha256 == first


def test_preparing_goes_on_where_it_was_stopped_and_keeps_whole_files_only(studies, tmp_path):
    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        prepare_slabs(read_sources(studies), SLABS, tmp_path, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(kept) == 3
    assert not list(tmp_path.rglob(".*"))
    prepared(studies, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_truncated_file_of_slabs_is_made_again(studies, tmp_path):
    slabs = prepared(studies, tmp_path)
    expected, path = slabs[0].slab, slabs.files[0].path
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(prepared(studies, tmp_path)[0].slab, expected)


SLABS_OF_6 = SlabConfig(matrix=128, crop=96, slab_count=6)  # a grid of 6 x 6 cells


def blocks(seed: int) -> SlabItem:
    """Slabs that are bright exactly on the cells of their target, so that one can be told from the other."""
    rng = np.random.default_rng(seed)
    targets = np.zeros((16, 6, 6), np.float32)
    targets[np.arange(8), rng.integers(0, 6, 8), rng.integers(0, 6, 8)] = 1
    slabs = np.repeat(targets.repeat(16, 1).repeat(16, 2)[:, None], 5, 1) * 0.5 + 0.25
    labels = torch.tensor([1] * 8 + [0] * 8)
    return SlabItem(torch.from_numpy(slabs), torch.from_numpy(targets), labels, torch.zeros(16, dtype=torch.long))


def test_flips_and_shifts_move_slab_and_target_together():
    items = blocks(0)
    settings = Augmentation(flip=True, shift_cells=3, jitter_hu=0)
    moved = 0
    for seed in range(20):
        changed = augmented(items, settings, SLABS, torch.Generator().manual_seed(seed))
        bright = torch.nn.functional.max_pool2d(changed.slab.mean(1), 16) > 0.5
        assert torch.equal(bright.float(), changed.target)
        assert torch.equal(changed.target.any((1, 2)), items.target.any((1, 2)))  # no embolism is lost or made up
        moved += int((changed.target != items.target).any((1, 2)).sum())
    assert moved > 80  # of 160


def test_a_slab_with_an_embolism_that_is_not_outlined_is_not_moved_out():
    items = blocks(0)
    target = items.target.clone()
    target[:4] = -1
    settings = Augmentation(flip=True, shift_cells=3, jitter_hu=0)
    for seed in range(10):
        changed = augmented(items._replace(target=target), settings, SLABS, torch.Generator().manual_seed(seed))
        assert (changed.target[:4] == -1).all()
        for number in range(4):
            slab = items.slab[number]
            assert any(torch.equal(changed.slab[number], kept) for kept in (slab, slab.flip(-1)))


def test_jitter_adds_one_offset_to_a_slab_within_its_bound():
    items = blocks(0)
    settings = Augmentation(flip=False, shift_cells=0, jitter_hu=50)
    changed = augmented(items, settings, SLABS, torch.Generator().manual_seed(0))
    offset_hu = ((changed.slab - items.slab) * 1524).flatten(1)
    assert (offset_hu.amax(1) - offset_hu.amin(1)).max() < 1e-2
    assert offset_hu.abs().max() <= 50
    assert offset_hu[:, 0].std() > 10
    assert torch.equal(changed.target, items.target)


def test_windows_hold_an_embolism_and_those_without_lie_where_others_do():
    items = blocks(0)
    # a gradient tells where in the slab a window was cut
    places = torch.arange(96.0).view(1, 1, 96, 1) * 1000 + torch.arange(96.0)
    items = items._replace(slab=places.expand(16, 5, 96, 96))
    settings = Augmentation(flip=False, shift_cells=0, jitter_hu=0, window_cells=2)
    for seed in range(20):
        changed = augmented(items, settings, SLABS_OF_6, torch.Generator().manual_seed(seed))
        assert changed.slab.shape == (16, 5, 32, 32)
        assert changed.target.shape == (16, 2, 2)
        assert changed.target[:8].flatten(1).sum(1).min() == 1  # each slab has one marked cell
        corners = changed.slab[:, 0, 0, 0]
        rows, columns = (corners // 1000 / 16).long(), (corners % 1000 / 16).long()
        assert set(corners[8:].tolist()) <= set(corners[:8].tolist())
        for number in range(8):
            row, column = rows[number], columns[number]
            assert torch.equal(changed.target[number], items.target[number, row : row + 2, column : column + 2])


def twin_studies(folder: Path) -> tuple[Study, ...]:
    """Two patients with emboli, each followed by the same chest where the emboli are lung, on the same slices."""
    studies = []
    for number in range(2):
        volume, mask = small_chest(number, emboli=3)
        without = np.where(mask.voxels > 0, -820, volume.voxels).astype(np.int16)
        nothing = mask.with_voxels(np.zeros_like(mask.voxels))
        shown = np.flatnonzero(mask.voxels.any(axis=(1, 2)))[::2].tolist()
        for kind, voxels, outlines in (("pe", volume.voxels, mask), ("none", without, nothing)):
            ct, path = volume.with_voxels(voxels), folder / f"{number}{kind}.nrrd"
            write_volume(ct, path)
            SparseAnnotation.from_mask(ct, outlines, shown, "reader").write(path.with_suffix(".json"), ct)
            label = "positive" if kind == "pe" else ""
            studies.append(Study(f"{number}{kind}", path, f"p{number}", label, path.with_suffix(".json")))
    return tuple(studies)


def test_twins_are_alike_but_for_the_embolism_and_are_changed_alike(tmp_path):
    studies = twin_studies(tmp_path)
    slabs = prepared(studies, tmp_path / "cache")
    twins = TwinSlabs(slabs, {study.study: study.patient for study in studies})
    assert len(twins) == int(slabs.labels.sum())
    settings = Augmentation(flip=True, shift_cells=1, jitter_hu=40, window_cells=2)
    for seed, pair in enumerate(twins):
        assert pair.label.tolist() == [1, 0]
        changed = augmented(pair, settings, SLABS, torch.Generator().manual_seed(seed), together=2)
        for items in (pair, changed):
            assert items.target[0].any()
            assert not items.target[1].any()
            marked = items.target[0].repeat_interleave(16, 0).repeat_interleave(16, 1) > 0
            middle = items.slab[:, 2]
            assert torch.equal(middle[0][~marked], middle[1][~marked])
        assert not torch.equal(pair.slab[0], pair.slab[1])


def test_studies_without_a_twin_are_refused(studies, tmp_path):
    with pytest.raises(InputError, match="no matched pairs among the studies"):
        TwinSlabs(prepared(studies, tmp_path), {study.study: study.patient for study in studies})


def test_outlines_stay_on_the_disk_and_are_those_that_were_read_first(tmp_path):
    study = small_studies(tmp_path, count=1)[0]
    (source,) = read_sources([study])
    outlines = source.annotation()
    assert all(np.array_equal(outlines.masks[index], truth(study)[index]) for index in outlines.masks)
    pixels = sum(mask.nbytes for mask in outlines.masks.values())
    assert len(pickle.dumps(source)) < pixels / 4

    volume, mask = small_chest(0, emboli=3)
    SparseAnnotation.from_mask(volume, mask, [8], "another reader").write(study.annotation, volume)
    with pytest.raises(InputError, match="was changed while it was being read"):
        source.annotation()


def test_studies_of_unknown_patients_are_no_twins(tmp_path):
    studies = twin_studies(tmp_path)
    with pytest.raises(InputError, match="no matched pairs among the studies"):
        TwinSlabs(prepared(studies, tmp_path / "cache"), dict.fromkeys((study.study for study in studies), ""))


def test_augmentation_follows_its_generator_and_leaves_the_original():
    items, original = blocks(0), blocks(0)
    first, second = (augmented(items, Augmentation(), SLABS, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.slab, second.slab)
    assert torch.equal(items.slab, original.slab)
    assert torch.equal(items.target, original.target)


@pytest.fixture(scope="module")
def detector() -> Detector:
    made = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    return made.with_precision("float32")


def test_features_are_the_frozen_encoders_last_activations_in_float16(studies, tmp_path, detector):
    statistics = detector.encoder.bn1.running_mean.clone()
    detector.encoder.train()  # as a careless caller leaves it
    path = encode_studies(detector, studies[:1], tmp_path)[0]
    volume = read_volume(studies[0].path)
    assert path.name.startswith(volume.sha256 + "-")
    slabs = study_slabs(volume, lung_range(volume), SLABS)
    with torch.no_grad():
        expected = detector.encoder.eval()(torch.from_numpy(slabs.pixels.copy())).features
    stored = np.load(path)
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, expected.numpy(), rtol=1e-3, atol=1e-4)
    assert torch.equal(detector.encoder.bn1.running_mean, statistics)


def test_features_come_in_the_order_of_the_studies_with_their_labels(studies, tmp_path, detector):
    files = encode_sources(detector, read_sources(studies), tmp_path)
    items = StudyFeatures(files, [study.label == "positive" for study in studies])
    assert [int(item.label) for item in items] == [1, 0, 1, 0, 1, 0]
    for study, file, item in zip(studies, files, items, strict=True):
        assert (file.study, file.image_sha256) == (study.study, read_volume(study.path).sha256)
        assert item.features.shape == (6, 64, 4, 4)
        assert np.array_equal(item.features.numpy(), np.load(file.path))


def test_encoding_goes_on_where_it_was_stopped(studies, tmp_path, detector):
    reports: list[Progress] = []

    def stop(progress: Progress) -> None:
        reports.append(progress)
        if progress.task == "encode studies" and progress.done >= 2 * SLABS.slab_count:
            raise Cancelled

    with pytest.raises(Cancelled):
        encode_studies(detector, studies, tmp_path, stop)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(kept) == 2
    paths = encode_studies(detector, studies, tmp_path)
    assert len(set(paths)) == 6
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    done = [report.done for report in reports if report.task == "encode studies"]
    assert done == sorted(done)
    assert {report.total for report in reports if report.task == "encode studies"} == {6 * SLABS.slab_count}


def test_features_of_other_weights_or_settings_or_voxels_have_other_names(tmp_path, detector):
    study = small_studies(tmp_path / "studies", count=1)
    cache = tmp_path / "cache"
    paths = {encode_studies(detector, study, cache)[0]}
    paths |= {encode_studies(Detector.untrained(1, SLABS, ENCODER, CLASSIFIER), study, cache)[0]}
    paths |= {encode_studies(replace(detector, slabs=replace(SLABS, slab_spacing="physical")), study, cache)[0]}
    tilted = Detector.untrained(0, SLABS, replace(ENCODER, attention_score="positive_logit"), CLASSIFIER)
    paths |= {encode_studies(tilted, study, cache)[0]}
    volume = read_volume(study[0].path)
    write_volume(volume.with_voxels(volume.voxels + np.int16(7)), study[0].path)
    paths |= {encode_studies(detector, study, cache)[0]}
    assert len(paths) == 5


def test_a_truncated_file_of_features_is_made_again(studies, tmp_path, detector):
    path = encode_studies(detector, studies[:1], tmp_path)[0]
    expected = np.load(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert encode_studies(detector, studies[:1], tmp_path) == (path,)
    assert np.array_equal(np.load(path), expected)


def test_a_study_without_lung_is_refused_by_its_name(tmp_path, detector):
    volume, _ = small_chest(0, emboli=0)
    lung = np.abs(volume.voxels + 820) < 120
    write_volume(volume.with_voxels(np.where(lung, np.int16(40), volume.voxels)), tmp_path / "belly.nrrd")
    with pytest.raises(InputError, match=r"study belly: .*no lung"):
        encode_studies(detector, (Study("belly", tmp_path / "belly.nrrd"),), tmp_path)


def test_matched_negatives_lie_at_the_heights_of_the_positives(studies, tmp_path):
    sources = read_sources(studies)
    slabs = prepare_slabs(sources, SLABS, tmp_path, negatives="matched")
    ranges = [lung_range(read_volume(source.study.path)) for source in sources]
    names = [source.study.study for source in sources]
    heights = {0: [], 1: []}
    for index, (file, _) in enumerate(slabs.places):
        lung = ranges[names.index(slabs.files[file].study)]
        height = (slabs.slices[index] - lung.first) / (lung.last - lung.first)
        heights[int(slabs.labels[index])].append(height)
        if slabs.labels[index] == 0:
            assert sources[names.index(slabs.files[file].study)].study.label == "negative"
    assert len(heights[0]) == len(heights[1])
    assert np.sort(heights[0]) == pytest.approx(np.sort(np.clip(heights[1], 0, 1)), abs=0.1)


def test_half_matched_negatives_lie_half_at_the_heights_of_the_positives_and_half_anywhere(studies, tmp_path):
    sources = read_sources(studies)
    ranges = {source.study.study: lung_range(read_volume(source.study.path)) for source in sources}
    drawn = {
        kind: prepare_slabs(sources, SLABS, tmp_path / kind, negatives=kind) for kind in ("matched", "half_matched")
    }
    chosen = {kind: {(slabs.files[file].study, int(slabs.slices[index])) for index, (file, _) in
                     enumerate(slabs.places) if slabs.labels[index] == 0} for kind, slabs in drawn.items()}  # fmt: skip
    assert len(chosen["half_matched"]) == len(chosen["matched"])
    # other levels than the matched ones are among them, and none beyond the lungs
    assert len(chosen["half_matched"] - chosen["matched"]) >= len(chosen["matched"]) // 4
    assert all(ranges[study].first <= index <= ranges[study].last for study, index in chosen["half_matched"])


def test_negatives_of_negative_studies_only_are_the_papers_way(studies, tmp_path):
    annotated = [replace(study, label="positive") if study.annotation else study for study in studies]
    slabs = prepare_slabs(read_sources(annotated), SLABS, tmp_path, negatives="negative_studies")
    labels = {study.study: study.label for study in annotated}
    for index, (file, _) in enumerate(slabs.places):
        assert (labels[slabs.files[file].study] == "positive") == bool(slabs.labels[index])


# Many studies


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_processes_prepare_what_one_would(tmp_path, detector):
    sources = read_sources(small_studies(tmp_path / "studies", count=8))
    for folder, how in (("one", Preparation()), ("two", Preparation(workers=2))):
        slabs = prepare_slabs(sources, SLABS, tmp_path / folder, preparation=how)
        assert [file.study for file in slabs.files] == [source.study.study for source in sources]
        files = encode_sources(detector, sources, tmp_path / f"{folder} encoded", preparation=how)
        assert [file.study for file in files] == [source.study.study for source in sources]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one encoded") == contents(tmp_path / "two encoded")


def test_the_size_of_the_features_is_known_before(studies, tmp_path, detector):
    (path,) = encode_studies(detector, studies[:1], tmp_path)
    assert np.load(path).nbytes == feature_bytes(detector)
    paper = Detector.untrained()
    assert feature_bytes(paper) == 50 * 512 * 24 * 24 * 2


def test_what_would_go_beyond_the_limit_is_refused_before_anything_is_made(studies, tmp_path, detector):
    sources, size = read_sources(studies, annotations=False), feature_bytes(detector)
    files = encode_sources(detector, sources[:2], tmp_path)
    there = sum(file.path.stat().st_size for file in files)
    limited = Preparation(limit_bytes=there + 4 * size - 1)
    with pytest.raises(InputError, match=r"4 files are still missing, .* beyond the limit of .*: raise the limit"):
        encode_sources(detector, sources, tmp_path, preparation=limited)
    assert len(contents(tmp_path)) == 2
    assert len(encode_sources(detector, sources[:2], tmp_path, preparation=Preparation(limit_bytes=1))) == 2
    enough = Preparation(limit_bytes=there + 4 * size)
    assert len(encode_sources(detector, sources, tmp_path, preparation=enough)) == 6


@pytest.mark.parametrize(("said", "limit"), [("", None), ("500MB", 500e6), ("200GB", 200e9), ("1.5 tb", 1.5e12)])
def test_the_limit_is_said_as_people_say_sizes(said, limit):
    assert preparation(3, said) == Preparation(3, limit)


@pytest.mark.parametrize("said", ["200", "lots", "-1GB", "GB"])
def test_a_limit_that_is_no_size_is_refused(said):
    with pytest.raises(InputError, match="expected a size such as"):
        preparation(None, said)


def test_what_does_not_find_room_on_the_disk_is_refused_before_anything_is_made(studies, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"6 files are still missing, .* its disk has 1e-06 GB left"):
        prepared(studies, tmp_path)
    assert not contents(tmp_path)


def test_unfinished_files_of_killed_processes_are_removed_when_nobody_can_be_writing_them(studies, tmp_path):
    old, new = (tmp_path / f".{'0a' * 16}.{name}.npy" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    prepared(studies, tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_study_that_cannot_be_used_stops_no_other_where_that_is_wanted(studies, tmp_path, detector):
    sources = read_sources(studies, annotations=False)
    broken = tmp_path / "broken.nrrd"
    broken.write_bytes(b"NRRD0004")
    (bad,) = read_sources([replace(studies[2], path=broken)], annotations=False)
    said: list[InputError] = []
    files = encode_sources(detector, (*sources[:2], bad, sources[3]), tmp_path, refused=said.append)
    assert [file.study for file in files] == ["study0", "study1", "study3"]
    assert str(said[0]).startswith("study study2: ")
