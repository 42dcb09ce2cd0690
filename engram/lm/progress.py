"""Show the progress of a long command on stderr: a live bar on a terminal, elsewhere a plain line at least every 30
seconds. Stdout holds results only.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any, TextIO

from engram.lm.units import format_bytes, format_count
from engram.storage.untrusted import printable

EVERY = 30.0  # seconds between plain lines


class Task:
    """One piece of work inside a Progress. `total` is None as long as it is not known."""

    def __init__(self, progress: Progress, name: str, total: float | None, unit: str):
        self.name, self.total, self.unit, self.text = name, total, unit, ""
        self.done: float = 0
        self.began = time.monotonic()
        self.ended: float | None = None
        self._progress = progress
        self._bar = None if progress._live is None else progress._live.add_task(printable(name), total=total, amount="")

    def update(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """Set how much is done. total, text: if they changed."""
        self.done = done
        self.total = self.total if total is None else total
        self.text = self.text if text is None else text
        self._progress._newest = self
        if self._bar is not None:
            amount = "  ".join(filter(None, (self.amount(), printable(self.text))))
            self._progress._live.update(self._bar, completed=done, total=self.total, amount=amount)

    def finish(self) -> None:
        self.ended = time.monotonic()
        if self._bar is not None:
            self._progress._live.stop_task(self._bar)

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.began

    def amount(self) -> str:
        """ "12 of 489 steps", "1.20 GiB of 3.00 GiB"; "" if nothing is counted."""
        show = format_bytes if self.unit == "bytes" else lambda n: f"{n:,.0f}" if n < 1e6 else format_count(n)
        if not self.total:
            return "" if not self.done else f"{show(self.done)} {self.unit if self.unit != 'bytes' else ''}".strip()
        return f"{show(self.done)} of {show(self.total)} {self.unit if self.unit != 'bytes' else ''}".strip()

    def line(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        parts = (self.amount(), self.text, f"{minutes}:{seconds:02d} since it began")
        return printable(f"{self.name}: {', '.join(filter(None, parts))}")


class Progress:
    """Progress of tasks, shown while its block runs: `with Progress() as progress: progress.task("reading", total)`.

    If stderr is not a terminal, a thread prints the task that was updated last every 30 seconds, also if the work
    reports nothing for longer than that. live=False prints such lines in a terminal too, for work that draws there.
    """

    def __init__(self, live: bool = True, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self._shows_bar = live and self.stream.isatty()
        self._live: Any = None
        self._newest: Task | None = None
        self._over = threading.Event()
        self._printer = threading.Thread(target=self._print, name="engram-progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._shows_bar:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description:<18}", markup=False), BarColumn())
            amount = TextColumn("{task.fields[amount]}", markup=False)
            console = Console(file=self.stream)
            self._live = Bars(*columns, amount, TimeRemainingColumn(), console=console, transient=True)
            self._live.start()
        else:
            self._printer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._over.set()
            self._printer.join()

    def task(self, name: str, total: float | None = None, unit: str = "") -> Task:
        """Begin a task. unit: of its counts, such as "steps"; "bytes" are shown in KiB, MiB and so on."""
        self._newest = Task(self, name, total, unit)
        return self._newest

    def _print(self) -> None:
        while not self._over.wait(EVERY):
            if self._newest is not None:
                with contextlib.suppress(OSError, ValueError):  # the reader of the pipe has ended
                    print(self._newest.line(), file=self.stream, flush=True)
