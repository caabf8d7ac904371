"""The options that verbs share or that are made from settings."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import typer

from pe_app.cli import app
from pe_app.common.settings import flat
from pe_app.ct.slabs import SlabConfig
from pe_app.training.stages import ClassifierTraining, EncoderTraining


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pe_app", *map(str, arguments)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=250)


def commands(group, prefix=()):
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_every_option_has_a_help_text(words):
    command = COMMANDS[words]
    assert command.help
    assert [p.name for p in command.params if not getattr(p, "help", None) and p.name not in ("port",)] == []


@pytest.mark.parametrize(
    ("words", "settings", "derived"),
    [
        (("train", "encoder"), (EncoderTraining(), SlabConfig()), {"augment", "workers"}),
        (("train", "classifier"), (ClassifierTraining(),), {"workers"}),
    ],
)
def test_training_has_an_option_for_every_field_with_its_default(words, settings, derived):
    options = {p.name: p for p in COMMANDS[words].params}
    for each in settings:
        for one in flat(each):
            if one.name not in derived and one.path[0] != "augmentation":
                assert options[one.name].default == one.value, one.name
    assert {f.name for f in fields(SlabConfig)} <= {one.name for one in flat(SlabConfig())}


def test_the_short_help_and_the_groups_of_verbs():
    shown = run("-h").stdout
    for text in ("Detect embolism", "Prepare studies", "This installation", "--install-completion"):
        assert text in shown


def test_a_verb_that_runs_the_networks_refuses_a_device_that_is_not_there(tmp_path):
    done = run("doctor", "--device", "cuda:7")
    assert done.returncode == 2
    assert "pe-app: device cuda:7" in done.stderr


def test_doctor_reports_versions_device_threads_model_disk_and_extras():
    import torch

    done = run("doctor", "--json", "--threads", 1)
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found["torch"] == torch.__version__
    assert found["threads"].startswith("1 of ")
    assert found["model"].startswith("starter ")
    assert "demo_model" in found["model"]
    assert {"device", "free disk here", "extra server", "extra dicom", "extra tensorboard"} <= found.keys()


def test_settings_of_a_file_hold_unless_an_option_replaces_them(tmp_path):
    (tmp_path / "settings.toml").write_text('epochs = 7\nprecision = "float16"\n')
    done = run("train", "encoder", "--settings", tmp_path / "settings.toml", "--studies", "x.csv", "--out", "x")
    assert done.returncode == 2
    assert "float16" in done.stderr  # of the file, and refused as an option's value is
    done = run(
        *("train", "encoder", "--settings", tmp_path / "settings.toml", "--precision", "float32"),
        *("--studies", "nowhere.csv", "--out", "x"),
    )
    assert "nowhere.csv" in done.stderr  # the option replaces it: on to the studies


def test_a_settings_file_of_another_command_is_refused(tmp_path):
    (tmp_path / "settings.toml").write_text("hu_window = [0, 1]\n")
    done = run(
        *("train", "classifier", "--settings", tmp_path / "settings.toml", "--studies", "x.csv"),
        *("--encoder", "x", "--out", "x"),
    )
    assert done.returncode == 2
    assert "hu_window is not an option of this command" in done.stderr
