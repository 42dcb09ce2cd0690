"""The tables, the figure and the page that show an ablation, on a made-up report."""

from __future__ import annotations

import html
import io
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engram.ablation.figure import draw_curves
from engram.ablation.html_report import write_html
from engram.ablation.tables import print_report
from engram.lm.units import format_bytes, format_count

FINAL = {"plain": 4.184, "one-row": 4.185, "engram": 3.814}
SEEN_GAIN = {"0": 0.05, "1": 0.22, "2-9": 0.41, "10+": 0.52}
SHARES = {"bigram": (0.13, 0.06, 0.18, 0.63), "trigram": (0.41, 0.12, 0.2, 0.27)}


def fake_run(arm: str, seed: int, tokens: int = 3_300_000) -> dict[str, Any]:
    noise = random.Random(f"{arm} {seed}")
    final = FINAL.get(arm, 4.1) + 0.006 * (seed - 1)

    def loss(t: float) -> float:
        return final + 4.13 * math.exp(-3.1 * (t / tokens) ** 0.45) - 4.13 * math.exp(-3.1) * (t / tokens)

    gain = 1.0 if arm == "engram" else 0.002
    seen = {
        order: {
            bucket: [int(210_000 * share), 5.9 - 0.7 * i - gain * SEEN_GAIN[bucket] + noise.gauss(0, 0.008)]
            for i, (bucket, share) in enumerate(zip(SEEN_GAIN, shares, strict=True))
        }
        for order, shares in SHARES.items()
    }
    seconds = 95.0 if arm == "plain" else 108.0
    table = {"plain": 0, "one-row": 256}.get(arm, 16_782_048)
    steps = [tokens * i // 100 for i in range(1, 101)]
    return {
        "arm": arm,
        "seed": seed,
        "parameters": {"dense": 1_312_640, "table": table},
        "bytes": {"dense": 5_250_560, "table": 4 * table, "optimizer": 10_501_120 + table // 8},
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "train_curve": [[t, loss(t) + noise.gauss(0, 0.08)] for t in steps],
        "validation_curve": [[t, loss(t)] for t in [0, *steps[4::5]]],
        "loss": final,
        "bpb": final * 0.37,
        "seen": seen,
    }


def fake_report(arms: tuple[str, ...] = ("plain", "one-row", "engram"), seeds: int = 2) -> dict[str, Any]:
    runs = [fake_run(arm, seed) for arm in arms for seed in range(1, seeds + 1)]

    def difference(arm: str, scale: float) -> dict[str, float] | None:
        if arm == "plain" or "plain" not in arms:
            return None
        mean = scale * (FINAL.get(arm, 4.1) - FINAL["plain"])
        return {"mean": mean, "low": mean - 0.011 * scale, "high": mean + 0.011 * scale}

    summary = [
        {
            "arm": arm,
            "seeds": seeds,
            "loss": FINAL.get(arm, 4.1),
            "bpb": FINAL.get(arm, 4.1) * 0.37,
            "difference": difference(arm, 1.0),
            "difference_bpb": difference(arm, 0.37),
        }
        for arm in arms
    ]
    return {
        "command": "engram ablate --seeds 2 --out runs/first-light",
        "version": "0.1.0",
        "date": "2026-11-22",
        "settings": {"layers": 4, "hidden_size": 128, "context": 256, "table_lr": 0.03, "lr": 3e-3},
        "machine": {"cpu": "Some CPU @ 2.1 GHz", "cores": 2, "torch": "2.13.0+cpu", "python": "3.11.7"},
        "corpus": {
            "name": "wiki + shakespeare + kjv",
            "digest": "0123456789abcdef" * 2,
            "train_tokens": 4_101_222,
            "train_documents": 10_022,
            "validation_tokens": 210_112,
            "validation_documents": 511,
            "validation_bytes": 819_311,
            "overlap_13gram": 0.0123,
        },
        "runs": runs,
        "summary": summary,
    }


def printed(report: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def page(report: dict[str, Any], folder: Path) -> str:
    write_html(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def three_arms(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(fake_report(), tmp_path_factory.mktemp("page"))


class Links(HTMLParser):
    """Attributes of a page that can make a browser load something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]


def test_printed_table_shows_each_arm_with_its_loss_and_difference_to_plain() -> None:
    text = printed(fake_report())
    assert re.search(r"plain +4\.187 +– +1\.549 +1\.31M +0 +3\.30M +95 +34,737", text)
    assert re.search(r"engram +3\.817 +−0\.370 +1\.412 +1\.31M +16\.8M +3\.30M +108 +30,556", text)
    assert "−0.381 to −0.359" in text


def test_80_columns_show_every_number_whole() -> None:
    report = fake_report(("plain", "additive_bigram_at_every_layer", "engram"), seeds=3)
    text = printed(report, width=80)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    for number in ("−0.381 to −0.359", "16.8M", "30,556", "±0.006"):
        assert number in text


def test_a_wide_terminal_shows_the_interval_in_bits_per_byte_too() -> None:
    assert "−0.141 to −0.133" in printed(fake_report(), width=120)


def test_printed_tables_show_loss_by_seen_count_with_share_of_tokens() -> None:
    text = printed(fake_report())
    for words in ("last bigram", "last trigram", "never", "once", "2–9×", "10+×", "63 %"):
        assert words in text


def test_markup_in_names_is_printed_as_it_is() -> None:
    assert "[red]x[/red]" in printed(fake_report(("plain", "[red]x[/red]")), width=120)


def test_without_plain_the_differences_are_dashes() -> None:
    text = printed(fake_report(("engram",), seeds=1))
    assert re.search(r"engram +3\.814 +– ", text)
    assert "±" not in text


def test_empty_seen_bucket_is_a_dash_and_not_an_error(tmp_path: Path) -> None:
    report = fake_report()
    for run in report["runs"]:
        run["seen"]["trigram"] = {"0": [100, 5.0], "1": [0, None], "2-9": [0, None], "10+": [0, None]}
    assert "–" in printed(report)
    draw_curves(report, tmp_path / "curves.png")


@pytest.mark.parametrize("arms", [("plain",), ("engram",), ("plain", "one-row", "engram"), tuple("abcdefghij")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_figure_is_a_png_wide_enough_for_a_readme(arms: tuple[str, ...], seeds: int, tmp_path: Path) -> None:
    draw_curves(fake_report(arms, seeds), tmp_path / "curves.png")
    data = (tmp_path / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") >= 1600
    assert len(data) > 20_000


@pytest.mark.parametrize("points", [0, 1])
def test_figure_of_a_run_too_short_for_a_curve_is_drawn(points: int, tmp_path: Path) -> None:
    report = fake_report()
    for run in report["runs"]:
        run["train_curve"], run["validation_curve"] = [], run["validation_curve"][:points]
    draw_curves(report, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000


def test_same_report_draws_the_same_figure(tmp_path: Path) -> None:
    draw_curves(fake_report(), tmp_path / "a.png")
    draw_curves(fake_report(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert page(fake_report(), tmp_path) == page(fake_report(), tmp_path)


def test_page_loads_nothing_from_outside_itself(three_arms: str) -> None:
    links = Links()
    links.feed(three_arms)
    assert links.found and all(link.startswith("#") for link in links.found)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<img", three_arms)


def test_page_holds_one_drawing_of_two_panels_in_the_colours_of_the_page(three_arms: str) -> None:
    panels = re.findall(r"<svg .*?</svg>", three_arms, re.S)
    assert len(panels) == 2 and all('aria-label="' in panel and 'viewBox="' in panel for panel in panels)
    style = three_arms[three_arms.index("<style>") : three_arms.index("</style>")]
    for panel in panels:
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", panel))
        assert {"var(--plain)", "var(--engram)", "var(--arm-0)", "var(--soft)"} <= colours
        assert all(colour == "none" or re.fullmatch(r"var\(--[a-z0-9-]+\)", colour) for colour in colours), colours
        assert all(style.count(f"{name}: #") == 2 for name in re.findall(r"--[a-z]+(?:-\d)?", panel))  # light and dark
    assert len(three_arms) < 100_000


def test_the_drawing_names_its_arms_and_losses_as_text(three_arms: str) -> None:
    losses, gains = re.findall(r"<svg .*?</svg>", three_arms, re.S)
    for text in (
        "plain  4.187",
        "one-row  4.188",
        "engram  3.817",
        "Validation loss while training",
        "training tokens",
    ):
        assert re.search(rf"<text[^>]*>{re.escape(text)}</text>", losses)
    for text in ("one-row", "engram", "last bigram", "never", "63 %"):
        assert f">{text}<" in gains


def test_the_names_inside_the_drawing_are_unique_and_all_that_it_refers_to_is_there(three_arms: str) -> None:
    names = re.findall(r'\bid="([^"]*)"', three_arms)
    assert names and len(set(names)) == len(names)
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', three_arms)) <= {(n, "") for n in names} | {
        ("", n) for n in names
    }


@pytest.mark.parametrize("arm", ["a --> <b>", "#0072b2 1.23456", 'x"; fill: #ffffff', "${}$ & \\frac"])
def test_awkward_names_of_arms_are_shown_as_they_are(arm: str, tmp_path: Path) -> None:
    text = page(fake_report(("plain", arm)), tmp_path)
    shown = [html.unescape(part) for part in re.findall(r"<text[^>]*>([^<]*)</text>", text)]
    assert arm in shown and any(part.startswith(f"{arm}  4.1") for part in shown)


def test_page_holds_each_number_of_the_report(three_arms: str) -> None:
    for number in ("4.187", "3.817", "16.8M", "−0.370", "−0.381 to −0.359", "64.0 MiB", "1.23 %", "210,112", "3.30M"):
        assert number in three_arms
    for words in ("engram ablate --seeds 2", "How to read this", "What this does not show", "Some CPU", "0.003"):
        assert words in three_arms


def test_page_escapes_names_and_values(tmp_path: Path) -> None:
    report = fake_report(("plain", "<script>alert(1)</script>"))
    report["command"] = 'engram ablate --corpus "<b>&$x$"'
    report["settings"]["note"] = "</dl><img src=x>"
    text = page(report, tmp_path)
    assert "<script>" not in text
    assert "<img src=x>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;&amp;$x$" in text


def test_page_without_plain_is_written(tmp_path: Path) -> None:
    text = page(fake_report(("engram",), seeds=1), tmp_path)
    assert "<td>–</td>" in text
    assert "With one seed" in text


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "curves.png"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        draw_curves(fake_report(), target)
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (4096, "4.10k"), (12_345, "12.3k"), (999_999, "1.00M"), (1_234_567, "1.23M"),
     (16_777_216, "16.8M"), (123_456_789, "123M"), (27e9, "27.0G"), (-1500, "-1.50k")],
)  # fmt: skip
def test_counts_have_three_significant_digits(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (512, "512 B"), (1023, "1.00 KiB"), (67_108_864, "64.0 MiB"), (3 << 30, "3.00 GiB")],
)
def test_bytes_have_binary_units(number: float, text: str) -> None:
    assert format_bytes(number) == text
