"""Results as DICOM objects: read back by others, held against the source's own pixels, judged by validators."""

import shutil
import subprocess
from dataclasses import replace

import highdicom
import numpy as np
import orthanc
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from small_series import MARK_HU, TURNS, detection_of, marked, read_turned, write_turned
from typer.testing import CliRunner

from pe_app.annotation.sparse import ReviewedSlice, SparseAnnotation
from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.ct.quality import Reason
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.pacs.dicomweb import Access, Archive, Stored
from pe_app.pacs.sending import send
from pe_app.results.dicom import detection_objects, write_dicom_results, write_reader_segmentation
from pe_app.results.dicom.attention import attention_map
from pe_app.results.dicom.origin import Origin
from pe_app.results.dicom.outlines import candidate_mask, candidate_segmentation

DEMO = Reason("demo_model", "It has never seen a real embolism.", refuses=False)
UNTRAINED = Reason("untrained_model", "Its numbers are random and mean nothing.", refuses=False)
NO_CONTRAST = Reason("no_contrast", "no contrast: the brightest blood has 45 HU", refuses=True)
LEGACY = {
    "SeriesDate": "20260102", "SeriesTime": "101112", "ContentDate": "20260102", "ContentTime": "101112",
    "AcquisitionDate": "20260102", "AcquisitionTime": "101112", "Manufacturer": "M", "ManufacturerModelName": "M",
    "DeviceSerialNumber": "1", "SoftwareVersions": "1", "SliceThickness": 3, "BodyPartExamined": "CHEST",
    "PositionReferenceIndicator": "", "PatientPosition": "HFS", "Laterality": "", "AcquisitionNumber": 1,
}  # fmt: skip
WEAK = Reason("weak_contrast", "weak contrast: 150 HU", refuses=False)


def sources(folder):
    """The CT instances by SOP Instance UID: the file and its header."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return {pydicom.dcmread(path).SOPInstanceUID: path for path in files}


def frames_of(path):
    """Every frame of a SEG: segment, pixels and the SOP Instance UID that it was drawn on, read with pydicom alone."""
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    for frame, group in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        shared = dataset.SharedFunctionalGroupsSequence[0]
        identified = group if "SegmentIdentificationSequence" in group else shared
        segment = identified.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        yield segment, frame, source, group


def text_of(dataset) -> str:
    """Every value of a dataset as one text."""
    return " ".join(str(element.value) for element in dataset.iterall() if element.VR != "SQ")


@pytest.mark.parametrize("step_mm", [3.0, -3.0], ids=["feet to head", "head to feet"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_readers_outline_lies_on_the_pixels_that_it_was_drawn_on(write_series, tmp_path, turn, step_mm):
    folder, volume = read_turned(write_series, turn, step_mm)
    slices = [int(k) for k in np.flatnonzero(marked(volume).any((1, 2)))]
    annotation = SparseAnnotation.from_mask(volume, volume.with_voxels(marked(volume)), [0, *slices], "Reader One")
    path = write_reader_segmentation(annotation, volume, tmp_path / "seg.dcm")
    instances, drawn_on = sources(folder), set()
    for _, frame, source, group in frames_of(path):
        stored = pydicom.dcmread(instances[source])
        np.testing.assert_array_equal(frame != 0, stored.pixel_array == MARK_HU + 1024)
        np.testing.assert_allclose(
            group.PlanePositionSequence[0].ImagePositionPatient, stored.ImagePositionPatient, atol=1e-6
        )
        assert frame.any()
        drawn_on.add(source)
    assert len(drawn_on) == len(slices)
    held = pydicom.dcmread(path)
    assert held.ContentCreatorName == "Reader One^"
    assert held.SegmentSequence[0].SegmentAlgorithmType == "MANUAL"
    assert held.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue == "59282003"
    assert "none: 0" in held.SegmentSequence[0].SegmentDescription


def test_outlines_and_results_of_a_multi_frame_ct_refer_to_its_frames(write_series, tmp_path):
    single = sorted(
        map(pydicom.dcmread, write_turned(write_series, **LEGACY).iterdir()), key=lambda one: one.InstanceNumber
    )
    source = LegacyConvertedEnhancedCTImage(single, "1.2.8", 1, "1.2.8.1", 1)  # instance numbers are shuffled
    (tmp_path / "enhanced").mkdir()
    source.save_as(tmp_path / "enhanced" / "one.dcm", enforce_file_format=True)
    volume = read_volume(tmp_path / "enhanced")
    annotation = SparseAnnotation.from_mask(volume, volume.with_voxels(marked(volume)), range(24), "Reader One")
    path = write_reader_segmentation(annotation, volume, tmp_path / "seg.dcm")
    drawn = 0
    for _, frame, uid, group in frames_of(path):
        number = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        np.testing.assert_array_equal(frame != 0, source.pixel_array[number - 1] == MARK_HU + 1024)
        assert uid == source.SOPInstanceUID
        drawn += 1
    assert drawn == marked(volume).any((1, 2)).sum()
    objects = detection_objects(detection_of(volume), volume)
    shown = objects["picture-1.dcm"].SourceImageSequence[0]
    assert shown.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert 1 <= shown.ReferencedFrameNumber <= 24


@pytest.mark.parametrize("turn", TURNS)
def test_candidates_lie_where_the_cells_of_their_attention_do(write_series, tmp_path, turn):
    folder, volume = read_turned(write_series, turn)
    result = detection_of(volume)
    candidate_segmentation(result, Origin.of(volume), "key").save_as(tmp_path / "candidates.dcm")
    points = {1: [], 2: []}
    instances = sources(folder)
    for segment, frame, source, _ in frames_of(tmp_path / "candidates.dcm"):
        image = sitk.ReadImage(str(instances[source]))
        for row, column in np.argwhere(frame):
            points[segment].append(image.TransformIndexToPhysicalPoint((int(column), int(row), 0)))
    for candidate in result.detection.candidates:
        centre = np.mean(points[candidate.rank], axis=0)
        assert np.abs(centre - candidate.centre_lps_mm).max() < 3.5  # half a slice and half a cell's rounding
        truth = volume.to_lps_mm(np.argwhere(candidate_mask(result, volume) == candidate.rank))
        np.testing.assert_allclose(sorted(map(tuple, np.round(points[candidate.rank], 3))),
                                   sorted(map(tuple, np.round(truth, 3))), atol=2e-3)  # fmt: skip


def test_highdicom_reads_the_attention_back_with_its_place(write_series, tmp_path):
    _, volume = read_turned(write_series, "oblique by 10 degrees")
    result = detection_of(volume)
    attention_map(result, Origin.of(volume), "key").save_as(tmp_path / "attention.dcm")
    read = highdicom.imread(tmp_path / "attention.dcm").get_volume(dtype=np.float32)
    values, affine = np.asarray(read.array), np.asarray(read.affine)
    strongest = np.unravel_index(values.argmax(), values.shape)
    place = affine @ [*strongest, 1]
    np.testing.assert_allclose(place[:3], result.detection.evidence[2].peak_lps_mm, atol=1e-3)
    assert values.max() == pytest.approx(result.attention.voxels.max() / 255)
    assert sorted(values[values > 0].tolist()) == pytest.approx(
        sorted((result.attention.voxels[result.attention.voxels > 0] / 255).tolist())
    )


def test_the_objects_share_patient_study_and_frame_of_reference_with_their_source(write_series, tmp_path):
    folder, volume = read_turned(write_series)
    source = pydicom.dcmread(next(iter(sources(folder).values())))
    files = write_dicom_results(detection_of(volume, WEAK), volume, tmp_path / "o")
    objects = {path.name: pydicom.dcmread(path) for path in files}
    assert set(objects) >= {"candidates.dcm", "attention.dcm", "report.dcm", "picture-0.dcm", "picture-1.dcm"}
    for name, dataset in objects.items():
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "AccessionNumber"):
            assert str(dataset[keyword].value) == str(source[keyword].value), (name, keyword)
        assert "research use only" in dataset.SeriesDescription.lower()
        assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    for name in ("candidates.dcm", "attention.dcm"):
        assert objects[name].FrameOfReferenceUID == source.FrameOfReferenceUID
    assert len({dataset.SeriesInstanceUID for dataset in objects.values()}) == 4


def test_the_report_says_probability_threshold_evidence_candidates_and_model(write_series, tmp_path):
    _, volume = read_turned(write_series)
    result = detection_of(volume, WEAK)
    write_dicom_results(result, volume, tmp_path)
    report = highdicom.sr.srread(tmp_path / "report.dcm").content
    study, evidence = report.get_image_measurement_groups()
    numbers = {m.name.meaning: m.value for m in study.get_measurements()}
    assert numbers == pytest.approx(
        {"Probability": 0.71, "Threshold Value": 0.5, "Extent estimate of attention, no clot burden": 12.5}
    )
    assert [m.value for m in evidence.get_measurements()] == pytest.approx(
        [slab.probability for slab in result.detection.evidence]
    )
    candidates = report.get_planar_roi_measurement_groups()
    places = [group.roi.value[0] for group in candidates]
    np.testing.assert_allclose(places, [c.centre_lps_mm for c in result.detection.candidates], atol=1e-3)
    segments = pydicom.dcmread(tmp_path / "candidates.dcm").SegmentSequence
    assert [group.tracking_uid for group in candidates] == [segment.TrackingUID for segment in segments]
    assert {group.finding_type.value for group in candidates} == {"59282003"}
    said = text_of(pydicom.dcmread(tmp_path / "report.dcm"))
    for words in ("tester", "ab" * 32, "weak contrast: 150 HU", "Research use only", "RID13"):
        assert words in said


def test_a_refused_study_has_a_report_that_says_why_and_no_number(write_series):
    _, volume = read_turned(write_series)
    objects = detection_objects(detection_of(volume, NO_CONTRAST, refused=True), volume)
    assert set(objects) == {"report.dcm", "picture-0.dcm"}
    said = text_of(objects["report.dcm"])
    assert "no contrast: the brightest blood has 45 HU" in said
    assert "Not Attempted" in said
    assert not [element for element in objects["report.dcm"].iterall() if element.keyword == "NumericValue"]
    assert "59282003" not in said


@pytest.mark.parametrize(("reason", "words"), [(UNTRAINED, "Untrained model"), (DEMO, "Demonstration model")])
def test_what_a_model_without_real_training_shows_never_looks_like_a_clinical_result(write_series, reason, words):
    _, volume = read_turned(write_series)
    objects = detection_objects(detection_of(volume, reason), volume)
    for dataset in objects.values():
        assert dataset.SeriesDescription.startswith(f"{words}: not a clinical result")
        assert "59282003" not in text_of(dataset)
    assert words in objects["report.dcm"].ConceptNameCodeSequence[0].CodeMeaning
    for segment in objects["candidates.dcm"].SegmentSequence:
        assert segment.SegmentLabel.startswith(f"Model attention ({words.lower()})")
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == f"Model attention ({words.lower()})"
    has_numbers = any(element.keyword == "NumericValue" for element in objects["report.dcm"].iterall())
    assert has_numbers == (reason is DEMO)


def test_pictures_are_colour_of_512_pixels_and_refer_to_the_slice_they_show(write_series):
    folder, volume = read_turned(write_series)
    objects = detection_objects(detection_of(volume), volume)
    picture = objects["picture-1.dcm"]
    assert (picture.Rows, picture.Columns, picture.SamplesPerPixel) == (512, 512, 3)
    shown = picture.SourceImageSequence[0].ReferencedSOPInstanceUID
    assert shown in sources(folder)
    letters = picture.pixel_array[4:24, 8:300].astype(int)  # the notice stands in the upper left
    assert (letters[..., 0] - letters[..., 2] > 80).sum() > 200


@pytest.mark.parametrize("reasons", [(WEAK,), (UNTRAINED,), (NO_CONTRAST,)], ids=lambda reasons: reasons[0].code)
def test_independent_validators_find_no_error(write_series, tmp_path, reasons):
    if shutil.which("dciodvfy") is None or shutil.which("dsrdump") is None:
        pytest.skip("no validators: install the Debian packages dicom3tools and dcmtk")
    _, volume = read_turned(write_series, "oblique by 10 degrees")
    paths = write_dicom_results(detection_of(volume, *reasons, refused=NO_CONTRAST in reasons), volume, tmp_path / "o")
    annotation = SparseAnnotation.from_mask(volume, volume.with_voxels(marked(volume)), range(24), "Reader One")
    for path in (*paths, write_reader_segmentation(annotation, volume, tmp_path / "reader.dcm")):
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []
        assert path.name
    dumped = subprocess.run(["dsrdump", tmp_path / "o" / "report.dcm"], capture_output=True, text=True, check=False)
    assert dumped.returncode == 0
    assert "E: " not in dumped.stderr


def test_the_same_result_has_the_same_uids_and_another_one_has_others(write_series):
    _, volume = read_turned(write_series)

    def uids(*reasons):
        return {
            name: dataset.SOPInstanceUID
            for name, dataset in detection_objects(detection_of(volume, *reasons), volume).items()
        }

    first = uids()
    assert uids() == first
    assert not set(first.values()) & set(uids(WEAK).values())
    assert len(set(first.values())) == len(first)
    assert all(pydicom.uid.UID(uid).is_valid for uid in first.values())


def test_files_of_an_earlier_detection_go_and_a_persons_own_stay(write_series, tmp_path):
    _, volume = read_turned(write_series)
    own = tmp_path / "o" / "own.dcm"
    write_dicom_results(detection_of(volume), volume, tmp_path / "o")
    own.write_bytes(b"mine")
    write_dicom_results(detection_of(volume, NO_CONTRAST, refused=True), volume, tmp_path / "o")
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"report.dcm", "picture-0.dcm", "own.dcm"}


def test_a_ct_that_did_not_come_from_dicom_is_told_what_to_do(write_series, tmp_path):
    _, volume = read_turned(write_series)
    write_volume(volume, tmp_path / "ct.nrrd")
    alone = read_volume(tmp_path / "ct.nrrd")
    with pytest.raises(InputError, match="pe-app import"):
        detection_objects(detection_of(alone), alone)


def test_a_series_without_a_frame_of_reference_is_told_so(write_series):
    _, volume = read_turned(write_series)
    lost = replace(volume, source=replace(volume.source, frame_of_reference_uid=""))
    with pytest.raises(InputError, match="no frame of reference"):
        detection_objects(detection_of(lost), lost)


def test_a_segmentation_names_the_slices_that_were_not_outlined(write_series, tmp_path):
    _, volume = read_turned(write_series)
    annotation = SparseAnnotation.from_mask(volume, volume.with_voxels(marked(volume)), range(12), "Reader One")
    free = next(index for index in range(12, 24) if not marked(volume)[index].any())
    entry = ReviewedSlice(free, float(volume.slice_z_mm[free]), "embolism", not_outlined=True)
    segment = pydicom.dcmread(
        write_reader_segmentation(annotation.review(entry), volume, tmp_path / "seg.dcm")
    ).SegmentSequence[0]
    assert f"embolism, not outlined: {free};" in segment.SegmentDescription
    alone = SparseAnnotation.empty(volume).review(entry)
    assert write_reader_segmentation(alone, volume, tmp_path / "none.dcm") is None


def test_an_annotation_without_embolism_makes_no_segmentation(write_series, tmp_path):
    _, volume = read_turned(write_series)
    annotation = SparseAnnotation.empty(volume).review(ReviewedSlice(3, float(volume.slice_z_mm[3]), "none"))
    assert write_reader_segmentation(annotation, volume, tmp_path / "seg.dcm") is None
    assert not (tmp_path / "seg.dcm").exists()


class FickleArchive:
    """Holds what it took; refuses the objects named, as often as said."""

    def __init__(self, refusals):
        self.held, self.refusals, self.sent = {}, dict(refusals), []
        self.access = Access("http://127.0.0.1:1/dicom-web")

    def instances(self, study, series=None):
        return frozenset(self.held)

    def store(self, files, progress=None):
        failed = {}
        for path in files:
            self.sent.append(path.name)
            uid = str(pydicom.dcmread(path).SOPInstanceUID)
            if self.refusals.get(path.name, 0) > 0:
                self.refusals[path.name] -= 1
                failed[uid] = "out of resources"
            else:
                self.held[uid] = path.name
        return Stored(tuple(self.held), failed)


def test_a_refused_object_is_sent_again_and_a_second_send_sends_nothing(write_series, tmp_path):
    _, volume = read_turned(write_series)
    files = write_dicom_results(detection_of(volume, NO_CONTRAST, refused=True), volume, tmp_path)
    archive = FickleArchive({"report.dcm": 1})
    assert set(send(archive, files).stored) == set(files)
    assert archive.sent.count("report.dcm") == 2
    before = list(archive.sent)
    again = write_dicom_results(detection_of(volume, NO_CONTRAST, refused=True), volume, tmp_path / "again")
    second = send(archive, again)
    assert (set(second.known), second.stored, archive.sent) == (set(again), (), before)


def test_what_an_archive_keeps_refusing_is_named_and_only_that_is_sent_next_time(write_series, tmp_path):
    _, volume = read_turned(write_series)
    files = write_dicom_results(detection_of(volume, NO_CONTRAST, refused=True), volume, tmp_path)
    archive = FickleArchive({"report.dcm": 2})
    with pytest.raises(InputError, match=r"report\.dcm: out of resources"):
        send(archive, files)
    archive.sent.clear()
    sent = send(archive, files)
    assert archive.sent == ["report.dcm"]
    assert len(sent.known) == len(files) - 1


def test_a_real_archive_keeps_one_copy_of_what_is_sent_twice(write_series, tmp_path):
    folder, volume = read_turned(write_series)
    files = write_dicom_results(detection_of(volume, NO_CONTRAST, refused=True), volume, tmp_path / "o")
    with orthanc.running_orthanc(tmp_path / "archive") as archive:
        archive.add(list(sources(folder).values()))
        client = Archive(Access(archive.url, orthanc.USER, orthanc.PASSWORD))
        assert len(send(client, files).stored) == len(files)
        assert len(send(client, files).known) == len(files)
        held = archive.instances()
    ours = {str(pydicom.dcmread(path).SOPInstanceUID) for path in files}
    assert len(held) == 24 + len(files)
    assert ours <= held.keys()


@pytest.fixture
def typed(write_series, tmp_path, monkeypatch):
    """Types a command of pe-app in a folder with a DICOM series, of which a model says that it has no contrast."""
    write_turned(write_series, folder=tmp_path / "study")
    slabs = SlabConfig(matrix=64, crop=64, slab_count=6)
    classifier = ClassifierConfig(feature_channels=8, grid=4, filters=1)
    model = Detector.untrained(slabs=slabs, encoder=EncoderConfig(width=1), classifier=classifier)
    model.save(tmp_path / "m.safetensors")
    monkeypatch.setattr(
        Detector, "detect", lambda self, volume, progress: detection_of(volume, NO_CONTRAST, refused=True)
    )
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def test_detect_sends_to_an_archive_only_when_asked_and_can_be_repeated(typed, tmp_path, monkeypatch):
    command = ("detect", "study", "--model", "m.safetensors", "--out", "out")
    assert typed(*command).exit_code == 3  # refused
    assert not (tmp_path / "out" / "dicom").exists()
    with orthanc.running_orthanc(tmp_path / "archive") as archive:
        monkeypatch.setenv("PE_ARCHIVE_PASSWORD", orthanc.PASSWORD)
        for _ in range(2):
            sent = typed(*command, "--send", archive.url, "--user", orthanc.USER)
            assert sent.exit_code == 3, sent.output
            assert len(archive.instances()) == 2  # report and summary, once
        archive.stop()
    monkeypatch.setattr("pe_app.pacs.dicomweb.time.sleep", lambda seconds: None)
    down = typed(*command, "--send", archive.url, "--user", orthanc.USER)
    assert down.exit_code == 4
    assert "not published" in down.output
    assert (tmp_path / "out" / "detection.json").is_file()


def test_a_ct_without_its_dicom_is_analysed_and_said_to_have_no_objects(typed, tmp_path):
    write_volume(read_volume(tmp_path / "study"), tmp_path / "ct.nrrd")
    done = typed("detect", "ct.nrrd", "--model", "m.safetensors", "--out", "out", "--dicom")
    assert done.exit_code == 4
    assert "pe-app import" in done.output
    assert (tmp_path / "out" / "detection.json").is_file()
