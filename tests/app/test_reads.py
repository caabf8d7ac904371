"""What each reader stated, out of the history of a folder, and the command that compares readers."""

import numpy as np
from typer.testing import CliRunner

from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import write_volume
from pe_monailabel import compat  # noqa: F401 - before monailabel

# isort: split
from pe_monailabel.cli import app as command_line
from pe_monailabel.store.reads import reads_of
from pe_monailabel.store.studies import StudyStore


def folder_with_labels(folder, labels):
    folder.mkdir()
    for study in ("one", "two"):
        write_volume(Volume(np.zeros((8, 16, 16), np.int16), axial_affine((2.5, 0.7, 0.7))), folder / f"{study}.nrrd")
    store = StudyStore(folder)
    for study, reader, label in labels:
        store.update_image_info(study, {"pe_label": label, "reader": reader})
    return folder


def test_a_readers_last_label_counts_and_one_taken_back_does_not(tmp_path):
    labels = [
        ("one", "ann", "negative"),
        ("one", "ann", "positive"),
        ("one", "bo", "negative"),
        ("two", "bo", "positive"),
    ]
    store = StudyStore(folder_with_labels(tmp_path / "studies", [*labels, ("two", "bo", "")]))
    found = {(read.study, read.reader): read.label for read in reads_of(store)}
    assert found == {("one", "ann"): "positive", ("one", "bo"): "negative"}


def test_readers_with_a_folder_each_are_compared_as_a_table_and_a_page(tmp_path):
    ann = folder_with_labels(tmp_path / "ann", [("one", "ann", "negative"), ("two", "ann", "positive")])
    bo = folder_with_labels(tmp_path / "bo", [("one", "bo", "negative"), ("two", "bo", "negative")])
    page = tmp_path / "agreement.html"
    answer = CliRunner().invoke(command_line, ["labels", "agreement", str(ann), str(bo), "--out", str(page)])
    assert answer.exit_code == 0, answer.output
    line = next(line for line in answer.output.splitlines() if line.startswith("ann and bo"))
    assert line.split()[3:7] == ["2", "0", "0.50", "0.00"]
    assert "ann and bo" in page.read_text()
