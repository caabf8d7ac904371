"""The stand-in for Slicer's Qt refuses what PythonQt refuses: what passes the other tests by accident fails here."""

import pytest
import slicer_paths  # noqa: F401

pytest.importorskip("slicer_core", reason="slicer-core is not installed")
pytest.importorskip("PySide6", reason="PySide6 is not installed")

import application
import pythonqt
from PySide6 import QtWidgets


@pytest.fixture(scope="module")
def editor():
    application.instance()
    editor = pythonqt.qMRMLSegmentEditorWidget()
    editor.setEffectNameOrder(["Paint", "Draw", "Erase"])
    return editor


@pytest.mark.parametrize("signature", ["valueChanged(nonsense)", "valueChanged()", "valueChanged", "changed(int)"])
def test_a_signal_that_does_not_exist_with_that_signature_is_refused(editor, signature):
    box = QtWidgets.QSpinBox()
    with pytest.raises(AttributeError, match="has no signal"):
        box.connect(signature, lambda: None)
    box.connect("valueChanged(int)", lambda value: None)


def test_an_effect_is_an_object_and_never_a_name(editor):
    with pytest.raises(ValueError, match="takes an effect"):
        editor.setActiveEffect("Paint")
    editor.setActiveEffectByName("Paint")
    assert editor.activeEffect() is editor.effectByName("Paint")
    editor.setActiveEffect(None)
    assert editor.activeEffect() is None


def test_an_effect_has_the_parameters_that_slicers_has(editor):
    with pytest.raises(AttributeError, match="no parameter"):
        editor.effectByName("Paint").setCommonParameter("BrushColour", 1)


def test_an_unknown_property_and_an_unknown_layout_are_refused(editor):
    with pytest.raises(AttributeError, match="no property"):
        editor.setProperty("undoButtonVisible", False)
    with pytest.raises(ValueError, match="no layout"):
        application.instance().manager.setLayout(5162)
