"""Progress of long commands: bars if stderr is a terminal, plain lines if not."""

from __future__ import annotations

import io
import time

import pytest

from engram.lm import progress
from engram.lm.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(stream: io.StringIO, text: str) -> None:
    began = time.monotonic()
    while text not in stream.getvalue():
        assert time.monotonic() - began < 10, stream.getvalue()
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.01)


def test_a_task_that_reports_nothing_still_prints_lines():
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        shown.task("preparing the text")
        wait_for(stream, "preparing the text: 0:00 since it began\n" * 2)


def test_each_line_shows_the_task_that_was_updated_last_and_its_counts():
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        steps = shown.task("plain, seed 0", 489, "steps")
        scoring = shown.task("plain, seed 0, scoring", unit="tokens")
        steps.update(12, text="9,800 tok/s, loss 5.123")
        wait_for(stream, "plain, seed 0: 12 of 489 steps, 9,800 tok/s, loss 5.123, 0:00 since it began\n")
        scoring.update(2_000_000, 20_000_000)
        wait_for(stream, "plain, seed 0, scoring: 2.00M of 20.0M tokens, 0:00")
        steps.update(13)
        wait_for(stream, "plain, seed 0: 13 of 489 steps, 9,800 tok/s")


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (0, None, "bytes", ""),
        (5 << 20, None, "bytes", "5.00 MiB"),
        (1 << 30, 3 << 30, "bytes", "1.00 GiB of 3.00 GiB"),
        (7, None, "tokens", "7 tokens"),
        (0, 10, "tokens", "0 of 10 tokens"),
        (999_999, 1_000_000, "tokens", "999,999 of 1.00M tokens"),
    ],
)
def test_counts_are_shown_with_their_unit(done, total, unit, text):
    task = Progress(stream=io.StringIO()).task("reading", total, unit)
    task.update(done)
    assert task.amount() == text


def test_a_short_command_prints_nothing_and_its_thread_ends(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 30.0)
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        shown.task("reading").update(3, 5)
    assert stream.getvalue() == "" and not shown._printer.is_alive()


def test_lines_stop_after_an_error_and_a_closed_pipe_does_not_raise(monkeypatch):
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress(stream=stream) as shown:
        shown.task("reading")
        stream.close()
        time.sleep(0.05)
        raise KeyError
    assert not shown._printer.is_alive()


def test_a_terminal_shows_bars_and_control_codes_in_file_names_are_removed():
    stream = Terminal()
    with Progress(stream=stream) as shown:
        task = shown.task("re\x1b[2Jading [/x]", 4, "steps")
        task.update(2, text="[bold]\x1b]0;title")
        task.finish()
    text = stream.getvalue()
    assert "2 of 4 steps" in text and "[/x]" in text and "[bold]" in text
    assert "\x1b[2J" not in text and "\x1b]0;" not in text


def test_a_terminal_shows_lines_if_the_work_prints_its_own_progress():
    stream = Terminal()
    with Progress(live=False, stream=stream) as shown:
        shown.task("scoring sky")
        wait_for(stream, "scoring sky: 0:00 since it began\n")
