"""Eight readers and a batch inference in another process: nothing lost, nothing reverted, and how long they wait."""

from __future__ import annotations

import threading
import time

import numpy as np

from campaign.journal import Journal, clients_at_work, pause
from campaign.saves import state
from campaign.world import STUDIES, Row, World, Zygote, world_of
from pe_app.common.progress import Progress, ProgressCallback

READERS = 8
THINK_SECONDS = 0.4
"""The longest a reader waits between two requests, drawn anew each time: many times busier than people."""
CHECK_SECONDS = 10.0


def crowd(zygote: Zygote, seed: int, seconds: float, report: ProgressCallback) -> Row:
    """Readers save reviews, labels and study labels while a batch saves labels from a process of its own."""
    row = Row("readers", f"{READERS} readers and batch inference in another process for {seconds:.0f} s")
    with world_of(zygote, "readers") as world:
        world.start()
        journal, info, batches = Journal(world), Info(world), 0
        info.start()
        with clients_at_work(journal, READERS, np.random.default_rng((seed, 4))) as clients:
            for client in clients:
                client.think_seconds = THINK_SECONDS
                client.weights |= {"infer": 1}
            world.open.set()
            begun = checked = time.monotonic()
            while (now := time.monotonic()) - begun < seconds:
                if world.request("GET", "/batch/infer?check_if_running=true").status_code != 200:
                    batches += world.request("POST", "/batch/infer/candidates", json={}).ok
                if now - checked > CHECK_SECONDS:
                    pause(clients)
                    row.failures += journal.wrong()
                    world.open.set()
                    checked = now
                report(Progress("readers and a batch", int(now - begun), int(seconds), f"{len(journal.saves)} saves"))
                time.sleep(0.5)
            pause(clients)
        info.stopped.set()
        info.join(60)
        _wait_for_the_batch(world)
        row.failures += journal.wrong() + journal.missing_versions() + info.failures
        row.failures += [f"{client.name}: {answer}" for client in clients for answer in client.unexpected]
        row.tried = len(journal.acknowledged())
        entries = world.request("GET", "/datastore/?output=all").json()["objects"]
        in_another = sum("original" in entries[study]["labels"] for study in STUDIES)
        if not in_another:
            row.failures.append(f"the batch saved nothing under its tag: {[*entries[STUDIES[0]]['labels']]}")
        if left := world.temporary():
            row.failures.append(f"left in the temporary folder: {left[:3]}")
        before = state(world)
        world.kill()
        world.start()
        if state(world) != before:
            row.failures.append("after a restart the state is another")
        saves = [second for client in clients for second in client.seconds]
        row.figures = (
            f"lost or reverted {sum('shows' in failure or 'not kept' in failure for failure in row.failures)}; "
            f"save {milliseconds(saves)}, GET /info/ {milliseconds(info.seconds)}; {batches} batches of {len(STUDIES)}"
        )
    return row


class Info(threading.Thread):
    """Asks for /info/ five times a second and keeps how long it took."""

    def __init__(self, world: World) -> None:
        super().__init__(name="info", daemon=True)
        self.world = world
        self.stopped = threading.Event()
        self.seconds: list[float] = []
        self.failures: list[str] = []

    def run(self) -> None:
        """Ask until stopped."""
        while not self.stopped.wait(0.2):
            begun = time.monotonic()
            answer = self.world.request("GET", "/info/")
            self.seconds.append(time.monotonic() - begun)
            if not answer.ok:
                self.failures.append(f"/info/: {answer.status_code} {answer.text[:200]}")


def milliseconds(seconds: list[float]) -> str:
    """Median and 99th percentile."""
    if not seconds:
        return "none"
    p50, p99 = 1000 * np.percentile(seconds, [50, 99])
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms"


def _wait_for_the_batch(world: World) -> None:
    latest = time.monotonic() + 120
    while world.request("GET", "/batch/infer?check_if_running=true").status_code == 200 and time.monotonic() < latest:
        time.sleep(0.2)
