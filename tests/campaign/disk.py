"""A full disk: what fails is said, what counted still counts, and with space it works again."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests

from campaign.saves import KindOfSave, kinds_of_save, state
from campaign.world import Row, World, Zygote, chest, snapshot, world_of
from pe_app.common.progress import Progress, ProgressCallback
from pe_app.ct.volume_io import write_volume

LEFT_KIB = (0, 4, 8, 12, 16, 24, 40)
"""What is left on the disk; a save takes about ten files of one page each."""
LIMITS = (0, 60, 300, 900, 2000)
"""Bytes at which a file cannot grow further, where nothing is mounted and for writes that end half way."""


def full_disk(zygote: Zygote, report: ProgressCallback, every: int = 1) -> list[Row]:
    """Every kind of save on a disk that is full at different places."""
    rows = []
    with tmpfs(zygote.work / "disk") as mounted:
        if mounted is not None:
            row = Row("disk", "tmpfs with 0 to 40 KiB left: every kind of save, reading, starting")
            with world_of(zygote, "full", mounted) as world:
                _try_all(world, row, LEFT_KIB[::every], lambda left: ballast(mounted, left), report)
                _start_on_full_disk(world, row, mounted)
            rows.append(row)
    row = Row("disk", "files that cannot grow (RLIMIT_FSIZE of 0 to 2000 bytes): every kind of save")
    with world_of(zygote, "limited") as world:
        _try_all(world, row, LIMITS[::every], lambda limit: limited(world, limit), report)
    return [*rows, row]


def _try_all(
    world: World, row: Row, levels: Sequence[int], full: Callable[[int], object], report: ProgressCallback
) -> None:
    world.start()
    kinds = [*kinds_of_save(world), upload(world)]
    for kind in kinds[:-1]:
        kind.send("former").raise_for_status()
    for number, level in enumerate(levels):
        for kind in kinds:
            report(Progress("fill the disk", number, len(levels), f"{row.what}: {kind.what}"))
            _try(world, row, kind, level, full)
    row.figures = f"{len(kinds)} kinds of save at {len(levels)} levels"


def _try(world: World, row: Row, kind: KindOfSave, level: int, full: Callable[[int], object]) -> None:
    mark, where = f"full at {level}", f"{kind.what}, {level} left"
    before = state(world)
    with full(level):
        try:
            answer = kind.send(mark)
        except requests.RequestException as error:
            row.check(False, f"{where}: {error}")
            return
        reading = [world.request("GET", path) for path in ("/info/", "/pe/worklist")]
    if answer.ok:
        row.check(kind.shown() == kind.content(mark), f"{where}: acknowledged, but shows {kind.shown()}")
        return
    for read in reading:
        row.check(read.ok, f"{where}: {read.request.path_url} fails while the disk is full: {read.text[:150]}")
    row.check(answer.status_code == 507 and sentence(answer), f"{where}: {answer.status_code} {answer.text[:200]}")
    now = state(world)
    row.check(now == before, f"{where}: not as before: {differences(before, now)}")
    left = [name for name in snapshot(world.studies) if Path(name).name.startswith(".") and len(Path(name).name) > 34]
    row.check(not left, f"{where}: left behind {left}")
    again = kind.send(f"again {level}")
    row.check(
        again.ok and kind.shown() == kind.content(f"again {level}"), f"{where}: with space back {again.text[:200]}"
    )


def _start_on_full_disk(world: World, row: Row, mounted: Path) -> None:
    before = state(world)
    world.kill()
    with ballast(mounted, 0):
        world.spawn()
        up = world.wait_until_up() is not None
        row.check(up, f"start on a full disk: {world.log_tail()}")
        row.check(up and state(world) == before, "start on a full disk: not as before")
    world.kill()


def upload(world: World) -> KindOfSave:
    """A new CT; its mark is its id."""

    def study(mark: str) -> str:
        return mark.replace(" ", "-")

    def send(mark: str) -> requests.Response:
        file = world.folder.parent / f"{study(mark)}.nrrd"
        write_volume(chest(len(mark)), file)
        content = file.read_bytes()
        file.unlink()
        last.append(mark)
        return world.request(
            "PUT", "/datastore/image", params={"image": study(mark)}, files={"file": ("x.nrrd", content)}
        )

    def shown() -> str | None:
        known = world.request("GET", "/datastore/?output=all").json()["objects"]
        return study(last[-1]) if last and study(last[-1]) in known else None

    last: list[str] = []
    return KindOfSave("new CT", send, study, shown)


def sentence(answer: requests.Response) -> bool:
    """Whether a refusal says in words what is wrong, as JSON, without the inside of the program."""
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(detail, str) and len(detail) >= 10 and " " in detail and "Traceback" not in detail


def differences(before: dict, after: dict) -> dict:
    """What changed between two states."""
    return {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }


@contextmanager
def tmpfs(folder: Path, mebibytes: int = 24) -> Iterator[Path | None]:
    """A small disk while the block runs; None where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


@contextmanager
def ballast(folder: Path, left_kib: int) -> Iterator[None]:
    """Fill a disk but for so much; the server may be writing meanwhile."""
    file = folder / "ballast"
    try:
        with file.open("wb") as target:
            while True:
                status = os.statvfs(folder)
                try:
                    os.posix_fallocate(target.fileno(), 0, status.f_bavail * status.f_frsize - 1024 * left_kib)
                    break
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    target.truncate(0)
        yield
    finally:
        file.unlink()


@contextmanager
def limited(world: World, limit: int) -> Iterator[None]:
    """Let no file of the server grow beyond a size."""
    former = resource.prlimit(world.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(world.pid, resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        yield
    finally:
        resource.prlimit(world.pid, resource.RLIMIT_FSIZE, former)
