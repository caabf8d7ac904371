"""What users see is plain English with the field's terms: help, pages, documentation, messages, Slicer's texts."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BANNED = {
    r"\bno finding\b": "not a clinical result",
    r"\bmeaningless\b": "not for clinical use",
    r"\b(is|are|was|were|be|been|being|not) told\b(?! apart)|\btold (of|that|when|to)\b": "reported, shown, given",
    r"\ba line a (study|slice|series)\b": "one line per study",
    r"\b(slabs|studies|items) a step\b": "per step",
    r"\b[GM]B a study\b|\bslabs a study\b": "per study",
    r"\bone a (core|study|file|patient)\b": "one per core",
    r"\bgo(es)? on where\b|\bwhere it was interrupted\b": "resumes if interrupted",
    r"\bstudy (at|in) hand\b": "the study in progress",
    r"\bknown already\b|\bknown from before\b": "unchanged, skipped",
    r"\bevery other one with why\b": "reports why each other series was skipped",
    r"\blook at slice\b": "candidate at slice",
    r"\bat the height of\b|\bheights of\b": "level",
    r"\bfrom the front\b": "coronal projection",
    r"\bhear what\b": "update the detection",
    r"\bwhat was said\b|\bcannot be said\b|\bis said\b|\bwas said\b|\bare said\b": "reported; the mark; indeterminate",
    r"\bmodel says\b|\bsays of\b|\bsaid of\b": "reports; the model's result",
    r"\bso many of\b|\bso many (slices|studies|days|cells|HU)\b": "this many",
    r"\bcalled positive\b|\bshare truly\b|\bprobability said\b": "observed frequency; mean predicted probability",
    r"\bfeign(s|ed)?\b": "mimic",
    r"\bslopes\b": "gradients",
    r"\bnumber formats?\b": "dtype",
    r"\btwins\b": "matched pairs",
    r"\bpainted\b": "inserted",
    r"\bis no DICOM\b|\bno valid\b": "is not a DICOM file; invalid",
}
"""What is not written, and what is instead (the table "Words" of the project's design)."""

ALLOWED = {
    "painted": ("slicer_module",),  # there it is what the reader does with a brush
}
"""Words that are right in some places."""


def pages() -> Iterator[tuple[str, str]]:
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "slicer_module" / "README.md"]
    paths += [*(ROOT / "pe_app").rglob("*.md"), *(ROOT / "pe_app").rglob("*.html*"), *(ROOT / "pe_app").rglob("*.j2")]
    for path in paths:
        if path.name not in ("CONTRIBUTING.md", "CHANGELOG.md"):  # these name the words themselves
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield f"{path.relative_to(ROOT)}:{number}", line


def docstrings(tree: ast.AST) -> set[int]:
    """Nodes that no user sees; the help of a verb is seen, and is looked at apart."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body
            for each in body:
                if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                    found.add(id(each.value))
    return found


def literals() -> Iterator[tuple[str, str]]:
    for folder in ("pe_app", "apps", "slicer_module"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            hidden = docstrings(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def helps() -> Iterator[tuple[str, str]]:
    """First docstrings of the verbs, and of settings, whose lines become the help of options."""
    places = [*(ROOT / "pe_app" / "cli").rglob("*.py"), *(ROOT / "apps").glob("*/cli/*.py")]
    settings = ("EncoderTraining", "ClassifierTraining", "FineTuning", "SlabConfig", "EncoderConfig")
    for path in places + list((ROOT / "pe_app").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            own = isinstance(node, ast.FunctionDef) and path in places and not node.name.startswith("_")
            if own or (
                isinstance(node, ast.ClassDef)
                and node.name in (*settings, "ClassifierConfig", "AttentionLoss", "Augmentation")
            ):
                text = re.sub(
                    r"^ {4}\w+:", "", ast.get_docstring(node) or "", flags=re.MULTILINE
                )  # names of fields stay
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def forms() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "slicer_module").rglob("*.ui"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{number}", line


@pytest.mark.parametrize("source", [pages, literals, helps, forms], ids=lambda source: source.__name__)
def test_no_user_sees_a_word_that_must_be_translated(source):
    found = []
    for place, text in source():
        for pattern, instead in BANNED.items():
            match = re.search(pattern, " ".join(text.split()), re.IGNORECASE)
            if match and not place.startswith(ALLOWED.get(match[0].lower(), ("\0",))):
                found.append(f"{place}: {match[0]!r}, write: {instead} ({' '.join(text.split())[:140]})")
    assert found == []
