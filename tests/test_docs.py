"""What the documentation shows: its commands are valid, its Python runs, and its tutorial works as written."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from small_studies import CLASSIFIER, ENCODER, SLABS, small_studies
from typer.testing import CliRunner

import pe_app
from pe_app.cli import app
from pe_app.common.extras import EXTRAS
from pe_app.ct.slabs import SlabConfig
from pe_app.model.detector import Detector
from pe_app.phantom import PhantomConfig, make_phantom
from pe_app.studies import write_studies
from pe_app.training.stages import EncoderTraining, train_encoder

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slicer_module" / "README.md"]
GROUP = typer.main.get_command(app)

RUN_ELSEWHERE = {
    "serve": "runs until it is stopped: tests/app",
    "watch": "runs until it is stopped: tests/results/test_arrivals.py",
    "import": "needs an export: tests/pacs/test_importing.py",
    "import-dataset": "needs a download: tests/public_data",
    "recipe": "needs downloads and hours: tests/research",
    "detect": "needs studies: tests/cli/test_cli.py, tests/results/test_batch.py",
    "label-reports": "needs reports: tests/cli/test_cli.py",
    "calibrate": "tests/training/test_calibration.py",
    "encode": "tests/training/test_distributed.py",
    "compare": "hours: tests/research/test_comparison.py",
    "bench": "minutes: tests/research/test_bench.py",
    "demo": "tests/app, make demo",
    "doctor": "tests/cli/test_options.py",
    "phantom": "here, as the tutorial has it, and tests/phantom",
    "train": "here, as the tutorial has it, and tests/cli/test_cli.py",
    "evaluate": "here, as the tutorial has it, and tests/evaluation",
    "import-seg": "tests/annotation/test_dicom_seg.py",
    "export-seg": "tests/results/test_dicom.py",
    "export-bundle": "tests/model/test_bundle.py",
    "labels": "tests/app",
    "models": "tests/app",
    "tokens": "tests/app",
    "backup": "tests/app/test_store_damage.py",
    "restore": "tests/app/test_store_damage.py",
    "check": "tests/app/test_store_damage.py",
}
"""Why a documented command does not run here word by word: each is checked for valid verbs and options, though."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Page and command line, comments and continuation lines resolved."""
    found = []
    for page in PAGES:
        for block in [*blocks(page, ""), *blocks(page, "sh"), *blocks(page, "bash")]:
            joined = block.replace("\\\n", " ")
            found += [(page.name, line.strip()) for line in joined.splitlines() if line.strip().startswith("pe-app ")]
    return found


def words_of(line: str) -> list[str]:
    line = re.split(r"\s#|\s{3,}", line)[0]
    return [word for word in shlex.split(line)[1:] if word != "..." and not word.startswith((">", "|", "&"))]


def check(words: list[str]) -> str:
    """The verb, after all words were parsed as the command line would."""
    group, command, rest = GROUP, None, words
    while rest and hasattr(group, "list_commands"):
        context = typer.Context(group)
        command = group.get_command(context, rest[0])
        if command is None:
            break
        group, rest = command, rest[1:]
    if not words[0].startswith("-"):
        assert command is not None, f"no such verb: {words}"
        command.make_context("x", list(rest), resilient_parsing=True)  # unknown options raise
    return words[0]


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_documented_command_names_verbs_and_options_that_exist(page, line):
    verb = check(words_of(line))
    assert verb.startswith("-") or verb in RUN_ELSEWHERE, f"{page}: say where {verb} is run"


def test_the_containers_start_commands_that_exist():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert check(shlex.split(compose["services"]["server"]["command"])) == "serve"
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["pe-app"]' in docker
    for extra in re.search(r"/src\[([\w,]+)\]", docker)[1].split(","):
        assert extra in EXTRAS


def test_pages_link_to_pages_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#|mailto)([^)#]+)", page.read_text(encoding="utf-8")):
            generated = target.startswith("reference/")
            assert generated or (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_of_the_readme_are_absolute_and_lead_to_files_of_the_repository():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!http|#)[^)]+\)", text) == []
    for path in re.findall(r"github(?:usercontent)?\.com/pe-app/pe-app/(?:blob/)?main/([^)#]+)", text):
        assert (ROOT / path).exists(), path


@pytest.fixture
def workplace(tmp_path, write_series, monkeypatch):
    """A folder with what the documented Python expects, small."""
    volume = make_phantom(np.random.default_rng(8), PhantomConfig(matrix=128, spacing_mm=4.0), positive=True).volume
    (dz, dy, dx), (x, y, z) = volume.spacing_mm, volume.affine[:3, 3]
    positions = np.array([(x, y, z + dz * k) for k in range(len(volume.voxels))])
    stored = (volume.voxels.astype(np.int32) + 1024).astype(np.uint16)
    write_series(stored, positions, tmp_path / "scan", PixelSpacing=[dy, dx])
    write_studies(small_studies(tmp_path / "volumes", count=6), tmp_path / "studies.csv")
    slabs = SlabConfig(matrix=128, crop=64, slab_count=10)
    Detector.untrained(0, slabs, ENCODER, CLASSIFIER).save(tmp_path / "model.safetensors")
    monkeypatch.setattr("pe_app.model.detect.default_model", lambda: tmp_path / "model.safetensors")

    def small_training(studies, out):
        settings = EncoderTraining(epochs=1, batch=4, precision="float32")
        return train_encoder(studies, out, settings=settings, slabs=SLABS, network=ENCODER, classifier=CLASSIFIER)

    monkeypatch.setitem(vars(pe_app), "train_encoder", small_training)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NOT_RUN = {"MONAILabelClient(": "needs a server with a token: tests/app/test_app_access.py does the same"}
"""Python that does not run here, by a part of it, with the reason."""

PYTHON = [
    (page.name, block)
    for page in PAGES
    for block in blocks(page, "python")
    if not any(part in block for part in NOT_RUN)
]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{name}{k}" for k, (name, _) in enumerate(PYTHON)])
def test_documented_python_runs(workplace, page, block, capsys):
    exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out.strip()
    if page == "README.md":
        assert (workplace / "attention.nrrd").is_file()
        assert (workplace / "encoder.safetensors").is_file()


def test_the_readme_begins_with_python():
    assert re.search(r"^```(\w*)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == "python"


def test_the_tutorial_works_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for name, line in commands() if name == "tutorial.md"]
    mine = [line for line in lines if words_of(line)[0] in ("phantom", "train", "evaluate")]
    assert len(mine) == 4
    for line in mine:
        done = CliRunner().invoke(
            app, [*words_of(line), *(["--workers", "1"] if words_of(line)[0] == "phantom" else [])]
        )
        assert done.exit_code == 0, f"{line}: {done.output} {done.exception}"
    assert (tmp_path / "evaluation" / "index.html").is_file()
    assert (tmp_path / "encoder.run" / "settings.toml").is_file()


def test_the_generated_reference_has_every_command_and_public_name():
    sys.path.insert(0, str(ROOT / "docs"))
    import hooks

    shown = hooks.command_line()
    for command in ("pe-app detect", "pe-app train encoder", "pe-app tokens add", "pe-app recipe public"):
        assert f"## {command}\n" in shown
    assert "--attention-weight" in shown
    assert all(f"## {name}\n" in hooks.python() for name in ("detect", "Detector", "InputError"))
    assert "pe-detection" in hooks.schemas()
