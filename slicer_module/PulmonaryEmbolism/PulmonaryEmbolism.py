"""The module as Slicer requires it: its entry, the shell of its widget, and the self-test.

Everything else is in PulmonaryEmbolismLib, which is imported when the module is opened, not when Slicer starts.
"""

import pathlib

import qt
import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin


class PulmonaryEmbolism(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("Pulmonary Embolism")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Active Learning")]
        parent.dependencies = ["Segmentations", "SegmentEditor"]
        parent.contributors = ["The pe-app contributors"]
        parent.helpText = _(
            "Annotate pulmonary embolism on every 10 mm of a chest CT, review a model's result, and "
            "fetch the next study from a server started with <tt>pe-app serve</tt>. The CT comes from that server and "
            "your annotations go to it; nothing is sent anywhere else. Research use only, not for diagnosis."
        )
        parent.acknowledgementText = _("Built on 3D Slicer and MONAI Label.")
        slicer.app.connect("startupCompleted()", register_sample_data)


SAMPLES = "https://github.com/pe-app/pe-app/releases/download/sample-data/"
"""Made by: pe-app phantom --studies 2 --seed 1 --matrix 128 --spacing-mm 5 --out sample"""


def register_sample_data():
    """Two simulated studies, with and without emboli, in Slicer's Sample Data module."""
    import SampleData

    icon = pathlib.Path(__file__).parent / "Resources" / "Icons" / "PulmonaryEmbolism.png"
    for number, what in ((1, _("with emboli")), (2, _("without emboli"))):
        SampleData.SampleDataLogic.registerCustomSampleDataSource(
            category="PulmonaryEmbolism",
            sampleName=f"PulmonaryEmbolismPhantom{number}",
            sampleDescription=_("Simulated chest CT {what}").format(what=what),
            thumbnailFileName=str(icon),
            uris=f"{SAMPLES}phantom_1_{number - 1:04d}.nrrd",
            fileNames=f"PulmonaryEmbolismPhantom{number}.nrrd",
            nodeNames=f"PulmonaryEmbolismPhantom{number}",
        )


class PulmonaryEmbolismWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.panel = None

    def setup(self):
        from PulmonaryEmbolismLib.widget import Panel

        ScriptedLoadableModuleWidget.setup(self)
        root = slicer.util.loadUI(self.resourcePath("UI/PulmonaryEmbolism.ui"))
        root.setMRMLScene(slicer.mrmlScene)
        self.layout.addWidget(root)
        places = qt.QStandardPaths
        data = pathlib.Path(places.writableLocation(places.AppDataLocation)) / "PulmonaryEmbolism"
        cache = pathlib.Path(places.writableLocation(places.CacheLocation)) / "PulmonaryEmbolism"
        self.panel = Panel(slicer.util.childWidgetVariables(root), data, cache)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneClosed)

    def onReload(self):
        """Slicer's Reload: the library anew, not this file alone."""
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == "PulmonaryEmbolismLib"]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def enter(self):
        self.panel.enter()

    def exit(self):
        self.panel.exit()

    def cleanup(self):
        self.removeObservers()
        if self.panel is not None:
            self.panel.cleanup()

    def onSceneClosed(self, caller, event):
        self.panel.scene_closed()


class PulmonaryEmbolismTest(ScriptedLoadableModuleTest):
    """The reader's day against a server of this project, which the environment variable PE_SERVER names.

    Without it the part that needs no server runs: a study of air is opened, painted and read back.
    """

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_paint_and_marks_are_kept_and_read_back()
        self.setUp()
        self.test_a_reader_opens_marks_and_saves_a_study()

    def test_paint_and_marks_are_kept_and_read_back(self):
        import numpy as np
        from PulmonaryEmbolismLib.images import Image
        from PulmonaryEmbolismLib.scene import StudyScene

        editor = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        affine = np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1.0]])
        study = StudyScene(slicer.mrmlScene, Image(np.full((12, 32, 32), 50, np.int16), affine), "air", editor)
        red = slicer.app.layoutManager().sliceWidget("Red").mrmlSliceNode()
        study.show([red])
        study.jump(red, 7)
        self.assertEqual(study.current_slice(red), 7)
        mask = np.zeros((32, 32), bool)
        mask[10:14, 8:20] = True
        study.paint({7: mask})
        study.keep_review_text("kept")
        self.assertEqual(list(study.masks()), [7])
        self.assertTrue(np.array_equal(study.masks()[7], mask))
        self.assertEqual(study.review_text(), "kept")
        study.close()
        self.delayDisplay("Paint and marks are kept and read back")

    def test_a_reader_opens_marks_and_saves_a_study(self):
        import os

        address = os.environ.get("PE_SERVER")
        if not address:
            self.delayDisplay("PE_SERVER names no server: the part that needs one is left out")
            return
        slicer.util.selectModule("PulmonaryEmbolism")
        panel = slicer.modules.PulmonaryEmbolismWidget.panel
        panel.ask = lambda text, choices: choices[0]
        panel.ui.addressBox.setCurrentText(address)
        panel.connection.connect()
        self.wait(lambda: panel.worklist.rows)
        panel.study.open(panel.worklist.rows[0].study)
        self.wait(lambda: panel.session is not None)
        before = panel.session.progress[0]
        first = panel.session.open_slices[0]
        panel.annotate.jump(first)
        panel.views.draw()
        panel.annotate.mark("none")
        self.assertEqual(panel.session.progress[0], before + 1)
        panel.saving.save()
        self.wait(lambda: not panel.session.unsent)
        panel.detecting.detect()
        self.wait(lambda: panel.detecting.detection is not None and not panel.runner.jobs("detect"), seconds=600)
        self.delayDisplay("Opened, marked, saved and detected")

    def wait(self, ready, seconds=60):
        import time

        end = time.monotonic() + seconds
        while not ready():
            self.assertLess(time.monotonic(), end, "the server did not answer in time")
            slicer.app.processEvents()
            time.sleep(0.02)
