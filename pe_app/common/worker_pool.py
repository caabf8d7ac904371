"""Work in other processes: one that dies takes only its own job with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Self, TypeVar

import SimpleITK as sitk

Job = TypeVar("Job")
Made = TypeVar("Made")


class ProcessEnded(RuntimeError):  # noqa: N818 - what happened to a job
    """The process that did a job was ended, by a crash or by the system."""


class Processes:
    """A pool that outlives the death of its processes; with one worker everything runs in this one."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, make: Callable[[Job], Made], jobs: Sequence[Job]) -> Iterator[tuple[Job, Made | Exception]]:
        """``make(job)`` of every job, or what it raised, as they are finished."""
        if self.workers == 1:
            for job in jobs:
                yield job, _attempt(make, job)
            return
        waiting = list(reversed(jobs))
        running: dict[Future[Made], Job] = {}
        while waiting or running:
            try:
                while waiting and len(running) < 2 * self.workers:  # no more, for their results wait in memory
                    running[self._the_pool(self.workers).submit(make, waiting[-1])] = waiting[-1]
                    waiting.pop()
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    if isinstance(error := future.exception(), BrokenProcessPool):
                        raise error
            except BrokenProcessPool:
                lost = list(running.values())
                running.clear()
                yield from self._one_by_one(make, lost)
                continue
            for future in finished:
                error = future.exception()
                job = running.pop(future)
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield job, future.result() if error is None else error

    def _one_by_one(self, make: Callable[[Job], Made], jobs: Sequence[Job]) -> Iterator[tuple[Job, Made | Exception]]:
        """Jobs among which is one that ends its process: it shows when it is alone."""
        self._end_pool()
        for job in jobs:
            try:
                yield job, self._the_pool(1).submit(make, job).result()
            except BrokenProcessPool:
                self._end_pool()
                yield job, ProcessEnded("its process ended, perhaps for lack of memory")
            except Exception as error:
                yield job, error
        self._end_pool()

    def _the_pool(self, workers: int) -> ProcessPoolExecutor:
        if self._pool is None:  # spawn: a forked child would inherit locked thread pools
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare)
        return self._pool

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _attempt(make: Callable[[Job], Made], job: Job) -> Made | Exception:
    try:
        return make(job)
    except Exception as error:
        return error


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # of torch, which is not loaded yet
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _end_with_parent() -> None:
    """A pool whose parent was killed would wait for its next job for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
