"""SIGKILL at random moments and at every step of every kind of save; what a power cut would leave."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import requests

from campaign.journal import Journal, clients_at_work, pause
from campaign.saves import kinds_of_save, state
from campaign.world import Row, World, Zygote, world_of
from pe_app.common.progress import Progress, ProgressCallback

CLIENTS = 8
LONGEST_LIFE = 3.0
TRAINING = {"epochs": 50, "batch": 2, "matrix": 64, "crop": 64, "slab_count": 6, "width": 8, "filters": 4}


def random_kills(zygote: Zygote, seed: int, kills: int, report: ProgressCallback) -> Row:
    """Kill the server at random moments while 8 clients work, every sixth time while it starts.

    A life lasts until a random number of saves is acknowledged and a random moment more, so that a busy machine takes
    longer but tries as much.
    """
    row = Row("kills", f"SIGKILL at random moments, {CLIENTS} clients save, train and infer")
    rng = np.random.default_rng((seed, 1))
    starts, refused = [], 0
    with world_of(zygote, "kills") as world:
        journal = Journal(world)
        world.start()
        with clients_at_work(journal, CLIENTS, rng) as clients:
            for life in range(kills):
                if life % 10 == 1:
                    _post(world, "/train/encoder", {**TRAINING, "synthetic": True})
                elif life % 10 == 6:
                    _post(world, "/batch/infer/candidates", {})
                enough, latest = len(journal.acknowledged()) + rng.integers(0, 12), time.monotonic() + LONGEST_LIFE
                world.open.set()
                while len(journal.acknowledged()) < enough and time.monotonic() < latest:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.05))
                world.open.clear()
                world.kill()
                pause(clients)
                report(Progress("kill the server", life + 1, kills, f"{len(journal.acknowledged())} saves"))
                if life % 6 == 5:
                    world.spawn()
                    time.sleep(rng.uniform(0, 0.25))
                    world.kill()
                world.spawn()
                seconds = world.wait_until_up()
                if not row.check(seconds is not None, f"kill {life}: the server refused to start: {world.log_tail()}"):
                    refused += 1
                    break
                starts.append(seconds)
                row.failures += [f"kill {life}: {wrong}" for wrong in journal.wrong()]
            pause(clients)
        if left := world.temporary():
            row.failures.append(f"killed servers left temporary files: {left[:3]}")
        row.failures += journal.missing_versions()
        row.failures += [f"{client.name}: {answer}" for client in clients for answer in client.unexpected]
        kept = journal.acknowledged()
        cut = sum(not save.acknowledged and not save.refused for save in journal.saves)
        figures = (
            f"{len(kept)} saves acknowledged, {cut} cut off, {len(journal.saves) - len(kept) - cut} conflicts; lost "
            f"{sum('shows' in f or 'not kept' in f for f in row.failures)}, starts refused {refused}; "
            f"start {np.median(starts):.2f} s (slowest {max(starts):.2f}, forked from a preloaded process)"
        )
        row.figures = figures
    return row


def every_step(zygote: Zygote, stride: int, report: ProgressCallback) -> tuple[Row, Row]:
    """Kill the server before every ``stride``-th step of every kind of save; check the order of syncs and renames."""
    row = Row("kills", "SIGKILL before every step (open, sync, rename, link, remove) of every kind of save")
    durable = Row("kills", "power cut: synced before renamed, folder synced before the answer")
    with world_of(zygote, "steps") as world:
        world.start()
        saves = kinds_of_save(world)
        trace = world.folder / "trace"
        armed = world.folder / "armed"
        for number, save in enumerate(saves):
            world.kill()
            trace.unlink(missing_ok=True)
            world.start(folder=str(world.studies), armed=str(armed), die_at=0, trace=str(trace))
            armed.touch()
            answer = save.send("first")
            armed.unlink()
            row.check(answer.ok, f"{save.what}: {answer.status_code} {answer.text[:200]}")
            steps = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
            for failure in not_durable(steps):
                durable.failures.append(f"{save.what}: {failure}")
            durable.tried += sum(step[0] in ("os.rename", "os.mkdir") for step in steps)
            for die_at in range(1, len(steps) + 2, stride):
                report(Progress("kill at every step", number, len(saves), f"{save.what}, step {die_at}"))
                world.kill()
                world.start(folder=str(world.studies), armed=str(armed), die_at=die_at, trace="")
                former = save.shown()
                armed.touch()
                acknowledged = False
                try:
                    acknowledged = save.send(f"step {die_at}").ok
                except requests.RequestException:
                    world.ended(10)
                armed.unlink()
                world.kill()
                world.spawn()
                if not row.check(
                    world.wait_until_up() is not None, f"{save.what}, step {die_at}: no start: {world.log_tail()}"
                ):
                    return row, durable
                now, wanted = save.shown(), save.content(f"step {die_at}")
                if now != wanted and (acknowledged or now != former):
                    row.failures.append(f"{save.what}, step {die_at}: shows {now}, was {former}, sent {wanted}")
        row.figures = (
            f"{len(saves)} kinds of save; every {stride}. step" if stride > 1 else f"{len(saves)} kinds of save"
        )
        durable.figures = f"{durable.tried} renames and new folders traced"
    return row, durable


def start_steps(zygote: Zygote, stride: int, report: ProgressCallback) -> Row:
    """Kill the server before every step of a start that has to rebuild the index."""
    row = Row("kills", "SIGKILL before every step of a start that rebuilds the index")
    with world_of(zygote, "starts") as world:
        world.start()
        for save in kinds_of_save(world):
            save.send("kept").raise_for_status()
        before = state(world)
        index = world.studies / "datastore_v2.json"
        whole = index.read_bytes()
        for damage in (b"", whole[: len(whole) // 2]):
            die_at = 1
            while True:
                report(Progress("kill at every step of a start", die_at, 0, f"index of {len(damage)} bytes"))
                world.kill()
                index.write_bytes(damage)
                world.spawn({"folder": str(world.studies), "armed": "", "die_at": die_at, "trace": ""})
                up = world.wait_until_up() is not None
                world.kill()
                world.spawn()
                if not row.check(world.wait_until_up() is not None, f"step {die_at}: no start: {world.log_tail()}"):
                    return row
                if (now := state(world)) != before:
                    row.failures.append(f"step {die_at}: shows {now}, was {before}")
                if up:
                    break
                die_at += stride
    return row


def not_durable(steps: list[list[str]]) -> list[str]:
    """What of a traced request a power cut could undo after its answer, or leave half."""
    failures, dirty, unsynced = [], set(), {}
    for event, *paths in steps:
        path = paths[-1]
        if event == "open":
            dirty.add(path)
        elif event == "sync":
            dirty.discard(path)
            unsynced.pop(path, None)
        elif event == "os.rename":
            if paths[0] in dirty:
                failures.append(f"{Path(path).name} is renamed before it is synced")
            unsynced[str(Path(path).parent)] = path
        elif event == "os.mkdir":
            unsynced[str(Path(path).parent)] = path
    return failures + [
        f"{folder} is not synced after {Path(path).name} came into it" for folder, path in unsynced.items()
    ]


def _post(world: World, path: str, body: object) -> None:
    try:
        world.request("POST", path, json=body)
    except requests.RequestException:
        return
