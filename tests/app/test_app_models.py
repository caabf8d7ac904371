"""The models of a store: checked before they are kept, one served, a former one taken back."""

import json
import threading

import pytest
from small_studies import CLASSIFIER, ENCODER, SLABS
from typer.testing import CliRunner

from pe_app.cli import app as command_line
from pe_app.common.errors import InputError
from pe_app.model.detector import Detector
from pe_monailabel.store.models import Models


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four models of different weights, as files."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        Detector.untrained(seed, SLABS, ENCODER, CLASSIFIER).save(folder / f"{seed}.safetensors")
    return [folder / f"{seed}.safetensors" for seed in range(4)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "studies" / ".pe" / "models"


@pytest.fixture
def models(folder, files):
    return Models(folder, files[0])


def sha256(path):
    return Detector.load(path).sha256


def names(models):
    return [entry.model.sha256 for entry in models.kept()]


def test_the_model_that_the_server_was_started_with_is_served_until_one_is_published_and_kept_then(models, files):
    assert models.current().sha256 == sha256(files[0])
    assert models.kept() == ()
    before = models.current()
    models.publish(files[1])
    assert models.current().sha256 == sha256(files[1])
    assert before.sha256 == sha256(files[0]), "a detection that runs keeps its model"
    assert set(names(models)) == {sha256(files[0]), sha256(files[1])}
    assert [entry.model.sha256 for entry in models.kept() if entry.served] == [sha256(files[1])]


def test_a_restart_and_another_process_serve_what_was_published(models, folder, files):
    other = Models(folder, files[0])
    assert other.current().sha256 == sha256(files[0])
    models.publish(files[1])
    assert other.current().sha256 == sha256(files[1])
    assert Models(folder, files[3]).current().sha256 == sha256(files[1])


def test_rolling_back_serves_the_models_before_one_after_another(models, files):
    with pytest.raises(InputError, match="no other model"):
        models.rollback()
    for path in files[1:]:
        models.publish(path)
    for path in (files[2], files[1], files[0]):
        assert models.rollback().model.sha256 == sha256(path)
        assert models.current().sha256 == sha256(path)
    with pytest.raises(InputError, match="no other model"):
        models.rollback()
    models.publish(files[3])
    assert models.current().sha256 == sha256(files[3])
    assert len(names(models)) == 4, "nothing that was kept goes"


def test_a_pinned_model_stays_when_others_are_published(models, files):
    models.publish(files[1])
    models.publish(files[2])
    pinned = models.pin(sha256(files[1])[:8])
    assert pinned.model.sha256 == sha256(files[1])
    models.publish(files[3])
    assert models.current().sha256 == sha256(files[1])
    assert sha256(files[3]) in names(models)
    models.unpin()
    assert models.current().sha256 == sha256(files[1])
    models.publish(files[2])
    assert models.current().sha256 == sha256(files[2])


def test_what_the_server_was_started_with_can_be_pinned(models, folder, files):
    models.pin()
    models.publish(files[1])
    assert Models(folder, files[2]).current().sha256 == sha256(files[0])


def test_a_name_must_mean_one_model(models, files):
    models.publish(files[1])
    for name in ("ffffffffffff", "0", "../x"):  # version 0 is that of every untrained model
        with pytest.raises(InputError, match=r"called"):
            models.pin(name)


def test_weights_that_are_broken_or_no_model_change_nothing(models, files, tmp_path):
    models.publish(files[1])
    whole = files[2].read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + header_bytes])
    shrunk = json.dumps({**header, "__metadata__": {"detector": "{}"}}).encode()
    bad = {
        "cut off": whole[:-100],
        "empty": b"",
        "a pickle": b"\x80\x04K\x01.",
        "settings of another program": len(shrunk).to_bytes(8, "little") + shrunk + whole[8 + header_bytes :],
        "a header that lies": (2**62).to_bytes(8, "little") + whole[8:],
    }
    before = names(models)
    for what, content in bad.items():
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError, match="model"):
            models.publish(path)
        assert (models.current().sha256, names(models)) == (sha256(files[1]), before), what
    with pytest.raises(InputError):
        models.publish(tmp_path / "nowhere.safetensors")


def test_a_kept_model_that_was_changed_is_passed_over_for_the_one_before(models, folder, files):
    models.publish(files[1])
    models.publish(files[2])
    (folder / f"{sha256(files[2])}.safetensors").write_bytes(files[3].read_bytes())
    assert Models(folder, files[0]).current().sha256 == sha256(files[1])
    (folder / f"{sha256(files[1])}.safetensors").unlink()
    assert Models(folder, files[0]).current().sha256 == sha256(files[0])


def test_damaged_words_on_what_is_served_do_not_stop_a_server(models, folder, files):
    models.publish(files[1])
    (folder / "served.json").write_text('{"models": ')
    assert models.current().sha256 == sha256(files[1])
    assert Models(folder, files[0]).current().sha256 == sha256(files[0])


def test_whoever_asks_during_a_switch_gets_one_of_the_two_models(models, files):
    models.publish(files[1])
    seen, done = set(), threading.Event()

    def ask():
        while not done.is_set():
            seen.add(models.current().sha256)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(5):
        models.publish(files[2])
        models.rollback()
    done.set()
    asking.join()
    assert seen <= {sha256(files[1]), sha256(files[2])}


def test_the_command_line_lists_adds_pins_and_rolls_back(tmp_path, files):
    studies = tmp_path / "studies"
    studies.mkdir()

    def say(*words):
        answer = CliRunner().invoke(command_line, ["models", words[0], str(studies), *map(str, words[1:])])
        if answer.exception and not isinstance(answer.exception, SystemExit):
            raise answer.exception
        return answer.output

    assert "No model was published" in say("list")
    for path in files[1:3]:
        assert sha256(path)[:12] in say("add", path)
    assert [line.endswith("*") for line in say("list").splitlines() if sha256(files[2])[:12] in line] == [True]
    assert sha256(files[1])[:12] in say("rollback")
    assert sha256(files[2])[:12] in say("pin", sha256(files[2])[:12])
    assert "* pinned" in say("list")
    say("unpin")
    assert "pinned" not in say("list")
    with pytest.raises(InputError, match="nowhere"):
        say("pin", "nowhere")
    with pytest.raises(InputError, match="no such folder"):
        CliRunner().invoke(command_line, ["models", "list", str(tmp_path / "x")], catch_exceptions=False)
