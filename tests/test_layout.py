"""The architecture as a test: reading order, and who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READING_ORDER = (
    *("errors", "files", "progress", "processes", "distributed", "allocation", "device", "source_series", "volume"),
    *("dicom_series", "volume_io"),
    *(
        "lungs",
        "dicomweb",
        "quality",
        "slabs",
        "segmentation",
        "annotation_record",
        "annotation",
        "studies",
        "importing",
        "detection",
    ),
    *("candidate_places", "winograd", "slab_encoder", "study_classifier", "losses", "detector"),
    *("result_files", "worklist"),
    *("batch", "watching"),
    *("dicom_results", "segmentation_import", "bundle"),
    *("datasets", "training_run"),
    *("training_loop", "training", "fine_tuning", "roc", "calibrating", "localisation", "baselines"),
    *("looking", "prediction_file", "evaluation", "evaluation_pictures", "evaluation_page"),
    *("review", "report_labels", "phantom", "comparison", "demo", "bench", "cli", "starter"),
)


def imported_by(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports_at_the_top(path: Path) -> set[str]:
    """Top-level packages that are imported when the file is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "pe_app").parts[0].removesuffix(".py")


def method_files() -> list[Path]:
    return [path for path in sorted((ROOT / "pe_app").rglob("*.py")) if not path.name.startswith("__")]


def test_the_reading_order_names_every_module():
    assert {module_of(path) for path in method_files()} == set(READING_ORDER)


@pytest.mark.parametrize("path", method_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_those_above_it(path):
    own = module_of(path)
    imported = {name.split(".")[1] for name in imported_by(path) if name.startswith("pe_app.")} & set(READING_ORDER)
    above = set(READING_ORDER[: READING_ORDER.index(own)])
    assert imported - {own} <= above


@pytest.mark.parametrize("path", method_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_method_knows_neither_monai_label_nor_slicer(path):
    known = {name.partition(".")[0] for name in imported_by(path)}
    assert not known & {"monailabel", "slicer", "qt", "ctk", "vtk"}


def test_only_the_app_imports_monai_label():
    importers = [
        path
        for folder in ("pe_app", "slicer_module")
        for path in (ROOT / folder).rglob("*.py")
        if any(name.partition(".")[0] == "monailabel" for name in imported_by(path))
    ]
    assert importers == []


def test_the_command_line_imports_nothing_heavy_before_it_must():
    heavy = {"torch", "SimpleITK", "monai", "scipy", "matplotlib", "sklearn", "skimage", "numpy"}
    modules = [ROOT / "pe_app" / f"{name}.py" for name in ("errors", "progress", "__main__", "__init__")]
    for path in (*modules, *(ROOT / "pe_app" / "cli").glob("*.py")):
        assert not imports_at_the_top(path) & heavy


def test_the_slicer_module_knows_neither_torch_nor_the_method():
    for path in (ROOT / "slicer_module").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported_by(path)} & {"torch", "pe_app", "monai", "SimpleITK"}
