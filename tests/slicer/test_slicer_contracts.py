"""What no run of the panel shows: packaging, imports, names and grammar of the Slicer module."""

import ast
import json
import re
import sys
import xml.etree.ElementTree as ET

import pytest
from slicer_paths import MODULE

ROOT = MODULE.parents[1]

LIBRARY = MODULE / "PulmonaryEmbolismLib"
PANEL = sorted([LIBRARY / "widget.py", *LIBRARY.glob("panel/*.py")])
FILES = sorted([MODULE / "PulmonaryEmbolism.py", *LIBRARY.rglob("*.py")])
BUNDLED = {"numpy", "requests", "vtk", "slicer", "qt", "PulmonaryEmbolismLib", "SampleData"}


def tree(path):
    return ast.parse(path.read_text("utf-8"), feature_version=(3, 9))


def imported(nodes):
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def listed(block):
    text = (MODULE / "CMakeLists.txt").read_text()
    names = re.search(rf"set\({block}\s+(.*?)\)", text, re.S).group(1).split()
    return {name.replace("${MODULE_NAME}", "PulmonaryEmbolism") for name in names}


def test_every_python_file_is_in_the_package():
    tree_files = {str(path.relative_to(MODULE)) for path in FILES}
    assert {
        name.replace("${MODULE_NAME}", "PulmonaryEmbolism") for name in listed("MODULE_PYTHON_SCRIPTS")
    } == tree_files


def test_every_resource_is_in_the_package():
    resources = {str(path.relative_to(MODULE)) for path in (MODULE / "Resources").rglob("*") if path.is_file()}
    assert {
        name.replace("${MODULE_NAME}", "PulmonaryEmbolism") for name in listed("MODULE_PYTHON_RESOURCES")
    } == resources


def test_every_widget_that_the_panel_names_is_in_the_ui_and_every_button_of_the_ui_does_something():
    root = ET.parse(MODULE / "Resources/UI/PulmonaryEmbolism.ui").getroot()
    there = {widget.get("name"): widget.get("class") for widget in root.iter("widget")}
    source = "".join(path.read_text() for path in PANEL)
    used = set(re.findall(r"\bui\.(\w+)", source))
    assert used <= set(there)
    assert {name for name, kind in there.items() if kind == "QPushButton"} <= used
    assert {kind for kind in there.values() if not kind.startswith("Q")} == {
        "qMRMLWidget", "ctkCollapsibleButton", "ctkSliderWidget", "qMRMLSegmentEditorWidget"}  # fmt: skip


def test_every_widget_has_a_tooltip_where_a_reader_clicks():
    root = ET.parse(MODULE / "Resources/UI/PulmonaryEmbolism.ui").getroot()
    for widget in root.iter("widget"):
        if widget.get("class") in ("QPushButton", "QComboBox", "QTableWidget", "ctkSliderWidget"):
            assert "toolTip" in [p.get("name") for p in widget.findall("property")], widget.get("name")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_code_is_python_3_9_and_imports_what_slicer_brings(path):
    names = {name.partition(".")[0] for name in imported(ast.walk(tree(path)))}
    assert names <= BUNDLED | set(sys.stdlib_module_names)


def test_starting_slicer_imports_nothing_of_the_library():
    names = imported(tree(MODULE / "PulmonaryEmbolism.py").body)
    assert not {
        name for name in names if name.partition(".")[0] in ("numpy", "requests", "vtk", "PulmonaryEmbolismLib")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_runs_when_a_file_is_imported(path):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in tree(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, allowed), f"line {node.lineno}"


@pytest.mark.parametrize(
    "name", ["answers", "transport", "client", "jobs", "images", "drafts", "review", "proposals", "keys"]
)
def test_what_decides_and_what_asks_the_server_knows_no_slicer(name):
    names = {name.partition(".")[0] for name in imported(ast.walk(tree(LIBRARY / f"{name}.py")))}
    assert not names & {"slicer", "vtk", "qt", "ctk"}


def test_the_scene_knows_neither_qt_nor_the_application():
    names = {name.partition(".")[0] for name in imported(ast.walk(tree(LIBRARY / "scene.py")))}
    assert not names & {"qt", "ctk"}
    assert not re.search(r"slicer\.(app|util|modules|mrmlScene)\b", (LIBRARY / "scene.py").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_name_is_used_that_exists_only_outside_the_application(path):
    """``import slicer`` from PyPI also offers what the application has under slicer.util only."""
    used = set(re.findall(r"\bslicer\.(\w+)", path.read_text()))
    assert {name for name in used if not name.startswith("vtk")} <= {"app", "util", "modules", "mrmlScene", "i18n",
                                                                    "ScriptedLoadableModule"}  # fmt: skip


@pytest.mark.parametrize("path", PANEL, ids=lambda path: path.name)
def test_the_panel_makes_no_request_itself(path):
    assert "requests" not in imported(ast.walk(tree(path)))


@pytest.mark.parametrize("path", PANEL, ids=lambda path: path.name)
def test_a_section_of_the_panel_imports_no_other_section(path):
    sections = {name.stem for name in PANEL} - {"widget", "forms", "worklist_table", "__init__"}
    names = {name.rpartition(".")[2] for name in imported(ast.walk(tree(path)))}
    assert path.name == "widget.py" or not names & sections


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", PANEL, ids=lambda path: path.name)
def test_every_callback_is_one_whose_exception_is_shown(path):
    """Qt and VTK drop exceptions of Python: only the two places that wrap a handler connect one."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    connected = [
        line for line in lines if re.search(r"[.](connect|AddObserver)\(", line) and "panel.connect(" not in line
    ]
    assert {line for line in connected if "self.connect(" not in line and "client.connect(" not in line} <= {
        "sender.connect(signal, self.safely(handler))",
        "self._observed.append((node, node.AddObserver(event, self.safely(handler))))",
    }


def test_the_readme_lists_the_keys_that_there_are():
    from PulmonaryEmbolismLib.keys import KEYS, table

    assert table() in (MODULE.parent / "README.md").read_text("utf-8")
    sequences = [sequence.lower() for key in KEYS for sequence in key.sequences]
    assert len(set(sequences)) == len(sequences)


def test_no_key_is_one_of_slicers_own():
    """From Slicer's user guide, chapters user interface and Segment Editor (5.8)."""
    from PulmonaryEmbolismLib.keys import KEYS

    views = {"left", "right", "up", "down", "b", "f", "v", "r", "g", "t", "[", "]", "{", "}"}
    editor = {*"1234567890", *(f"shift+{n}" for n in range(10)), "q", "w", "z", "y", "i", "x", "a", "esc", "space",
              "+", "-", "return"}  # fmt: skip
    application = {f"ctrl+{key}" for key in ("f", "o", "s", "w", "0", "1", "2", "3", "4", "5", "h", "b", "g", "`")}
    taken = views | editor | application
    assert not {sequence.lower() for key in KEYS for sequence in key.sequences} & taken


# --- the checks of Slicer's Extensions Index (ExtensionsIndex, scripts/check_description_files.py, and its reviewers)


def entry():
    return json.loads((MODULE.parent / "PulmonaryEmbolism.json").read_text())


def cmake():
    """The CMakeLists.txt in the repository's root, which the Index builds: its variables."""
    text = (ROOT / "CMakeLists.txt").read_text()
    return text, dict(re.findall(r'set\(EXTENSION_(\w+) "(.*?)"\)', text))


def test_the_entry_is_built_from_the_repositorys_root():
    found = entry()
    assert found["build_subdirectory"] == "."  # another folder means the inner build of a superbuild
    assert found["build_dependencies"] == []
    assert found["scm_url"].startswith("https://")
    assert found["scm_url"].endswith(".git")
    assert (found["category"], found["tier"]) == ("Active Learning", 1)
    text, _ = cmake()
    for folder in re.findall(r"add_subdirectory\((.*?)\)", text):
        assert (ROOT / folder / "CMakeLists.txt").is_file()


def test_entry_project_and_module_have_one_name_which_does_not_begin_with_slicer():
    text, _ = cmake()
    name = re.search(r"project\((\w+)\)", text).group(1)
    assert name == "PulmonaryEmbolism"
    assert (MODULE.parent / f"{name}.json").is_file()
    assert (MODULE / f"{name}.py").is_file()


def test_a_repository_without_slicer_in_its_name_asks_for_the_exception():
    repository = entry()["scm_url"].rsplit("/", 1)[1].lower()
    assert "slicer" in repository or "exception" in (MODULE.parent / "README.md").read_text("utf-8")


def test_the_extension_has_its_metadata_and_its_pictures_exist():
    _, extension = cmake()
    assert {"HOMEPAGE", "CATEGORY", "CONTRIBUTORS", "DESCRIPTION", "ICONURL", "SCREENSHOTURLS", "DEPENDS"} <= {
        *extension
    }
    assert extension["CATEGORY"] == entry()["category"]
    for address in [extension["ICONURL"], *extension["SCREENSHOTURLS"].split()]:
        assert address.startswith("https://raw.githubusercontent.com/")
        assert (ROOT / address.split("/main/")[1]).is_file(), address
    for picture in (MODULE.parent / "Screenshots").glob("*.png"):
        assert picture.stat().st_size < 200_000, picture.name


def test_the_homepage_says_licence_citation_modules_tutorial_and_what_is_sent():
    text = (MODULE.parent / "README.md").read_text("utf-8")
    assert "Apache" in (ROOT / "LICENSE").read_text()
    for heading in ("## Tutorial", "## What is sent where", "## Licence and citation", "## Install"):
        assert heading in text
    assert "![" in text
