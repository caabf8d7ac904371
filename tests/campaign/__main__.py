"""``python -m campaign``: the fault campaign, with a table at the end; exit code 1 if anything failed."""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from campaign import disk, inputs, kills, readers, rows
from campaign.world import Row, Zygote, zygote_in
from pe_app.cli.options import progress_bars
from pe_app.common.progress import ProgressCallback

PARTS = ("random", "every step", "starts", "disk", "inputs", "readers", "rows")


def run(
    zygote: Zygote,
    parts: Iterable[str],
    minutes: float,
    seed: int,
    report: ProgressCallback,
    show: Callable[[str], None],
) -> list[Row]:
    """Run the parts one after another.

    Args:
        zygote: the preloaded process.
        parts: of ``PARTS``.
        minutes: of which 10 are the full campaign: 200 kills at random moments, 5 minutes of readers, every bad input.
        seed: of all that is drawn.
        report: told what is going on.
        show: told when a part begins and ends.
    """
    share = minutes / 10
    stride = max(1, round(2 / share))
    measured: dict[str, Row] = {}
    every: list[Row] = []
    work: dict[str, Callable[[], list[Row]]] = {
        "random": lambda: [kills.random_kills(zygote, seed, max(5, round(200 * share)), report)],
        "every step": lambda: list(kills.every_step(zygote, stride, report)),
        "starts": lambda: [kills.start_steps(zygote, stride, report)],
        "disk": lambda: disk.full_disk(zygote, report, max(1, round(1 / share))),
        "inputs": lambda: [
            inputs.read_bad_files(zygote, max(1, round(1 / share)), report),
            *inputs.bad_inputs(zygote, seed, min(1.0, share), report),
            inputs.fuzz_volumes(zygote, seed, max(50, round(1000 * share)), report),
            *inputs.fuzz_server(zygote, seed, max(30, round(400 * share)), report),
        ],
        "readers": lambda: [readers.crowd(zygote, seed, max(10.0, 300 * share), report)],
        "rows": lambda: rows.table(zygote, measured, report, None if share >= 0.5 else rows.QUICK),
    }
    for part in (part for part in PARTS if part in parts):
        begun = time.monotonic()
        show(f"{part} ...")
        found = work[part]()
        measured[part] = next((row for row in found if row.failures), found[0])
        every += found
        failed = sum(len(row.failures) for row in found)
        show(f"{part}: {sum(row.tried for row in found)} tried, {failed} failed, {time.monotonic() - begun:.0f} s")
        for row in found:
            show(f"  {row.what}: {row.figures}")
            for failure in row.failures[:5]:
                show(f"    FAILED: {failure[:300]}")
    return every


def as_markdown(found: list[Row]) -> str:
    """Both tables, and what failed."""
    lines = ["| part | what | tried | failed | figures |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.part} | {row.what} | {row.tried} | {len(row.failures)} | {row.figures} |"
        for row in found
        if not row.stock
    ]
    if any(row.stock for row in found):
        lines += ["", "| what | MONAI Label 0.8.5 | this server | right |", "|---|---|---|---|"]
    for row in found:
        if row.stock:
            ours = row.figures.replace("|", "/") or "; ".join(row.failures)[:200]
            lines.append(f"| {row.what} | {row.stock} | {ours} | {'no' if row.failures else 'yes'} |")
    failed = [f"- {row.what}: {failure}" for row in found for failure in row.failures[:25]]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])])


def main() -> int:
    """Parse the command line, run, show the table."""
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long on two free cores [10]")
    parser.add_argument(
        "--seed", type=int, default=None, help="of all that is drawn; by default a new one, which is shown"
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given several times")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work; emptied afterwards"
    )
    parser.add_argument("--table", type=Path, help="write the tables there, too, as Markdown")
    said = parser.parse_args()
    seed = secrets.randbelow(10**6) if said.seed is None else said.seed
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing is left running
    begun = time.monotonic()
    print(f"seed {seed}: the same campaign again with --seed {seed}", flush=True)
    try:
        with zygote_in(said.folder) as zygote, progress_bars() as report:
            found = run(zygote, said.part or PARTS, said.minutes, seed, report, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("stopped; nothing is left running", file=sys.stderr)
        return 130
    table = as_markdown(found)
    failed = sum(len(row.failures) for row in found)
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    tried, minutes = sum(row.tried for row in found), (time.monotonic() - begun) / 60
    cpu = sum(os.times()[:4]) / 60  # of the children, too: all have ended
    end = f"{tried} tried, {failed} failed, {minutes:.1f} minutes ({cpu:.1f} of CPU), seed {seed}, {machine}"
    print(f"\n{table}\n\n{end}")
    if said.table:
        said.table.write_text(f"{table}\n\n{end}\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
