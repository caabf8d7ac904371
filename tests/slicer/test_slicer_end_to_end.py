"""The Slicer module's requests against the real server of this project, through the REST interface only."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import slicer_paths  # noqa: F401
from phantoms import CLOT_SLICE, SHAPE, chest, chest_files, write_nifti
from PulmonaryEmbolismLib import images, review
from PulmonaryEmbolismLib.client import Client
from PulmonaryEmbolismLib.drafts import read_masks, send
from PulmonaryEmbolismLib.transport import Conflict, LabelConflict, ServerError

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from pathlib import Path
from pe_monailabel.server import serving as server
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.ct.slabs import SlabConfig
from pe_app.model.study_classifier import ClassifierConfig
classifier = ClassifierConfig(feature_channels=64, grid=16, filters=8)
detector = Detector.untrained(0, SlabConfig(matrix=256, crop=256), EncoderConfig(width=8), classifier)
detector.save(Path(sys.argv[3]))
server.serve(Path(sys.argv[1]), port=int(sys.argv[2]), model=Path(sys.argv[3]))
"""
"""The real server with a tiny untrained detector: arguments studies, port, model."""


def silent(text, done=0, total=0):
    pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The real server with two chests, one of them a flipped NIfTI file, and a tiny untrained detector."""
    folder = tmp_path_factory.mktemp("server")
    studies = folder / "studies"
    studies.mkdir()
    (studies / "study-1.nrrd").write_bytes(chest_files(0)[0])
    hu, _clot, affine = chest(1)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SHAPE[0] - 1
    write_nifti(studies / "study-2.nii.gz", hu[::-1], affine @ flip)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, studies, str(port), folder / "tiny.safetensors"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                Client(address).connect()
                break
            except ServerError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def client(address):
    return Client(address, reader="Ada")


def open_study(client, study, folder):
    """As the panel opens one."""
    client.lease(study)
    known = client.study(study)
    image = images.read_image(client.download_image(study, known.sha256, folder / "cache", silent)).canonical()
    assert image.voxels.shape == known.size
    masks = {}
    if known.annotation:
        masks = read_masks(client.download_label(study, known.tag, folder, silent), known.annotation)
    session = review.ReviewSession(client.address, known, image, client.reader)
    session.adopt(known.annotation, masks, known.revision)
    return known, image, session


def test_the_real_server_is_recognised(client):
    server = client.connect()
    assert {"next_unreviewed", "most_uncertain", "disagreement", "random"} <= set(server.strategies)
    assert not server.model.trained
    assert len(server.model.sha256) == 64


def test_a_review_goes_from_draft_to_final_and_comes_back_voxel_for_voxel(client, tmp_path):
    _known, image, session = open_study(client, "study-1", tmp_path)
    assert np.array_equal(image.voxels, chest(0)[0])
    spacing = np.diff(session.open_slices) * 5.0
    assert spacing.max() <= 15
    clot = chest(0)[1]
    painted = min(session.open_slices, key=lambda k: abs(k - CLOT_SLICE))
    session.set_mask(painted, clot[CLOT_SLICE])
    first = next(k for k in session.open_slices)
    session.mark(first, "uncertain")
    draft = session.queue()
    sent = send(client, draft, tmp_path / "out", silent)
    session.acknowledge(draft, sent)
    saved = sent.saved
    assert (saved.tag, saved.accepted) == ("draft", 2)
    assert list(saved.open_slices) == session.open_slices

    for k in list(session.open_slices):
        session.mark(k, "none")
    session.set_label("positive")
    draft = session.queue()
    sent = send(client, draft, tmp_path / "out", silent)
    session.acknowledge(draft, sent)
    saved = sent.saved
    assert saved.tag == "final"
    assert not session.unsent

    known, _image, again = open_study(client, "study-1", tmp_path)
    assert (known.row.label, known.row.label_reader) == ("positive", "Ada")
    with pytest.raises(LabelConflict):
        Client(client.address, reader="Bo").put_study_label("study-1", "negative", None)
    assert (known.row.state, known.tag) == ("complete", "final")
    assert np.array_equal(again.masks[painted], clot[CLOT_SLICE])
    assert again.state(first) == "uncertain"
    voxels, header = nrrd.read(str(client.download_label("study-1", "final", tmp_path, silent)), index_order="C")
    assert voxels.sum() == clot[CLOT_SLICE].sum()
    assert header["Segment0_Name"] == "embolism"


def test_paint_on_a_flipped_file_lands_on_the_same_millimetre(client, tmp_path):
    _known, image, session = open_study(client, "study-2", tmp_path)
    hu, _clot, affine = chest(1)
    assert np.array_equal(image.voxels, hu)
    assert np.allclose(image.affine, affine, atol=1e-4)
    k = session.open_slices[3]
    mask = np.zeros(SHAPE[1:], bool)
    mask[50:55, 30:33] = True
    session.set_mask(k, mask)
    send(client, session.queue(), tmp_path / "out", silent)
    voxels, header = nrrd.read(str(client.download_label("study-2", "draft", tmp_path, silent)), index_order="C")
    slice_row_column = np.argwhere(voxels).mean(0)
    lps = header["space directions"].T @ slice_row_column[::-1] + header["space origin"]
    assert np.allclose(lps, affine[:3, :3] @ (k, 52, 31) + affine[:3, 3], atol=0.01)


def test_another_readers_save_in_between_is_a_conflict_and_both_are_combined(client, address, tmp_path):
    _known, _image, mine = open_study(client, "study-2", tmp_path)
    other = Client(address, reader="Bo")
    theirs = review.ReviewSession(address, other.study("study-2"), _image, "Bo")
    known = other.study("study-2")
    masks = read_masks(other.download_label("study-2", known.tag, tmp_path, silent), known.annotation)
    theirs.adopt(known.annotation, masks, known.revision)
    a, b = mine.open_slices[:2]
    theirs.mark(a, "none")
    send(other, theirs.queue(), tmp_path / "out", silent)
    mine.mark(b, "uncertain")
    with pytest.raises(Conflict) as caught:
        send(client, mine.queue(), tmp_path / "out", silent)
    known = client.study("study-2")
    assert caught.value.revision == known.revision
    assert caught.value.annotation["slices"] == known.annotation["slices"]
    masks = read_masks(client.download_label("study-2", known.tag, tmp_path, silent), known.annotation)
    mine.merge(known.annotation, masks, known.revision)
    send(client, mine.queue(), tmp_path / "out", silent)
    states = {s["slice_index"]: s["state"] for s in client.study("study-2").annotation["slices"]}
    assert (states[a], states[b]) == ("none", "uncertain")


def test_two_readers_get_different_studies_and_are_told_who_reads_one(client, address):
    other = Client(address, reader="Bo")
    client.lease("study-2")
    with pytest.raises(ServerError, match="Ada"):
        other.lease("study-2")
    client.release("study-2")
    other.lease("study-2")
    other.release("study-2")


def test_a_detection_names_its_model_and_lays_its_attention_over_the_ct(client, tmp_path):
    detection, path = client.detect("study-1", tmp_path, silent)
    assert not detection.refused
    assert 0 <= detection.probability <= 1
    assert len(detection.evidence) == 50
    assert detection.model.sha256 == client.connect().model.sha256
    assert any("train" in reason for reason in detection.reasons)
    attention = images.read_image(path)
    assert attention.voxels.dtype == np.uint8
    hu, _clot, affine = chest(0)
    corners = np.array([[0, 0, 0], np.array(attention.voxels.shape) - 1])
    lps = corners @ attention.affine[:3, :3].T + attention.affine[:3, 3]
    index = (lps - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert (index > -1).all()
    assert (index < np.array(hu.shape)).all()
    assert client.study("study-1").detection.probability == pytest.approx(detection.probability)
    row = next(row for row in client.worklist() if row.study == "study-1")
    assert row.probability == pytest.approx(detection.probability)


def test_calling_off_a_detection_is_answered(client, tmp_path, monkeypatch):
    import PulmonaryEmbolismLib.client as module

    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)

    def stop(text, done=0, total=0):
        raise InterruptedError

    with pytest.raises(ServerError, match="cancel") as caught:
        client.detect("study-2", tmp_path, stop)
    assert caught.value.status == 409


def test_what_is_wrong_with_a_save_is_a_sentence_and_not_retried(client, tmp_path):
    label = tmp_path / "x.seg.nrrd"
    label.write_bytes(b"not an image")
    with pytest.raises(ServerError) as caught:
        client.put_annotation("study-1", {"schema": "pe-annotation/1"}, label, None, silent)
    assert caught.value.status == 422
    assert not caught.value.worth_retrying
    with pytest.raises(ServerError) as caught:
        client.study("nobody")
    assert caught.value.status == 404


def test_the_training_can_be_asked_about(client):
    status = client.training()
    assert status["running"] is False
    assert {"encoder", "classifier"} <= set(status)


def test_the_stock_client_of_monai_label_works_too(address, tmp_path):
    client_module = pytest.importorskip("monailabel.client")
    client = client_module.MONAILabelClient(address, tmpdir=str(tmp_path))
    info = client.info()
    assert "candidates" in info["models"]
    sample = client.next_sample("random", {})
    assert sample["id"] in ("study-1", "study-2")
    file, _params = client.infer("candidates", sample["id"], {})
    labels = nib.load(file) if file.endswith(".nii.gz") else nrrd.read(file)[0]
    assert tuple(labels.shape) in (SHAPE, SHAPE[::-1])
    whole = tmp_path / "label.nrrd"
    nrrd.write(str(whole), np.zeros(SHAPE[::-1], np.uint8), nrrd.read_header(file))
    reply = client.save_label(sample["id"], str(whole), tag="stock", params={"label_info": [{"name": "x", "idx": 1}]})
    assert json.loads(reply) if isinstance(reply, (str, bytes)) else reply is not None
