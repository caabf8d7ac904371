"""A slice of the fault campaign: the real server killed, starved and lied to. ``make campaign`` runs all of it."""

import sys

import pytest
from campaign import disk, inputs, kills, rows
from campaign.journal import Journal, Save
from campaign.world import zygote_in

from pe_app.common.progress import silent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, mounts and traces as Linux has them")

SEED = 7


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with zygote_in(tmp_path_factory.mktemp("campaign")) as preloaded:
        yield preloaded


def holds(*found):
    """No row failed, and each tried something."""
    print(f"seed {SEED}", *(f"{row.what}: {row.tried} tried, {row.figures}" for row in found), sep="\n")
    assert [failure for row in found for failure in row.failures] == []
    assert all(row.tried for row in found)


def test_no_acknowledged_save_is_lost_when_the_server_is_killed_at_random_moments(zygote):
    holds(kills.random_kills(zygote, SEED, 4, silent))


def test_a_save_that_is_killed_at_any_step_is_the_former_or_the_new_one_and_survives_a_power_cut(zygote):
    holds(*kills.every_step(zygote, 30, silent))


def test_a_start_that_is_killed_at_any_step_can_be_repeated(zygote):
    holds(kills.start_steps(zygote, 25, silent))


def test_a_full_disk_is_said_and_changes_nothing(zygote):
    holds(*disk.full_disk(zygote, silent, every=4))


def test_bad_inputs_are_refused_in_words_and_leave_nothing(zygote):
    holds(*inputs.bad_inputs(zygote, SEED, 0.03, silent))


def test_what_the_stock_server_did_wrong_this_one_does_right(zygote):
    holds(*rows.table(zygote, {}, silent, [probe for probe in rows.QUICK if not probe.trains]))


@pytest.mark.parametrize(
    ("shown", "right"),
    [("first", False), ("second", True), ("third", True), ("refused", False), ("elsewhere", False), (None, False)],
)
def test_the_journal_knows_what_may_be_shown_after_a_crash(shown, right, monkeypatch):
    journal = Journal(None, [
        Save("label", "study0", "first", sent=1, ended=2, acknowledged=True),
        Save("label", "study0", "second", sent=3, ended=4, acknowledged=True),
        Save("label", "study0", "third", sent=5, ended=6),  # its connection broke: saved or not
        Save("label", "study0", "refused", sent=5, ended=6, refused=True),
    ])  # fmt: skip
    monkeypatch.setattr(Journal, "index", lambda _: {"study0": {}})
    monkeypatch.setattr(Journal, "shown", lambda *_: shown)
    assert (journal.wrong() == []) == right


def test_a_save_that_is_renamed_before_it_is_synced_does_not_survive_a_power_cut():
    written = [["open", "/a/.tmp"], ["sync", "/a/.tmp"], ["os.rename", "/a/.tmp", "/a/file"], ["sync", "/a"]]
    assert kills.not_durable(written) == []
    assert kills.not_durable(written[:1] + written[2:]) != []
    assert kills.not_durable(written[:-1]) != []
    assert kills.not_durable([["os.mkdir", "/a/b"], *written]) == []
    assert kills.not_durable([*written, ["os.mkdir", "/a/b"]]) != []
