"""Background work: a thread does it, the main thread hears of it. No Qt, no MRML, no slicer.

``Runner.poll`` is called by a timer of the main thread and delivers progress, results and errors there.
"""

from __future__ import annotations

import queue
import threading
from typing import Any, Callable, Dict, Optional

YIELD_SECONDS = 0.005
"""How long a poll waits while work runs. Slicer's main thread holds Python's lock inside Qt's event loop; waiting
here is what gives it to the threads."""


class Cancelled(Exception):
    """Raised inside the work when nobody wants its result any more."""


class Job:
    """One piece of work: how its thread reports, and how the main thread calls it off."""

    def __init__(self, group: str, text: str) -> None:
        self.group = group
        self.text = text
        self.done = 0
        self.total = 0
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    def report(self, text: str, done: int = 0, total: int = 0) -> None:
        """Called by the work: says what it is doing and learns, by ``Cancelled``, that it should stop."""
        if self.cancelled:
            raise Cancelled()
        self.text, self.done, self.total = text, done, total


class Runner:
    """Runs work in threads and delivers on the thread that polls.

    A job belongs to a group. ``drop(group)`` calls all of them off at once: whatever they still answer, their
    callbacks are never called. That is how a late answer for a study no longer open is dropped.

    Args:
        delivered: called after a result was delivered.
        broken: called with what a callback raised; the other answers are delivered all the same.
    """

    def __init__(self, delivered: Callable[[Job], None], broken: Callable[[Exception], None]) -> None:
        self._delivered = delivered
        self._broken = broken
        self._answers: queue.Queue = queue.Queue()
        self._callbacks: Dict[Job, tuple] = {}

    def submit(
        self,
        group: str,
        text: str,
        work: Callable[[Job], Any],
        done: Optional[Callable[[Any], None]] = None,
        failed: Optional[Callable[[Exception], None]] = None,
    ) -> Job:
        """Start ``work(job)`` in a thread; one of the callbacks follows from ``poll``, unless the job is cancelled."""
        job = Job(group, text)
        self._callbacks[job] = (done, failed)

        def run() -> None:
            try:
                answer = (job, 0, work(job))
            except Exception as error:
                answer = (job, 1, error)
            self._answers.put(answer)

        threading.Thread(target=run, name=f"PE {group}", daemon=True).start()
        return job

    def cancel(self, job: Job) -> None:
        """The user stops waiting: ``failed`` hears ``Cancelled`` at once, and nothing of the job after that."""
        job.cancel()
        failed = self._callbacks.pop(job, (None, None))[1]
        if failed is not None:
            failed(Cancelled("cancelled"))

    def drop(self, group: str) -> None:
        """Nobody waits for this group any more: call all of it off in silence."""
        for job in self.jobs(group):
            job.cancel()
            del self._callbacks[job]

    def jobs(self, group: Optional[str] = None) -> list:
        """The running jobs that somebody waits for, the newest last."""
        return [job for job in self._callbacks if group in (None, job.group)]

    def poll(self) -> None:
        """Deliver what has arrived. Call it often on the main thread; it returns within a few milliseconds."""
        wait = bool(self._callbacks)
        while True:
            try:
                job, which, value = self._answers.get(wait, YIELD_SECONDS) if wait else self._answers.get_nowait()
            except queue.Empty:
                return
            wait = False
            callback = self._callbacks.pop(job, (None, None))[which]
            if job.cancelled:
                continue
            try:
                if which == 0:
                    self._delivered(job)
                if callback is not None:
                    callback(value)
            except Exception as error:
                self._broken(error)
