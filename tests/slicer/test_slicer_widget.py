"""The panel, clicked and typed at like a reader does, over a stand-in for Slicer's Qt and a server on a real socket.

No test is decided by a timing. That no request was made on the main thread is asserted of every test; its longest
stall in each test goes to the file that PE_STALLS names, screenshots to the folder that PE_SCREENSHOTS names.
"""

import gc
import io
import json
import os
import threading
import time
import types
from pathlib import Path

import nrrd
import numpy as np
import pytest
import slicer_paths  # noqa: F401
from fake_server import FakeServer
from phantoms import CLOT_SLICE, SHAPE, add_chest, chest, nrrd_bytes

pytest.importorskip("slicer_core", reason="slicer-core is not installed")
pytest.importorskip("PySide6", reason="PySide6 is not installed")

import application
import requests
from PySide6 import QtCore, QtGui, QtWidgets
from PySide6.QtTest import QTest

Key, Modifier = QtCore.Qt.Key, QtCore.Qt.KeyboardModifier
STALLS = {}


class Desk:
    """A reader at the panel: what a test sees and does."""

    def __init__(self, tmp_path, monkeypatch):
        self.app = application.instance()
        self.app.messages.clear()
        qt = self.app.qt
        settings = tmp_path / "settings.ini"
        places = types.SimpleNamespace(
            writableLocation=lambda kind: str(tmp_path / kind), AppDataLocation="data", CacheLocation="cache"
        )
        monkeypatch.setattr(qt, "QStandardPaths", places)
        monkeypatch.setattr(qt, "QSettings", lambda: QtCore.QSettings(str(settings), QtCore.QSettings.Format.IniFormat))
        self.server = FakeServer()
        self.folder = tmp_path
        self.questions, self.answers = [], []
        self.sit_down()

    def sit_down(self):
        self.widget = self.app.load()
        self.panel, self.ui = self.widget.panel, self.widget.panel.ui
        self.ui.readerEdit.text = "Ada"
        self.panel.ask = self._answer

    def crash(self):
        """Slicer is gone at once: nothing is saved on the way out."""
        self.wait(lambda: not self.panel.runner.jobs("autosave"))
        panel = self.panel
        panel.timer.stop()
        panel.session = None
        self.app.unload(self.widget)

    def _answer(self, text, choices):
        self.questions.append(text)
        return self.answers.pop(0) if self.answers else choices[0]

    def wait(self, ready, seconds=15.0):
        self.app.wait(ready, seconds)

    def idle(self):
        self.wait(lambda: not self.panel.runner.jobs())

    def connect(self):
        self.ui.addressBox.setCurrentText(self.server.address)
        self.ui.connectButton.click()
        self.wait(lambda: self.panel.worklist.rows)

    def open(self, study):
        self.panel.study.open(study)
        self.wait(lambda: self.panel.session is not None and self.panel.session.study == study)

    def key(self, key, modifier=Modifier.NoModifier):
        """Press a key, and look at what it brought."""
        if self.panel.nodes is not None and self.panel._shortcuts:
            self.look()
        QTest.keyClick(self.app.window, key, modifier)
        self.app.settle(5)

    def stroke(self, masks, erase=False):
        """One stroke of the brush, as Slicer's editing logic makes it; ``masks`` by slice."""
        volume = np.zeros(self.panel.session.shape, bool)
        for k, mask in masks.items():
            volume[k] = mask
        self.ui.editor.stroke(volume, erase)

    def paint(self, k, mask, erase=False):
        """Go to a slice, paint there, and rest."""
        self.panel.annotate.jump(k)
        self.stroke({k: mask}, erase)
        self.rest()

    def rest(self):
        self.wait(lambda: self.panel.annotate.painted_at is None)

    def look(self):
        """Until the axial view has drawn the slice that it is on."""
        self.wait(self.panel.views.seen)

    def same(self):
        """Whether session and scene hold the same."""
        session, nodes = self.panel.session, self.panel.nodes
        known = json.loads(nodes.review_text())
        states = {m["slice_index"]: m for m in known["marks"]}
        assert session.differing(nodes.masks()) == []
        assert {k for k, m in states.items() if m["state"] == "embolism" and "not_outlined" not in m} == set(
            nodes.masks()
        )
        assert all(session.state(k) in (m["state"], "not_outlined") for k, m in states.items())
        assert [d["decision"] for d in known["decisions"]] == [d.decision for d in session.snapshot().decisions]
        return True

    @property
    def slice(self):
        return self.panel.annotate.current()

    def shot(self, name, height=1060):
        folder = os.environ.get("PE_SCREENSHOTS")
        if folder:
            self.app.window.resize(470, height)
            self.app.settle(60)
            self.app.window.grab().save(str(Path(folder) / f"panel-{name}.png"))
            if self.panel.nodes is not None:
                self.app.headless.view().render(Path(folder) / f"slice-{name}.png")


@pytest.fixture
def desk(tmp_path, monkeypatch, request):
    on_main, original = [], requests.request

    def watched(*arguments, **named):
        if threading.current_thread() is threading.main_thread():
            on_main.append(arguments[:2])
        return original(*arguments, **named)

    monkeypatch.setattr(requests, "request", watched)
    desk = Desk(tmp_path, monkeypatch)
    add_chest(desk.server, "study-1", tmp_path)
    add_chest(desk.server, "study-2", tmp_path, seed=1)
    desk.beats = beats = []
    heart = QtCore.QTimer()
    heart.setInterval(2)
    heart.timeout.connect(lambda: beats.append(time.perf_counter()))
    gc.disable()  # a full pass over the test process takes longer than anything that the panel does
    heart.start()
    yield desk
    heart.stop()
    gc.enable()
    desk.app.unload(desk.widget)
    desk.server.close()
    said, desk.app.off_main[:] = list(desk.app.off_main), []
    STALLS[request.node.name] = 1000 * max(np.diff(beats), default=0)
    assert not on_main, "a request was made on the main thread"
    assert not said, "a text was translated off the main thread"


@pytest.fixture(scope="module", autouse=True)
def stalls():
    yield
    worst = sorted(STALLS.items(), key=lambda item: -item[1])
    text = "\n".join(f"{value:7.1f} ms  {name}" for name, value in worst)
    if os.environ.get("PE_STALLS"):
        Path(os.environ["PE_STALLS"]).write_text(text + "\n")


def clot():
    return chest(0)[1][CLOT_SLICE]


# --- connect


def test_nothing_works_before_the_server_answers_and_then_the_panel_is_ready(desk):
    ui = desk.ui
    assert not any(s.enabled for s in (ui.worklistSection, ui.studySection, ui.annotateSection, ui.detectSection))
    assert ui.researchLabel.visible
    assert "not for diagnosis" in ui.researchLabel.text
    desk.connect()
    assert ui.worklistSection.enabled
    assert "starter 1.0 (2026-11-02)" in ui.serverLabel.text
    assert not ui.annotateSection.enabled
    desk.shot("connected", 400)


def test_a_wrong_token_is_a_sentence_and_the_right_one_is_remembered(desk):
    desk.server.token = "secret"
    desk.ui.addressBox.setCurrentText(desk.server.address)
    desk.ui.connectButton.click()
    desk.wait(lambda: "asks for a token" in desk.ui.serverLabel.text)
    desk.shot("token", 400)
    desk.ui.tokenEdit.text = "secret"
    desk.connect()
    desk.idle()
    desk.app.unload(desk.widget)
    desk.sit_down()
    assert desk.ui.addressBox.currentText == desk.server.address
    assert desk.ui.tokenEdit.text == "secret"


def test_a_slow_server_is_waited_for_with_words_and_can_be_cancelled(desk):
    desk.server.slow_seconds = 3
    desk.ui.addressBox.setCurrentText(desk.server.address)
    desk.ui.connectButton.click()
    desk.wait(lambda: desk.ui.activityLabel.text.startswith("Connecting"))
    assert desk.ui.cancelButton.visible
    desk.ui.cancelButton.click()
    desk.server.slow_seconds = 0
    assert desk.ui.serverLabel.text == "Cancelled."


def test_an_answer_of_the_former_server_is_dropped_when_another_is_connected(desk, tmp_path):
    other = FakeServer()
    add_chest(other, "study-3", tmp_path)
    desk.connect()
    desk.server.slow_seconds = 1.0
    desk.panel.study.open("study-1")
    desk.app.settle(100)
    desk.ui.addressBox.setCurrentText(other.address)
    desk.ui.connectButton.click()
    desk.wait(lambda: [row.study for row in desk.panel.worklist.rows] == ["study-3"])
    desk.app.settle(1500)
    other.close()
    assert desk.panel.session is None
    assert desk.panel.server.address == other.address


def test_connecting_again_under_another_name_signs_what_follows_with_it(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.ui.readerEdit.text = "Bo"
    desk.ui.connectButton.click()
    desk.wait(lambda: desk.panel.client.reader == "Bo")
    desk.key(Key.Key_E)
    assert [mark.reader for mark in desk.panel.session.snapshot().marks] == ["Ada", "Bo"]


# --- worklist


def test_the_worklist_is_filtered_sorted_and_says_who_reads_a_study(desk):
    desk.server.studies["study-2"]["row"].update(held_by="Bo", probability=0.8, label="positive")
    desk.connect()
    cells = lambda column: [texts[column] for texts in desk.panel.worklist.table.texts()]  # noqa: E731
    desk.panel.worklist.table.sort(3)
    assert cells(0) == ["study-2", "study-1"]
    assert cells(4)[0] == "read by Bo"
    desk.ui.filterEdit.text = "positive"
    assert cells(0) == ["study-2"]
    desk.ui.filterEdit.text = ""
    desk.ui.stateBox.setCurrentIndex(3)
    assert cells(0) == []


def test_the_worklist_says_why_a_study_was_not_analysed_and_that_a_demo_models_number_is_not_clinical(desk):
    desk.server.studies["study-1"]["row"].update(usable=False, reason="no contrast: 43 HU")
    desk.server.studies["study-2"]["row"].update(probability=0.97, model="starter 1", reasons=["demo_model"])
    desk.connect()
    desk.panel.worklist.table.sort(3)
    cells = [[texts[column] for column in (0, 3, 4)] for texts in desk.panel.worklist.table.texts()]
    assert cells[0] == ["study-2", "0.97", "not a clinical result: model starter 1 has seen no real embolism"]
    assert cells[1] == ["study-1", "", "no contrast: 43 HU"]


def test_a_candidate_says_where_it_is_and_an_older_server_may_be_silent(desk):
    first = desk.server.studies["study-1"]["detects"]["candidates"][0]
    first.update(side="left", level="central", size_mm=48.0)
    desk.connect()
    desk.open("study-1")
    detect(desk)
    table = desk.ui.candidatesTable
    assert [table.item(row, 3).text() for row in range(2)] == ["left, central, 48 mm", ""]


def test_a_study_that_another_reader_holds_is_opened_only_when_the_reader_insists(desk):
    desk.server.studies["study-2"]["row"]["held_by"] = "Bo"
    desk.connect()
    desk.answers = ["Cancel"]
    desk.panel.study.open("study-2")
    desk.wait(lambda: desk.questions)
    desk.idle()
    assert desk.panel.session is None
    assert "read by Bo" in desk.questions[0]
    desk.open("study-2")


def test_next_study_is_the_one_that_the_server_wants(desk):
    desk.connect()
    desk.ui.nextButton.click()
    desk.wait(lambda: desk.panel.session is not None)
    assert desk.panel.session.study == "study-1"
    assert desk.server.studies["study-1"]["row"]["held_by"] == "Ada"
    desk.server.studies["study-1"]["row"]["held_by"] = "Bo"
    desk.ui.followingButton.click()
    desk.wait(lambda: desk.panel.session is not None and desk.panel.session.study == "study-2")


def test_next_study_does_not_load_again_the_study_that_is_open(desk):
    desk.connect()
    desk.open("study-1")
    desk.ui.followingButton.click()
    desk.wait(lambda: "nothing else comes before it" in desk.ui.savedLabel.text)
    assert desk.server.requests.count(("GET", "/pe/studies/study-1")) == 1


def test_an_answer_for_a_study_no_longer_wanted_is_dropped(desk):
    desk.connect()
    desk.server.slow_seconds = 0.15
    desk.panel.study.open("study-1")
    desk.app.settle(250)
    desk.panel.study.open("study-2")
    desk.wait(lambda: desk.panel.session is not None)
    desk.app.settle(700)
    assert desk.panel.session.study == "study-2"


# --- annotate


def test_opening_shows_the_schedule_and_the_first_open_slice(desk):
    desk.connect()
    desk.open("study-1")
    assert desk.ui.scheduleTable.rowCount == len(desk.server.studies["study-1"]["schedule"])
    assert desk.slice == 4
    assert desk.ui.sliceLabel.text == f"Slice 5 of {SHAPE[0]}, z -277.5 mm: not reviewed"
    assert desk.panel.nodes.volume.GetDisplayNode().GetWindow() == 700
    desk.ui.lungWindowButton.click()
    assert desk.panel.nodes.volume.GetDisplayNode().GetLevel() == -600


def test_the_keys_review_slice_after_slice(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    assert desk.slice == 8
    desk.key(Key.Key_U)
    desk.key(Key.Key_P)
    assert desk.slice == 8
    desk.key(Key.Key_N)
    assert desk.slice == 12
    desk.key(Key.Key_H)
    assert [desk.panel.session.state(k) for k in (4, 8, 12)] == ["none", "uncertain", "not_outlined"]
    desk.ui.undoButton.click()
    desk.ui.undoButton.click()
    assert [desk.panel.session.state(k) for k in (4, 8, 12)] == ["none", "", ""]
    assert desk.slice == 8


def test_keys_are_letters_while_somebody_types_and_nothing_after_the_module_is_left(desk):
    desk.connect()
    desk.open("study-1")
    desk.ui.worklistSection.collapsed = False
    desk.ui.filterEdit.setFocus()
    desk.app.settle(20)
    QTest.keyClicks(desk.ui.filterEdit, "EU")
    assert desk.ui.filterEdit.text == "EU"
    assert desk.panel.session.progress[0] == 0
    desk.ui.filterEdit.clearFocus()
    desk.widget.exit()
    desk.key(Key.Key_E)
    assert desk.panel.session.progress[0] == 0
    desk.widget.enter()
    desk.key(Key.Key_E)
    assert desk.panel.session.progress[0] == 1


def test_a_painted_slice_is_embolism_by_itself_and_paint_off_the_list_adds_the_slice_and_says_so(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    assert desk.panel.session.state(CLOT_SLICE) == "embolism"
    desk.panel.annotate.jump(CLOT_SLICE + 1)
    assert "not on the list" in desk.ui.sliceLabel.text
    desk.paint(CLOT_SLICE + 1, clot())
    assert desk.panel.session.state(CLOT_SLICE + 1) == "embolism"
    assert "was added, because you painted there" in desk.app.messages[-1]
    assert desk.same()


def test_a_key_off_the_list_marks_nothing_and_shows_the_listed_slice(desk):
    desk.connect()
    desk.open("study-1")
    desk.panel.annotate.jump(CLOT_SLICE + 1)
    desk.key(Key.Key_E)
    assert desk.panel.session.state(CLOT_SLICE + 1) == ""
    assert "nothing was marked" in desk.app.messages[-1]
    assert desk.slice == CLOT_SLICE
    assert desk.panel.session.progress[0] == 0
    desk.panel.annotate.jump(CLOT_SLICE + 1)
    desk.ui.addButton.click()
    desk.key(Key.Key_E)
    assert desk.panel.session.state(CLOT_SLICE + 1) == "none"


def test_a_slice_that_was_not_drawn_is_not_marked(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.look()
    desk.app.manager.views["Red"].frozen = True
    desk.panel.annotate.jump(12)
    QTest.keyClick(desk.app.window, Key.Key_E)
    desk.app.manager.views["Red"].frozen = False
    assert desk.panel.session.state(12) == ""
    assert "was not on the screen yet" in desk.app.messages[-1]
    desk.key(Key.Key_E)
    assert desk.panel.session.state(12) == "none"


def test_a_key_that_is_held_down_marks_one_slice(desk):
    desk.connect()
    desk.open("study-1")
    desk.look()
    for repeated in (False, True, True, True):
        event = QtGui.QKeyEvent(QtCore.QEvent.Type.KeyPress, Key.Key_E, Modifier.NoModifier, "e", repeated)
        QtWidgets.QApplication.sendEvent(desk.app.window, event)
        desk.look()
    shortcuts = {s.key.toString(): s.autoRepeat for s in desk.panel._shortcuts}
    assert not any(shortcuts.values())
    assert {"E", "H", "U", "J", "K", "L"} <= set(shortcuts)


def test_no_embolism_on_a_painted_slice_is_asked_about_first(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    desk.answers = ["Keep the paint"]
    desk.key(Key.Key_E)
    assert desk.panel.session.state(CLOT_SLICE) == "embolism"
    desk.key(Key.Key_E)
    assert desk.panel.session.state(CLOT_SLICE) == "none"
    assert desk.panel.nodes.masks() == {}
    desk.ui.undoButton.click()
    assert np.array_equal(desk.panel.nodes.masks()[CLOT_SLICE], clot())


def test_fill_between_slices_stays_a_proposal_until_it_is_taken(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE - 2, clot())
    desk.paint(CLOT_SLICE, clot())
    desk.ui.fillButton.click()
    desk.wait(lambda: desk.panel.nodes.proposal())
    assert list(desk.panel.nodes.proposal()) == [CLOT_SLICE - 1]
    assert CLOT_SLICE - 1 not in desk.panel.session.masks
    desk.panel.annotate.jump(CLOT_SLICE - 1)
    desk.ui.takeButton.click()
    assert desk.panel.session.state(CLOT_SLICE - 1) == "embolism"
    assert desk.panel.nodes.proposal() == {}


def test_the_segment_editors_keys_work_while_the_module_is_shown(desk):
    assert desk.ui.editor.keys
    desk.widget.exit()
    assert not desk.ui.editor.keys
    desk.widget.enter()
    assert desk.ui.editor.keys


def test_a_click_on_the_strip_goes_there(desk):
    desk.connect()
    desk.open("study-1")
    strip = desk.panel.annotate.strip
    QTest.mouseClick(strip, QtCore.Qt.MouseButton.LeftButton, pos=QtCore.QPoint(strip.place(20), 20))
    assert desk.slice == 20


# --- undo: scene and session hold the same


def test_slicers_own_undo_takes_back_a_stroke_and_its_mark_before_the_study_is_submitted(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    desk.key(Key.Key_Z)
    desk.rest()
    assert desk.panel.session.state(CLOT_SLICE) == ""
    assert desk.same()
    desk.key(Key.Key_Y)
    desk.rest()
    assert np.array_equal(desk.panel.session.masks[CLOT_SLICE], clot())
    assert desk.same()
    desk.key(Key.Key_Z)
    desk.ui.submitButton.click()
    desk.idle()
    annotation = desk.server.studies["study-1"]["annotation"]
    assert annotation is None or annotation["slices"] == []


def test_undo_after_an_accepted_candidate_takes_back_that_alone_and_the_next_stroke_keeps_the_rest(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    desk.paint(8, clot())
    desk.ui.candidatesTable.setCurrentCell(0, 0)
    desk.ui.acceptButton.click()
    assert sorted(desk.panel.session.masks) == [8, CLOT_SLICE]
    desk.key(Key.Key_Z)
    desk.rest()
    assert sorted(desk.panel.session.masks) == [8]
    assert [d.decision for d in desk.panel.session.snapshot().decisions] == []
    assert desk.same()
    desk.paint(12, clot())
    assert sorted(desk.panel.session.masks) == [8, 12]
    assert desk.same()


def test_one_undo_goes_back_through_keys_strokes_and_decisions_in_their_order(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    desk.panel.annotate.jump(4)
    desk.key(Key.Key_E)
    desk.paint(CLOT_SLICE, clot())
    desk.ui.candidatesTable.setCurrentCell(1, 0)
    desk.ui.rejectButton.click()
    desk.panel.annotate.jump(8)
    desk.key(Key.Key_H)
    session, seen = desk.panel.session, []
    for _ in range(4):
        desk.ui.undoButton.click()
        assert desk.same()
        decided = [d.decision for d in session.snapshot().decisions]
        seen.append(([session.state(k) for k in (4, 8, CLOT_SLICE)], decided))
    assert seen == [
        (["none", "", "embolism"], ["rejected"]),
        (["none", "", "embolism"], []),
        (["none", "", ""], []),
        (["", "", ""], []),
    ]


def test_paint_and_erasing_off_the_slice_are_put_back(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE - 4, clot())
    desk.panel.annotate.jump(CLOT_SLICE)
    desk.stroke({k: clot() for k in range(CLOT_SLICE - 2, CLOT_SLICE + 3)})
    desk.rest()
    assert sorted(desk.panel.nodes.masks()) == [CLOT_SLICE - 4, CLOT_SLICE]
    assert "4 other slices was put back" in desk.app.messages[-1]
    desk.stroke({CLOT_SLICE - 4: clot()}, erase=True)
    desk.rest()
    assert sorted(desk.panel.nodes.masks()) == [CLOT_SLICE - 4, CLOT_SLICE]
    assert desk.same()


def test_paint_goes_with_the_slice_it_was_made_on_though_the_reader_scrolled_at_once(desk):
    desk.connect()
    desk.open("study-1")
    desk.panel.annotate.jump(CLOT_SLICE)
    desk.stroke({CLOT_SLICE: clot()})
    desk.panel.annotate.jump(CLOT_SLICE + 3)
    assert list(desk.panel.session.masks) == [CLOT_SLICE]
    assert desk.same()


def test_the_clot_range_trims_a_stroke_and_slicers_own_key_for_it_switches_ours(desk):
    desk.connect()
    desk.open("study-1")
    hu = chest(0)[0][CLOT_SLICE]
    wide = np.zeros(SHAPE[1:], bool)
    wide[40:75, 50:100] = True
    desk.key(Key.Key_I)
    assert desk.ui.clotButton.checked
    assert not desk.panel.editor_node.GetSourceVolumeIntensityMask()
    desk.paint(CLOT_SLICE, wide)
    assert np.array_equal(desk.panel.nodes.masks()[CLOT_SLICE], wide & (hu >= 0) & (hu <= 100))
    desk.key(Key.Key_I)
    assert not desk.ui.clotButton.checked
    desk.paint(CLOT_SLICE, wide)
    assert np.array_equal(desk.panel.nodes.masks()[CLOT_SLICE], wide)


# --- a view made for emboli


def test_the_brush_is_in_the_hand_on_opening_with_a_size_in_millimetres(desk):
    assert desk.ui.editor.activeEffect() is None
    desk.connect()
    desk.open("study-1")
    brush = desk.ui.editor.activeEffect()
    assert brush.name == "Paint"
    assert (brush.parameters["BrushAbsoluteDiameter"], brush.parameters["BrushSphere"]) == (6.0, 0)


def test_a_key_goes_from_candidate_to_candidate_in_three_linked_views(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    desk.key(Key.Key_C)
    assert desk.slice == CLOT_SLICE
    centre = desk.panel.detecting.detection.candidates[0].centre_lps_mm
    for name in ("Green", "Yellow"):
        to_ras = desk.app.headless.view(name).node.GetSliceToRAS()
        assert [to_ras.GetElement(row, 3) for row in (0, 1)] == pytest.approx([-centre[0], -centre[1]])
    desk.key(Key.Key_C)
    assert desk.slice == 12
    desk.key(Key.Key_C, Modifier.ShiftModifier)
    assert desk.slice == CLOT_SLICE
    assert desk.app.manager.layout == 5163


def test_a_slab_is_for_looking_and_the_brush_comes_back_with_thin_slices(desk):
    desk.connect()
    desk.open("study-1")
    node = desk.app.headless.view().node
    desk.key(Key.Key_M)
    assert (node.GetSlabReconstructionEnabled(), node.GetSlabReconstructionThickness()) == (True, 10.0)
    assert node.GetSlabReconstructionTypeAsString(node.GetSlabReconstructionType()) == "Max"
    assert desk.ui.editor.activeEffect() is None
    desk.key(Key.Key_M)
    assert node.GetSlabReconstructionTypeAsString(node.GetSlabReconstructionType()) == "Mean"
    desk.key(Key.Key_M)
    assert not node.GetSlabReconstructionEnabled()
    assert desk.ui.editor.activeEffect().name == "Paint"


def test_the_windows_have_keys(desk):
    desk.connect()
    desk.open("study-1")
    display = desk.panel.nodes.volume.GetDisplayNode()
    for key, window in ((Key.Key_L, (1500, -600)), (Key.Key_M, (400, 40)), (Key.Key_P, (700, 100))):
        desk.key(key, Modifier.ShiftModifier)
        assert (display.GetWindow(), display.GetLevel()) == window


def at_the_clot(desk):
    """RAS of a voxel in the clot of its slice."""
    row, column = np.argwhere(clot()).mean(0).round()
    lps = chest(0)[2] @ (CLOT_SLICE, row, column, 1)
    return -lps[0], -lps[1], lps[2]


def test_a_region_grows_under_the_pointer_and_undo_takes_it_back(desk):
    import slicer

    desk.connect()
    desk.open("study-1")
    desk.panel.annotate.jump(CLOT_SLICE)
    desk.key(Key.Key_S)
    assert desk.panel.session.masks == {}
    crosshair = slicer.mrmlScene.GetSingletonNode("default", "vtkMRMLCrosshairNode")
    crosshair.SetCursorPositionRAS(at_the_clot(desk))
    desk.key(Key.Key_S)
    crosshair.SetCursorPositionInvalid()
    grown, hu = desk.panel.session.masks[CLOT_SLICE], chest(0)[0][CLOT_SLICE]
    assert grown[clot()].mean() > 0.5
    assert hu[grown].min() >= 0
    assert hu[grown].max() <= 100
    desk.ui.undoButton.click()
    assert desk.panel.session.masks == {}
    assert desk.same()


def test_a_click_grows_a_region_while_its_button_is_down(desk):
    desk.connect()
    desk.open("study-1")
    desk.panel.annotate.jump(CLOT_SLICE)
    desk.ui.growButton.click()
    assert desk.ui.editor.activeEffect() is None
    view = desk.app.headless.view()
    from_ras = view.node.GetXYToRAS().__class__()
    from_ras.DeepCopy(view.node.GetXYToRAS())
    from_ras.Invert()
    x, y = from_ras.MultiplyPoint((*at_the_clot(desk), 1.0))[:2]
    view.interactor.SetEventPosition(round(x), round(y))
    view.interactor.InvokeEvent("LeftButtonPressEvent")
    assert desk.panel.session.state(CLOT_SLICE) == "embolism"
    desk.ui.growButton.click()
    assert desk.ui.editor.activeEffect().name == "Paint"


# --- what goes wrong is shown


def test_an_exception_in_a_callback_is_shown_and_the_controls_work_again(desk, monkeypatch):
    desk.connect()
    desk.open("study-1")
    assert not desk.ui.errorLabel.visible
    monkeypatch.setattr(desk.panel.session, "step", lambda k, direction: 1 / 0)
    desk.key(Key.Key_N)
    assert desk.ui.errorLabel.visible
    assert "division by zero" in desk.ui.errorLabel.text
    monkeypatch.undo()
    desk.key(Key.Key_N)
    assert desk.slice == 8
    assert desk.ui.noneButton.enabled
    desk.ui.refreshButton.click()
    desk.wait(lambda: not desk.ui.errorLabel.visible)


def test_an_exception_in_what_follows_a_job_is_shown_and_other_answers_arrive(desk, monkeypatch):
    desk.connect()
    desk.open("study-1")
    monkeypatch.setattr(desk.panel.detecting, "show", lambda *shown: 1 / 0)
    desk.ui.detectButton.click()
    desk.wait(lambda: desk.ui.errorLabel.visible)
    desk.idle()
    monkeypatch.undo()
    assert desk.ui.detectButton.enabled


def test_an_error_goes_away_when_the_server_answers_again(desk):
    desk.connect()
    desk.server.down = True
    desk.ui.refreshButton.click()
    desk.wait(lambda: desk.ui.errorLabel.visible)
    desk.server.down = False
    desk.ui.refreshButton.click()
    desk.wait(lambda: not desk.ui.errorLabel.visible)


def test_a_study_that_is_left_out_opens_with_the_reason(desk):
    desk.server.studies["study-1"]["row"].update(usable=False, reason="no contrast: 43 HU")
    desk.connect()
    desk.open("study-1")
    assert "no contrast: 43 HU" in desk.ui.savedLabel.text


def test_arrow_keys_in_the_lists_go_there(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    desk.ui.scheduleTable.setFocus()
    QTest.keyClick(desk.ui.scheduleTable, Key.Key_Down)
    assert desk.slice == 8
    desk.ui.candidatesTable.setFocus()
    desk.ui.candidatesTable.setCurrentCell(0, 0)
    QTest.keyClick(desk.ui.candidatesTable, Key.Key_Down)
    assert desk.slice == 12


def test_two_phantoms_are_registered_in_sample_data(desk, monkeypatch):
    import sys

    registered = []
    logic = types.SimpleNamespace(registerCustomSampleDataSource=lambda **source: registered.append(source))
    monkeypatch.setitem(sys.modules, "SampleData", types.SimpleNamespace(SampleDataLogic=logic))
    desk.app.at_startup[-1]()
    assert [source["sampleName"] for source in registered] == ["PulmonaryEmbolismPhantom1", "PulmonaryEmbolismPhantom2"]
    assert all(Path(source["thumbnailFileName"]).is_file() for source in registered)
    assert all(source["uris"].startswith("https://github.com/") for source in registered)


def test_reload_drops_the_library(desk):
    import sys

    kept = {name: module for name, module in sys.modules.items() if name.startswith("PulmonaryEmbolismLib")}
    desk.widget.onReload()
    left = [name for name in sys.modules if name.startswith("PulmonaryEmbolismLib")]
    sys.modules.update(kept)
    assert kept
    assert left == []
    assert desk.widget.reloaded


def test_sections_wider_than_the_panel_can_be_scrolled_to(desk):
    desk.connect()
    desk.open("study-1")
    desk.app.window.resize(260, 700)
    desk.app.settle(30)
    bar = desk.ui.scrollArea.horizontalScrollBar()
    missing = desk.ui.sections.minimumSizeHint().width() - desk.ui.scrollArea.viewport().width
    reach = bar.maximum
    desk.app.window.resize(470, 900)
    assert reach >= missing > 0


def test_two_thousand_studies_are_sorted_filtered_and_refreshed_by_touching_what_changed(desk):
    from PulmonaryEmbolismLib.answers import Row

    rows = [Row(f"study-{n:04d}", probability=None if n % 3 else n / 2000, model="1") for n in range(2000)]
    desk.connect()
    desk.idle()
    desk.panel.due["refresh"] = time.monotonic() + 600
    worklist, table = desk.panel.worklist, desk.panel.worklist.table
    worklist._refreshed(rows, desk.panel.server)
    assert len(table.texts()) == 2000
    written = table.written
    table.sort(3)
    assert [texts[3] for texts in (table.texts()[0], table.texts()[-1])] == ["1.00", ""]
    table.sort(3)
    assert [texts[3] for texts in (table.texts()[0], table.texts()[-1])] == ["0.00", ""]
    desk.ui.filterEdit.text = "study-19"
    assert len(table.texts()) == 100
    assert table.written == written
    rows[1900] = Row("study-1900", "in_progress", 3, 31)
    worklist._refreshed(rows, desk.panel.server)
    assert 0 < table.written - written <= 12
    assert ["study-1900", "3/31"] in [texts[:2] for texts in table.texts()]
    header = desk.ui.worklistTable.horizontalHeader()
    modes = {header.sectionResizeMode(column) for column in range(5)}
    assert QtWidgets.QHeaderView.ResizeMode.ResizeToContents not in modes


# --- study labels


def read_labels(desk):
    desk.ui.workBox.setCurrentIndex(1)
    desk.ui.nextButton.click()
    desk.wait(lambda: desk.panel.session is not None)
    desk.idle()


def test_one_key_labels_a_study_and_the_next_one_is_there_already(desk):
    add_chest(desk.server, "study-3", desk.folder, seed=2)
    desk.connect()
    read_labels(desk)
    assert desk.panel.session.study == "study-1"
    assert desk.ui.annotateSection.collapsed
    assert desk.server.studies["study-2"]["row"]["held_by"] == "Ada"
    fetched = desk.server.requests.count(("GET", "/datastore/image"))
    assert fetched == 2
    desk.key(Key.Key_J)
    desk.wait(lambda: desk.panel.session.study == "study-2")
    desk.idle()
    row = desk.server.row("study-1")
    assert (row["label"], row["state"], row["held_by"]) == ("negative", "labelled", None)
    desk.key(Key.Key_L)
    desk.wait(lambda: desk.panel.session.study == "study-3")
    desk.idle()
    desk.key(Key.Key_K)
    desk.wait(lambda: any("no further study" in text for text in desk.app.messages))
    desk.idle()
    assert [desk.server.row(f"study-{n}")["label"] for n in (1, 2, 3)] == ["negative", "uncertain", "positive"]
    assert desk.server.requests.count(("GET", "/datastore/image")) == 3


def test_a_label_is_changed_after_going_back_and_taken_back_with_its_button(desk):
    desk.connect()
    read_labels(desk)
    desk.key(Key.Key_J)
    desk.wait(lambda: desk.panel.session.study == "study-2")
    desk.idle()
    desk.key(Key.Key_B, Modifier.ShiftModifier)
    desk.wait(lambda: desk.panel.session.study == "study-1")
    assert desk.ui.negativeButton.checked
    desk.ui.negativeButton.click()
    desk.idle()
    assert (desk.server.row("study-1")["label"], desk.server.row("study-1")["state"]) == ("", "not_started")
    assert desk.panel.session.study == "study-1"
    assert desk.questions == []


def test_what_was_fetched_ahead_is_let_go_when_the_reader_turns_to_slices(desk):
    desk.connect()
    read_labels(desk)
    desk.ui.workBox.setCurrentIndex(0)
    desk.wait(lambda: desk.server.studies["study-2"]["row"]["held_by"] is None)
    assert not desk.ui.annotateSection.collapsed


def test_a_label_that_another_reader_gave_meanwhile_is_asked_about_and_panel_and_server_agree(desk):
    desk.connect()
    for answer, label in (("Take theirs", "negative"), ("Keep mine", "positive")):
        study = {"negative": "study-1", "positive": "study-2"}[label]
        desk.open(study)
        row = desk.server.studies[study]["row"]
        row.update(label="negative", label_reader="Bo", label_revision="bo1")
        desk.answers = [answer]
        desk.key(Key.Key_K)
        desk.idle()
        assert "Bo labelled this study negative meanwhile; your label is positive." in desk.questions[-1]
        assert desk.panel.session.label == desk.server.row(study)["label"] == label
        assert not desk.panel.session.unsent
        assert desk.ui.positiveButton.checked is (label == "positive")


def test_on_a_blinded_server_the_result_is_shown_once_the_label_is_given(desk):
    known = desk.server.studies["study-1"]
    known["detection"] = {**known["detects"], "model": desk.server.model}
    desk.server.blinded = True
    desk.connect()
    assert "Blinded" in desk.ui.serverLabel.text
    desk.open("study-1")
    assert desk.ui.probabilityLabel.text == ""
    desk.key(Key.Key_K)
    desk.wait(lambda: "P(PE) 0.91" in desk.ui.probabilityLabel.text)


# --- what a day costs


def presses(desk):
    """Counts key presses from now on."""
    count = []
    original = desk.key
    desk.key = lambda *pressed: (count.append(pressed), original(*pressed))
    return count


def test_a_negative_study_of_31_slices_takes_a_key_for_each_slice_and_two_to_finish(desk):
    known = desk.server.studies["study-1"]
    z = known["schedule"][0]["z_mm"]
    known["schedule"] = [{"slice_index": k, "z_mm": z + 5.0 * (k - 4), "why": "schedule"} for k in range(4, 35)]
    desk.connect()
    desk.open("study-1")
    count = presses(desk)
    while desk.panel.session.open_slices:
        desk.key(Key.Key_E)
    desk.key(Key.Key_J)
    desk.key(Key.Key_Return, Modifier.ControlModifier)
    desk.wait(lambda: known["tag"] == "final")
    assert len(count) == 31 + 2
    assert desk.server.row("study-1")["label"] == "negative"


def test_five_emboli_grown_by_key_take_two_presses_each(desk, monkeypatch):
    import slicer

    desk.connect()
    desk.open("study-1")
    crosshair = slicer.mrmlScene.GetSingletonNode("default", "vtkMRMLCrosshairNode")
    right, front, _ = at_the_clot(desk)
    affine = chest(0)[2]
    monkeypatch.setattr(desk.panel.painting, "in_clot_range", lambda k: clot())  # the same clot on each slice
    count = presses(desk)
    slices = desk.panel.session.open_slices
    row, column = np.argwhere(clot()).mean(0).round().astype(int)
    for number, k in enumerate(slices):
        if number < 5:
            crosshair.SetCursorPositionRAS((right, front, float((affine @ (k, row, column, 1))[2])))
            desk.key(Key.Key_S)
            desk.key(Key.Key_N)
        else:
            desk.key(Key.Key_E)
    crosshair.SetCursorPositionInvalid()
    desk.key(Key.Key_K)
    desk.key(Key.Key_Return, Modifier.ControlModifier)
    desk.idle()
    assert len(desk.panel.session.emboli) == 5
    assert desk.server.studies["study-1"]["tag"] == "final"
    assert len(count) == 2 * 5 + (len(slices) - 5) + 2


def test_a_study_that_needs_a_label_only_takes_one_key(desk):
    desk.connect()
    read_labels(desk)
    count = presses(desk)
    desk.key(Key.Key_J)
    desk.wait(lambda: desk.panel.session.study == "study-2")
    assert len(count) == 1
    assert desk.server.row("study-1")["state"] == "labelled"


# --- save


def test_a_negative_label_with_outlined_embolism_is_asked_about_and_the_other_way_round(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    desk.answers = ["Go back"]
    desk.key(Key.Key_J)
    assert f"Embolism is marked on slice {CLOT_SLICE + 1}" in desk.questions[0]
    assert desk.panel.session.label == ""
    assert not desk.ui.negativeButton.checked
    desk.open("study-2")
    desk.key(Key.Key_K)
    while desk.panel.session.open_slices:
        desk.key(Key.Key_E)
    desk.answers = ["Go back"]
    desk.ui.submitButton.click()
    assert "No slice of this study is marked as embolism" in desk.questions[1]


def test_a_complete_study_begins_on_a_slice_of_the_list_when_it_is_opened_again(desk):
    desk.connect()
    desk.open("study-1")
    while desk.panel.session.open_slices:
        desk.key(Key.Key_E)
    desk.ui.submitButton.click()
    desk.wait(lambda: "Submitted as complete" in desk.ui.savedLabel.text)
    desk.open("study-2")
    desk.key(Key.Key_B, Modifier.ShiftModifier)
    desk.wait(lambda: desk.panel.session is not None and desk.panel.session.study == "study-1")
    assert desk.slice == 4


def test_slices_without_an_outline_and_notes_reach_the_server(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_H)
    desk.panel.annotate.jump(4)
    desk.ui.sliceNoteEdit.text = "subsegmental"
    desk.ui.sliceNoteEdit.editingFinished.emit()
    desk.ui.studyNoteEdit.text = "motion"
    desk.ui.studyNoteEdit.editingFinished.emit()
    assert desk.ui.scheduleTable.item(0, 2).text() == "embolism, not outlined"
    desk.ui.saveButton.click()
    desk.wait(lambda: "Saved on the server" in desk.ui.savedLabel.text)
    sent = desk.server.studies["study-1"]["annotation"]
    assert (sent["schema"], sent["note"]) == ("pe-annotation/2", "motion")
    assert (sent["slices"][0]["not_outlined"], sent["slices"][0]["note"]) == (True, "subsegmental")
    desk.open("study-2")
    desk.open("study-1")
    assert desk.panel.session.state(4) == "not_outlined"
    assert desk.ui.studyNoteEdit.text == "motion"


def test_submitting_a_complete_review_reaches_the_server_as_final_with_its_mask(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    desk.panel.annotate.jump(4)
    while desk.panel.session.open_slices:
        desk.key(Key.Key_E)
    desk.ui.positiveButton.click()
    desk.idle()
    desk.key(Key.Key_Return, Modifier.ControlModifier)
    desk.wait(lambda: "Submitted as complete" in desk.ui.savedLabel.text)
    known = desk.server.studies["study-1"]
    assert (known["tag"], known["row"]["label"]) == ("final", "positive")
    header = nrrd.read_header(io.BytesIO(known["label"]))
    voxels = nrrd.read_data(header, io.BytesIO(known["label"][known["label"].index(b"\n\n") + 2 :]), index_order="C")
    assert np.array_equal(voxels[CLOT_SLICE] == 1, clot())
    assert voxels.sum() == clot().sum()
    states = {s["slice_index"]: s["state"] for s in known["annotation"]["slices"]}
    assert states[CLOT_SLICE] == "embolism"
    assert set(states.values()) == {"embolism", "none"}
    desk.wait(lambda: any(row.state == "complete" for row in desk.panel.worklist.rows))
    desk.shot("submitted")


def test_submitting_an_incomplete_review_saves_a_draft_and_goes_to_the_first_open_slice(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.panel.annotate.jump(30)
    desk.ui.submitButton.click()
    desk.wait(lambda: "Saved as a draft" in desk.ui.savedLabel.text)
    assert desk.server.studies["study-1"]["tag"] == "draft"
    assert desk.slice == 8


def test_a_study_label_needs_no_slices(desk):
    desk.connect()
    desk.open("study-1")
    desk.ui.negativeButton.click()
    desk.wait(lambda: desk.server.studies["study-1"]["row"]["label"] == "negative")
    assert desk.server.studies["study-1"]["annotation"] is None


def test_a_complete_study_opens_again_with_what_was_reviewed(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    desk.ui.saveButton.click()
    desk.wait(lambda: "Saved on the server" in desk.ui.savedLabel.text)
    desk.open("study-2")
    desk.open("study-1")
    assert np.array_equal(desk.panel.nodes.masks()[CLOT_SLICE], clot())
    assert desk.panel.session.state(CLOT_SLICE) == "embolism"
    assert not desk.panel.session.unsent
    assert desk.questions == []


def test_after_a_crash_the_work_is_offered_and_restored(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    desk.panel.annotate.jump(4)
    desk.key(Key.Key_E)
    desk.crash()
    assert desk.server.studies["study-1"]["annotation"] is None
    desk.sit_down()
    desk.connect()
    desk.open("study-1")
    assert "has not reached the server" in desk.questions[0]
    assert "(2 slices reviewed)" in desk.questions[0]
    assert np.array_equal(desk.panel.nodes.masks()[CLOT_SLICE], clot())
    assert desk.panel.session.progress[0] == 2


def test_a_server_killed_in_mid_upload_loses_nothing_and_gets_it_later(desk):
    desk.connect()
    desk.open("study-1")
    desk.paint(CLOT_SLICE, clot())
    desk.server.die_in_upload = True
    desk.ui.saveButton.click()
    desk.wait(lambda: "will be sent again" in desk.ui.savedLabel.text)
    desk.shot("kept", 600)
    desk.server.die_in_upload = False
    desk.panel.due["retry"] = 0
    desk.wait(lambda: desk.server.studies["study-1"]["tag"] == "draft")
    desk.wait(lambda: not desk.panel.session.unsent)


def test_work_on_a_study_that_was_left_is_sent_when_the_server_is_back(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.server.die_in_upload = True
    desk.open("study-2")
    desk.idle()
    desk.server.die_in_upload = False
    desk.panel.due["retry"] = 0
    desk.wait(lambda: desk.server.studies["study-1"]["tag"] == "draft")


def test_an_upload_whose_receipt_was_lost_is_not_a_conflict_with_oneself(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    draft = desk.panel.session.snapshot()
    desk.server.save("study-1", draft.annotation(), b"")
    desk.key(Key.Key_E)
    desk.ui.saveButton.click()
    desk.wait(lambda: "Saved on the server" in desk.ui.savedLabel.text)
    assert desk.questions == []
    assert len(desk.server.studies["study-1"]["annotation"]["slices"]) == 2


def other_version(desk):
    """Bo saves two slices of study-1 meanwhile, one of them with paint."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[CLOT_SLICE] = clot()
    slices = [{"slice_index": 8, "z_mm": 0.0, "state": "uncertain", "reader": "Bo", "time": ""},
              {"slice_index": CLOT_SLICE, "z_mm": 0.0, "state": "embolism", "reader": "Bo", "time": ""}]  # fmt: skip
    desk.server.save("study-1", {"schema": "pe-annotation/1", "slices": slices}, nrrd_bytes(mask, chest(0)[2]))


def test_a_newer_version_on_the_server_is_asked_about_and_both_are_combined(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.key(Key.Key_E)
    other_version(desk)
    desk.ui.saveButton.click()
    desk.wait(lambda: "Saved on the server" in desk.ui.savedLabel.text)
    assert "2 slices by Bo" in desk.questions[0]
    states = {s["slice_index"]: s["state"] for s in desk.server.studies["study-1"]["annotation"]["slices"]}
    assert states == {4: "none", 8: "none", CLOT_SLICE: "embolism"}
    assert np.array_equal(desk.panel.nodes.masks()[CLOT_SLICE], clot())
    assert len(desk.server.studies["study-1"]["versions"]) == 2


def test_taking_the_servers_version_keeps_ones_own_in_a_file(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    other_version(desk)
    desk.answers = ["Use the server's version"]
    desk.ui.saveButton.click()
    desk.wait(lambda: desk.panel.session.state(8) == "uncertain")
    assert desk.panel.session.state(4) == ""
    desk.idle()
    assert len(list(desk.panel.drafts.folder.glob("*.aside"))) == 1
    assert len(desk.server.studies["study-1"]["versions"]) == 1


def test_paint_that_has_not_rested_yet_is_what_undo_takes_back_and_redo_brings_again(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.panel.annotate.jump(CLOT_SLICE)
    desk.stroke({CLOT_SLICE: clot()})
    desk.ui.undoButton.click()
    assert desk.panel.session.masks == {}
    assert desk.panel.session.state(4) == "none"
    desk.key(Key.Key_Y)
    desk.rest()
    assert np.array_equal(desk.panel.session.masks[CLOT_SLICE], clot())


def test_paint_made_while_the_next_study_loads_reaches_the_server(desk):
    desk.connect()
    desk.open("study-1")
    desk.panel.annotate.jump(CLOT_SLICE)
    desk.panel.study.open("study-2")
    desk.stroke({CLOT_SLICE: clot()})
    desk.panel.annotate.painted_at = time.monotonic() + 60  # the brush is still down
    desk.wait(lambda: desk.panel.session is not None and desk.panel.session.study == "study-2")
    desk.wait(lambda: desk.server.studies["study-1"]["annotation"] is not None)
    slices = desk.server.studies["study-1"]["annotation"]["slices"]
    assert [s["slice_index"] for s in slices] == [CLOT_SLICE]


def test_what_changed_during_an_upload_follows_it_though_the_study_was_left(desk):
    desk.connect()
    desk.open("study-1")
    desk.idle()
    desk.key(Key.Key_E)
    desk.server.slow_seconds = 1.5
    desk.ui.saveButton.click()
    desk.app.settle(300)
    desk.server.slow_seconds = 0
    desk.key(Key.Key_U)
    desk.open("study-2")
    desk.wait(lambda: len(desk.server.studies["study-1"]["versions"]) == 2)
    assert [s["state"] for s in desk.server.studies["study-1"]["annotation"]["slices"]] == ["none", "uncertain"]
    desk.idle()
    assert desk.questions == []
    assert desk.panel.drafts.pending(desk.server.address) == []


def test_a_submission_during_an_upload_is_answered_as_a_submission(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.ui.saveButton.click()
    desk.panel.annotate.jump(30)
    desk.ui.submitButton.click()
    desk.wait(lambda: "slices of the schedule are open" in desk.ui.savedLabel.text)
    assert desk.slice == 8


def test_a_conflict_is_asked_about_once_however_long_the_reader_thinks(desk):
    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    other_version(desk)

    def think(text, choices):
        desk.questions.append(text)
        desk.panel.due["retry"] = 0
        desk.app.settle(400)
        return "Combine both"

    desk.panel.ask = think
    desk.ui.saveButton.click()
    desk.wait(lambda: "Saved on the server" in desk.ui.savedLabel.text)
    assert len(desk.questions) == 1


def test_work_that_the_server_refuses_is_not_promised_to_be_sent_again(desk, monkeypatch):
    import fake_server

    desk.connect()
    desk.open("study-1")
    refuse = lambda self, path: self._json(403, {"detail": "you may not write"})  # noqa: E731
    monkeypatch.setattr(fake_server._Handler, "put_datastore_label", refuse)
    desk.key(Key.Key_E)
    desk.ui.saveButton.click()
    desk.wait(lambda: "you may not write" in desk.ui.savedLabel.text)
    assert desk.ui.savedLabel.text.endswith("Save sends it again.")


def test_closing_the_scene_keeps_the_review(desk):
    import slicer

    desk.connect()
    desk.open("study-1")
    desk.key(Key.Key_E)
    desk.panel.scene_closed()
    desk.idle()
    assert slicer.mrmlScene.GetNodeByID(desk.panel.editor_node.GetID()) is not None
    desk.open("study-1")
    assert desk.panel.session.progress[0] == 1


# --- detection


def detect(desk):
    desk.ui.detectButton.click()
    desk.wait(lambda: desk.panel.detecting.detection is not None and not desk.panel.runner.jobs("detect"))


def test_a_detection_shows_its_progress_its_words_and_its_curve(desk, monkeypatch):
    import PulmonaryEmbolismLib.client as client

    monkeypatch.setattr(client, "POLL_SECONDS", 0.05)
    desk.server.step_seconds = 0.1
    desk.connect()
    desk.open("study-1")
    desk.ui.detectButton.click()
    desk.wait(lambda: "encode slabs" in desk.ui.activityLabel.text)
    assert not desk.ui.detectButton.enabled
    desk.key(Key.Key_E)  # the panel goes on working
    assert desk.panel.session.progress[0] == 1
    desk.shot("detecting")
    desk.wait(lambda: desk.panel.detecting.detection is not None)
    assert "P(PE) 0.91, above the threshold 0.62" in desk.ui.probabilityLabel.text
    assert "starter 1.0 (2026-11-02)" in desk.ui.modelLabel.text
    assert "never seen a real embolism" in desk.ui.reasonsLabel.text
    assert desk.ui.candidatesTable.rowCount == 2
    curve = desk.panel.detecting.curve
    QTest.mouseClick(curve, QtCore.Qt.MouseButton.LeftButton, pos=QtCore.QPoint(curve.place(CLOT_SLICE), 60))
    assert desk.slice == CLOT_SLICE


def test_the_overlay_is_off_until_it_is_asked_for(desk):
    desk.connect()
    desk.open("study-1")
    composite = desk.app.headless.scene.GetFirstNodeByClass("vtkMRMLSliceCompositeNode")
    desk.key(Key.Key_O)
    assert composite.GetForegroundVolumeID() is None
    detect(desk)
    assert composite.GetForegroundVolumeID() is None
    desk.key(Key.Key_O)
    assert composite.GetForegroundVolumeID() == desk.panel.nodes._attention.GetID()
    desk.ui.opacitySlider.value = 0.6
    assert composite.GetForegroundOpacity() == pytest.approx(0.6)
    desk.key(Key.Key_O)
    assert composite.GetForegroundVolumeID() is None


def test_an_accepted_candidate_is_a_region_to_correct_and_a_rejected_one_is_remembered(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    table = desk.ui.candidatesTable
    table.selectRow(0)
    table.cellClicked.emit(0, 0)
    assert desk.slice == CLOT_SLICE
    desk.ui.acceptButton.click()
    assert desk.panel.session.state(CLOT_SLICE) == "embolism"
    assert (desk.panel.nodes.masks()[CLOT_SLICE] & clot()).sum() > 0.8 * clot().sum()
    assert list(desk.panel.nodes.masks()) == [CLOT_SLICE]
    region = desk.panel.nodes.masks()[CLOT_SLICE]
    desk.ui.undoButton.click()
    assert desk.panel.nodes.masks() == {}
    desk.ui.acceptButton.click()
    assert np.array_equal(desk.panel.nodes.masks()[CLOT_SLICE], region)
    table.selectRow(1)
    desk.ui.rejectButton.click()
    assert [table.item(row, 5).text() for row in (0, 1)] == ["accepted", "rejected"]
    desk.ui.saveButton.click()
    desk.wait(lambda: "Saved on the server" in desk.ui.savedLabel.text)
    desk.open("study-2")
    desk.open("study-1")
    assert [table.item(row, 5).text() for row in (0, 1)] == ["accepted", "rejected"]
    for _ in range(3):
        desk.panel.annotate.jump(desk.panel.session.next_open(-1))
        desk.key(Key.Key_E)
    desk.key(Key.Key_U)
    detect(desk)
    desk.panel.annotate.jump(CLOT_SLICE)
    desk.key(Key.Key_O)
    desk.shot("detection")


def test_a_cancelled_detection_frees_the_panel_at_once_and_its_answer_is_never_shown(desk):
    desk.server.step_seconds = 0.2
    desk.connect()
    desk.open("study-1")
    desk.ui.detectButton.click()
    desk.wait(lambda: desk.ui.cancelButton.visible)
    desk.ui.cancelButton.click()
    assert desk.ui.detectButton.enabled
    desk.app.settle(1200)
    assert desk.panel.detecting.detection is None


def test_a_refused_study_says_why(desk):
    refusal = {"status": "refused", "probability": None, "threshold": 0.62, "evidence": [], "candidates": [],
               "reasons": [{"code": "no_contrast", "message": "the arteries are not enhanced"}]}  # fmt: skip
    desk.server.studies["study-1"]["detects"] = refusal
    desk.connect()
    desk.open("study-1")
    detect(desk)
    assert desk.ui.probabilityLabel.text == "Not analysed"
    assert "the arteries are not enhanced" in desk.ui.reasonsLabel.text
    desk.shot("refused")


def test_the_stored_detection_is_shown_at_once_and_its_attention_comes_with_the_overlay(desk):
    known = desk.server.studies["study-1"]
    known["detection"] = {**known["detects"], "model": desk.server.model}
    desk.connect()
    desk.open("study-1")
    assert "P(PE) 0.91" in desk.ui.probabilityLabel.text
    assert len(desk.panel.detecting.curve.evidence) == len(known["detects"]["evidence"])
    assert desk.ui.candidatesTable.rowCount == 2
    assert ("POST", "/infer/detection") not in desk.server.requests
    composite = desk.app.headless.scene.GetFirstNodeByClass("vtkMRMLSliceCompositeNode")
    desk.ui.overlayButton.click()
    desk.wait(lambda: desk.ui.activityLabel.text.startswith(("Loading the attention", "Detecting")))
    assert composite.GetForegroundVolumeID() is None
    desk.wait(lambda: composite.GetForegroundVolumeID() is not None)
    assert desk.ui.overlayButton.checked
    assert desk.server.requests.count(("POST", "/infer/detection")) == 1
    desk.key(Key.Key_O)
    assert composite.GetForegroundVolumeID() is None


def test_a_candidate_of_the_stored_detection_is_accepted_once_its_attention_is_there(desk):
    known = desk.server.studies["study-1"]
    known["detection"] = {**known["detects"], "model": desk.server.model}
    desk.connect()
    desk.open("study-1")
    desk.ui.candidatesTable.selectRow(0)
    desk.ui.candidatesTable.cellClicked.emit(0, 0)
    desk.ui.acceptButton.click()
    desk.wait(lambda: desk.panel.session.state(CLOT_SLICE) == "embolism")
    assert not desk.ui.overlayButton.checked


def test_an_attention_that_cannot_be_had_leaves_the_overlay_off(desk):
    known = desk.server.studies["study-1"]
    known["detection"] = {**known["detects"], "model": desk.server.model}
    desk.connect()
    desk.open("study-1")
    desk.idle()
    desk.server.down = True
    desk.ui.overlayButton.click()
    desk.wait(lambda: not desk.ui.overlayButton.checked)
    assert "P(PE) 0.91" in desk.ui.probabilityLabel.text


def test_closing_the_scene_takes_the_detection_off_the_panel(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    desk.panel.scene_closed()
    assert desk.ui.probabilityLabel.text == ""
    assert desk.ui.candidatesTable.rowCount == 0
    assert desk.panel.detecting.curve.evidence == []


# --- training


def test_training_shows_its_curves_can_be_stopped_and_its_new_model_is_announced(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    desk.ui.trainSection.collapsed = False
    desk.ui.trainButton.click()
    history = [{"epoch": n, "loss": 2.0 / n, "validation_accuracy": 1 - 0.5 / n} for n in range(1, 9)]
    desk.server.training["encoder"] = {"task": "train encoder", "epoch": 8, "epochs": 20, "history": history}
    desk.wait(lambda: "epoch 8 of 20" in desk.ui.trainingLabel.text)
    assert desk.ui.stopButton.enabled
    assert desk.panel.training.curves.series["loss"][-1] == (8, 0.25)
    assert not desk.ui.newModelLabel.visible
    desk.server.model = {**desk.server.model, "sha256": "b" * 64, "version": "1.1"}
    desk.wait(lambda: "starter 1.1" in desk.ui.newModelLabel.text)
    bar = desk.ui.scrollArea.verticalScrollBar()
    bar.setValue(bar.maximum)
    desk.shot("training")
    desk.ui.stopButton.click()
    desk.wait(lambda: "Not running" in desk.ui.trainingLabel.text)
    detect(desk)
    assert not desk.ui.newModelLabel.visible


def test_the_training_that_runs_is_the_one_that_is_shown(desk):
    desk.server.training = {
        "encoder": {"task": "train encoder", "state": "running", "epoch": 3, "epochs": 20, "history": []},
        "classifier": {"task": "train classifier", "state": "finished", "epoch": 50, "epochs": 50, "history": []},
        "running": True,
    }
    desk.connect()
    desk.ui.trainSection.collapsed = False
    desk.wait(lambda: "train encoder, epoch 3 of 20" in desk.ui.trainingLabel.text)


def test_a_model_that_somebody_else_trained_is_announced(desk):
    desk.connect()
    desk.open("study-1")
    detect(desk)
    desk.server.model = {**desk.server.model, "sha256": "b" * 64, "version": "1.1"}
    desk.ui.refreshButton.click()
    desk.wait(lambda: "starter 1.1" in desk.ui.newModelLabel.text)


def test_a_large_ct_is_read_without_a_request_or_a_file_on_the_main_thread(desk, monkeypatch):
    shape = (150, 512, 512)
    header = b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 512 512 150\nencoding: raw\n"
    header += b"endian: little\nspace directions: (0.7,0,0) (0,0.7,0) (0,0,2)\nspace origin: (0,0,0)\n\n"
    path = desk.folder / "large.nrrd"
    path.write_bytes(header + np.zeros(shape, "<i2").tobytes())
    schedule = [(k, 2.0 * k, "schedule") for k in range(5, 150, 5)]
    desk.server.add_study("large", path, shape, (2.0, 0.7, 0.7), schedule)
    from PulmonaryEmbolismLib import images

    where = []
    original = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path: where.append(threading.current_thread()) or original(path))
    desk.beats.clear()  # making the file is the test's own stall
    desk.connect()
    desk.open("large")
    mask = np.zeros(shape[1:], bool)
    mask[200:260, 240:300] = True
    desk.paint(5, mask)
    desk.key(Key.Key_N)
    desk.key(Key.Key_E)
    desk.ui.saveButton.click()
    desk.wait(lambda: "Saved on the server" in desk.ui.savedLabel.text)
    assert where
    assert threading.main_thread() not in where


def test_the_self_test_runs_that_slicer_would_run(desk, monkeypatch):
    monkeypatch.delenv("PE_SERVER", raising=False)
    desk.app.module.PulmonaryEmbolismTest().runTest()


@pytest.mark.skipif("PE_SCREENSHOTS" not in os.environ, reason="PE_SCREENSHOTS names no folder for pictures")
def test_pictures_of_a_simulated_study_with_a_made_up_detection(desk):
    from pe_app.annotation.sparse import slice_schedule
    from pe_app.phantom import PhantomConfig, make_phantom

    phantom = make_phantom(np.random.default_rng(4), PhantomConfig(matrix=384, spacing_mm=2.5), positive=True)
    volume, emboli = phantom.volume, phantom.emboli_mask.voxels > 0
    areas = emboli.sum((1, 2))
    middle = int(areas.argmax())
    blocks = tuple(np.array(volume.shape) // np.array((1, 24, 24)))
    cells = emboli.reshape(volume.shape[0], 24, blocks[1], 24, blocks[2]).mean((2, 4))
    z = np.arange(len(areas))
    glow = sum(cells[j] * np.exp(-(((z - j) / 4.0) ** 2))[:, None, None] for j in np.flatnonzero(areas))
    glow = np.maximum.reduce([glow, *(0.5 * np.roll(glow, n, axis) for axis in (1, 2) for n in (-1, 1))])
    step = np.diag([1.0, *blocks[1:], 1.0])
    step[1:3, 3] = [(n - 1) / 2 for n in blocks[1:]]
    attention = nrrd_bytes(np.round(255 * glow / glow.max()).astype(np.uint8), volume.affine @ step)

    strength = np.convolve(areas, np.hanning(15), "same")
    slabs = np.linspace(8, len(areas) - 9, 50).round().astype(int)
    wobble = 0.05 + 0.06 * np.random.default_rng(0).random(50)
    probability = np.clip(wobble + 0.86 * strength[slabs] / strength.max(), 0, 0.97)
    row, column = np.argwhere(emboli[middle]).mean(0)
    centre = volume.to_lps_mm((middle, row, column)).tolist()
    other = volume.to_lps_mm((middle // 2, row * 0.9, volume.shape[2] - column)).tolist()
    said = {
        "status": "analysed", "probability": 0.88, "threshold": 0.62,
        "reasons": [{"message": "trained on phantoms only, has never seen a real embolism"}],
        "evidence": [{"slice_index": int(k), "z_mm": 0, "probability": float(p)}
                     for k, p in zip(slabs, probability, strict=True)],
        "candidates": [
            {"rank": 1, "slice_index": middle, "z_mm": centre[2], "centre_lps_mm": centre, "extent_mm": [36, 30, 22],
             "peak": 0.94, "slab_probability": float(probability.max())},
            {"rank": 2, "slice_index": middle // 2, "z_mm": other[2], "centre_lps_mm": other, "extent_mm": [16, 14, 8],
             "peak": 0.31, "slab_probability": 0.11},
        ],
    }  # fmt: skip
    for number in range(1, 6):
        study = f"phantom-{number:04d}"
        path = desk.folder / f"{study}.nrrd"
        path.write_bytes(nrrd_bytes(volume.voxels, volume.affine) if number == 1 else b"")
        schedule = [(int(k), float(volume.slice_z_mm[k]), "schedule") for k in slice_schedule(volume)]
        if middle not in [k for k, *_ in schedule]:
            schedule = sorted([*schedule, (middle, float(volume.slice_z_mm[middle]), "suspicious")])
        desk.server.add_study(study, path, volume.shape, volume.spacing_mm, schedule, attention, said)
    for study, row in (("phantom-0002", {"label": "negative", "probability": 0.12, "model": "1.0"}),
                       ("phantom-0003", {"held_by": "Bo", "probability": 0.57, "model": "1.0"}),
                       ("phantom-0004", {"usable": False, "reason": "no contrast"}),
                       ("phantom-0005", {"label": "positive", "probability": 0.93, "model": "1.0"})):  # fmt: skip
        desk.server.studies[study]["row"].update(row)
    del desk.server.studies["study-1"], desk.server.studies["study-2"]
    view = desk.app.headless.view(size=(640, 640))
    desk.connect()
    desk.shot("worklist", 420)
    desk.open("phantom-0001")
    detect(desk)
    desk.ui.positiveButton.click()
    desk.panel.annotate.jump(desk.panel.session.next_open(-1))
    for _ in range(7):
        desk.key(Key.Key_E)
    desk.key(Key.Key_U)
    desk.paint(middle, emboli[middle])
    desk.ui.candidatesTable.selectRow(0)
    desk.panel.detecting.go_to_candidate()
    detection = desk.panel.detecting.detection
    first = detection.candidates[0]
    desk.panel.annotate.edit(lambda session: session.decide(first, "accepted", detection.model.sha256))
    desk.ui.saveButton.click()
    desk.idle()
    view.node.SetFieldOfView(*(0.62 * n for n in view.node.GetFieldOfView()[:2]), 1)
    view.node.SetXYZOrigin(0, 0, 0)
    desk.shot("review", 1060)
    desk.key(Key.Key_O)
    desk.shot("overlay", 1060)
