"""The architecture as a test: reading order, and who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS: dict[str, tuple[str, ...]] = {
    "common": (
        *(
            "errors",
            "progress",
            "files",
            "tables",
            "schema",
            "worker_pool",
            "distributed",
            "memory",
            "device",
            "extras",
        ),
        "settings",
    ),
    "ct": (
        "source_series",
        "volume",
        "dicom_files",
        "dicom_headers",
        "dicom_stack",
        "lost_slices",
        "dicom_pixels",
        "volume_io",
        "lungs",
        "quality",
        "slabs",
    ),
    "studies": (),
    "pacs": ("dicomweb", "importing", "sending"),
    "reports": (
        *("decoding", "abbreviations", "phrases", "language", "sentences", "mentions", "report_labels", "label_files"),
    ),
    "model": (
        *("winograd", "slab_encoder", "study_classifier", "losses", "detection", "candidate_places", "detector"),
        *("detect", "bundle"),
    ),
    "annotation": ("record", "seg_nrrd", "sparse", "judged", "dicom_seg", "review"),
    "public_data": (
        *("found", "stored_order", "proof", "fumpe", "cadpe", "read", "rspect", "nnunet", "mask_pairs"),
        *("sets", "run"),
    ),
    "results": (
        *("outcome", "find_studies", "ledger", "words", "pictures", "rendering", "review_picture", "study_page"),
        *("result_files", "worklist_page", "published_schemas", "batch", "arrivals", "dicom"),
    ),
    "evaluation": (
        "roc",
        "localisation",
        "study_localisation",
        "predictions",
        "evaluate",
        "pictures",
        "curves",
        "report",
        "agreement",
    ),
    "training": ("datasets", "run", "loop", "stages", "fine_tuning", "calibration"),
    "phantom": (
        *("anatomy", "vessels", "raster", "emboli", "scan", "painting"),
        *("trees", "clots", "chest", "rendering", "tree_studies", "studies", "dicom"),
    ),
    "research": ("benchmark", "baselines", "comparison", "demo", "bench", "starter", "public_recipe"),
    "cli": (),
}
"""Rooms of ``pe_app`` in reading order, each with its modules in reading order; modules of ``cli`` have none."""

READING_ORDER = tuple((room, *module) for room, modules in ROOMS.items() for module in [(), *((m,) for m in modules)])
"""A room's own ``__init__`` stands before its modules."""

APP = ROOT / "apps" / "pulmonary_embolism"
APP_ORDER = (
    *("compat", "store.checks", "store.history", "store.index", "store.images", "store.labels", "store.studies"),
    *("store.archive", "store.models", "store.reads", "store.backup", "store.damage"),
    *("server.limits", "server.access", "server.blinding", "server.audit", "server.permissions", "server.possession"),
    *("server.temporary", "server.protocol", "server.forms", "server.page", "server.middleware", "server.listen"),
    *("tasks.detection", "tasks.worklist", "tasks.training_process", "tasks.training_queue", "app"),
    *("server.routes", "server.serving", "main"),
    *("cli.folder", "cli.safekeeping", "cli.annotations", "cli.labels", "cli.models", "cli.tokens", "cli.serve"),
)
"""Modules of ``pe_monailabel`` in reading order."""


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


def place_of(path: Path) -> tuple[str, ...]:
    """Room and module of a file, where the room has an order inside."""
    room, *inside = path.relative_to(ROOT / "pe_app").with_suffix("").parts
    return (room, inside[0]) if inside and ROOMS[room] else (room,)


def places_named_by(names: set[str]) -> set[tuple[str, ...]]:
    """Rooms and modules that dotted names of ``pe_app`` stand for."""
    parts = [tuple(name.split(".")[1:3]) for name in names if name.startswith("pe_app.")]
    return {part if part in READING_ORDER else part[:1] for part in parts} & set(READING_ORDER)


def method_files() -> list[Path]:
    return [path for path in sorted((ROOT / "pe_app").rglob("*.py")) if not path.name.startswith("__")]


def test_the_reading_order_names_every_module():
    assert {place_of(path) for path in method_files()} == set(READING_ORDER) - {
        (room,) for room, modules in ROOMS.items() if modules
    }


@pytest.mark.parametrize("path", method_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_those_above_it(path):
    own = place_of(path)
    above = set(READING_ORDER[: READING_ORDER.index(own)])
    assert places_named_by(imported_by(path)) - {own} <= above


@pytest.mark.parametrize("path", method_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_method_knows_neither_monai_label_nor_slicer(path):
    known = {name.partition(".")[0] for name in imported_by(path)}
    assert not known & {"monailabel", "slicer", "qt", "ctk", "vtk"}


def app_files() -> list[Path]:
    return [path for path in sorted(APP.rglob("*.py")) if path.name != "__init__.py"]


def app_module(path: Path) -> str:
    return ".".join(path.relative_to(APP).with_suffix("").parts)


def test_the_reading_order_names_every_module_of_the_app():
    assert {app_module(path) for path in app_files()} == set(APP_ORDER)


@pytest.mark.parametrize("path", app_files(), ids=app_module)
def test_a_module_of_the_app_imports_by_its_full_name_and_only_from_those_above_it(path):
    own = APP_ORDER.index(app_module(path))
    imported = {name.removeprefix("pe_monailabel.") for name in imported_by(path)} & set(APP_ORDER)
    assert imported <= set(APP_ORDER[:own])
    assert "sys.path" not in path.read_text(encoding="utf-8")


def test_the_method_does_not_know_the_app():
    for path in (ROOT / "pe_app").rglob("*.py"):
        assert not {name for name in imported_by(path) if name.split(".")[0] in ("pe_monailabel", "lib")}


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
    names = ("common/errors", "common/progress", "common/__init__", "__main__", "__init__")
    modules = [ROOT / "pe_app" / f"{name}.py" for name in names]
    for path in (*modules, *(ROOT / "pe_app" / "cli").glob("*.py")):
        assert not imports_at_the_top(path) & heavy


def test_the_slicer_module_knows_neither_torch_nor_the_method():
    for path in (ROOT / "slicer_module").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported_by(path)} & {"torch", "pe_app", "monai", "SimpleITK"}
