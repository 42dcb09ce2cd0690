"""report.html of a report: tables and figures in one file that loads nothing from elsewhere."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping

from engram.ablation.figure import css_colours, figure_svg
from engram.ablation.tables import Cell, Report, Table, seeds_of, tables_of, title_of
from engram.storage.files import write_whole

_STYLE = f"""
:root {{ color-scheme: light dark; {css_colours(dark=False)}
  --block: #f4f6f8; --better: #00734f; --worse: #b3400a; }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_colours(dark=True)}
  --block: #1d232a; --better: #2fc79a; --worse: #f28a4a; }} }}
"""
_STYLE += """* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p, ul { max-width: 44rem; margin: .25rem 0 .75rem; }
ul { padding-left: 1.2rem; }
li { margin: .4rem 0; }
.soft, small { color: var(--soft); font-size: .85rem; }
figure { margin: 2rem 0; }
.panels { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.panels svg { flex: 1 1 22rem; min-width: 0; max-width: 40rem; height: auto; }
pre { background: var(--block); border-radius: 6px; padding: .75rem 1rem; overflow-x: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th small, td small { display: block; font-weight: 400; font-size: .8rem; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1.2rem; font-size: .92rem;
  margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { h1 { font-size: 1.25rem; } table { font-size: .85rem; } th, td { padding: .3rem .45rem; } }
.details { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem; }
"""

_READING = (
    "<b>Loss</b> is the mean negative log-likelihood of the held-out tokens in nats. <b>bpb</b> is the same sum in "
    "bits, divided by the bytes of the text, so it compares across vocabularies. Lower is better in both.",
    "<b>Δ</b> is an arm minus <i>plain</i>, the same model without memory; negative is better. Its 95&nbsp;% interval "
    "comes from a paired bootstrap: validation documents{drawn} are drawn again, and both arms are evaluated on the "
    "same draw{student}. It is coloured if it excludes zero.",
    "<b>By seen count</b>: every predicted token is counted under how often the two (bigram) or three (trigram) tokens "
    "just before it occurred together in the text that the run was trained on. A memory of n-grams should help most "
    "where the n-gram was seen; a gain under <i>never</i> has another reason.",
    "<b>In the figure</b> a line is the mean over seeds and a thin line one seed. Lines are measured on the "
    "validation text or a part of it, dots and tables on all of it.",
    "<b>Dense</b> parameters are all read for every token, <b>table</b> parameters only in the few rows that the last "
    "tokens address.",
)

_LIMITS = (
    "<b>Nothing about scale.</b> This is a small model, little text and a short run. Effects of this kind have shrunk "
    "or vanished in larger ones.",
    "<b>Not equal size.</b> Arms with a table have more parameters and bytes than plain, and seconds differ between "
    "arms. What the same bytes or seconds would bring elsewhere is shown only if the table has such an arm.",
    "<b>Not all uncertainty.</b> {uncertain} Learning rates and other settings are those listed below; whether an arm "
    "would do better with others is not shown.",
    "<b>Nothing outside this text.</b> Validation documents come from the same sources as the training text. Other "
    "text and downstream tasks were not measured.",
    "<b>No cause.</b> Rare and frequent n-grams differ in more than their counts: a gain by seen count hints at how "
    "the memory works and proves nothing.",
)


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write report.html: one file with style, figures and tables that loads nothing else. It is written completely
    or not at all."""
    words = {
        "drawn": "",
        "student": "",
        "uncertain": "With one seed, the interval does not include the spread between seeds.",
    }
    if seeds_of(report) > 1:
        few = (
            f"{seeds_of(report)} seeds show little of the spread between seeds, and the interval is wide because of it."
        )
        student = ", and widened to Student's interval over seeds if that is wider"
        words = {"drawn": " and seeds", "student": student, "uncertain": few}
    title, main, *others = _escape(title_of(report)), *(_html_table(table) for table in tables_of(report))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="soft">engram {_escape(report["version"])} · {_escape(report["date"])}</p>
{main}
{_html_figure(report)}
{"".join(others)}
<h2>How to read this</h2>
{_html_list(text.format(**words) for text in _READING)}
<h2>What this does not show</h2>
{_html_list(text.format(**words) for text in _LIMITS)}
<h2>Make it again</h2>
<pre>{_escape(report["command"])}</pre>
<div class="details">
<section><h2>Corpus</h2>{_html_details(_corpus_details(report["corpus"]))}</section>
<section><h2>Machine</h2>{_html_details(report["machine"])}</section>
<section><h2>Settings</h2>{_html_details(report["settings"])}</section>
</div>
</body>
</html>
"""
    write_whole(path, page.encode())


def _escape(value: object) -> str:
    return html.escape(str(value))


def _html_cell(cell: Cell, tag: str) -> str:
    note = f"<small>{_escape(cell.note)}</small>" if cell.note else ""
    text = f'<span class="{cell.tone}">{_escape(cell.text)}</span>' if cell.tone else _escape(cell.text)
    return f"<{tag}>{text}{note}</{tag.split()[0]}>"


def _html_table(table: Table) -> str:
    head = "".join(_html_cell(cell, 'th scope="col"') for cell in table.head)
    rows = [
        _html_cell(first, 'th scope="row"') + "".join(_html_cell(cell, "td") for cell in rest)
        for first, *rest in table.rows
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"""<h2>{_escape(table.title)}</h2>
<p class="soft">{_escape(table.caption)}</p>
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
"""


def _html_figure(report: Report) -> str:
    return f'<figure class="panels">{"".join(figure_svg(report))}</figure>'


def _html_list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _html_details(details: Mapping[str, object]) -> str:
    pairs = (f"<dt>{_escape(name.replace('_', ' '))}</dt><dd>{_escape(value)}</dd>" for name, value in details.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _corpus_details(corpus: Report) -> dict[str, object]:
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in corpus.items()}
    overlap = f"{100 * shown.pop('overlap_13gram'):.2f} % of the validation text's are in the training text"
    return {**shown, "13-grams": overlap}
