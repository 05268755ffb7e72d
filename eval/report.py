"""The results of several models as Markdown and as one HTML page without external resources.

A result is what `ptq evaluate` writes as JSON for a model; docs/evaluation.md says what its fields mean.  The first result is what
the others are compared with.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq.eval.paired import Difference, difference

Result = Mapping[str, Any]
STYLE = """:root{color-scheme:light dark;--line:color-mix(in srgb,currentColor 20%,transparent)}
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:auto;padding:1rem 1rem 4rem}
h2{margin:2.5rem 0 .5rem}p{max-width:50rem;opacity:.8}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .9rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}
thead th{vertical-align:bottom;white-space:normal;border-bottom-width:2px;max-width:11rem}
th:first-child{text-align:left;position:sticky;left:0;background:Canvas;padding-left:0;overflow-wrap:anywhere;white-space:normal;
min-width:9.5rem;max-width:18rem;font-weight:600}
.words td:last-child,.words th:last-child{text-align:left;white-space:normal;max-width:none}
.bar{display:block;position:relative;height:10px;min-width:8rem;margin:.15rem 4px 0;color:#2f6fb5}
.bar span{position:absolute;background:currentColor}.unsure .bar,.unsure{color:#8a8a8a}
.zero{height:10px;width:1px;color:#8a8a8a}.range{top:4px;height:2px}.dot{top:1px;width:8px;height:8px;margin-left:-4px;border-radius:4px}
@media(max-width:40rem){body{font-size:14px}th:first-child{min-width:6.2rem;max-width:8rem}th,td{padding:.35rem .5rem}}"""


@dataclass(frozen=True)
class Cell:
    """`measured`: a value and its standard error, if it is to be drawn.  `sure`: whether it says anything."""

    text: str
    measured: tuple[float, float] | None = None
    sure: bool = True


@dataclass(frozen=True)
class Table:
    """`zero`: columns of measured cells are drawn from zero on.  `words`: the last column is prose."""

    title: str
    note: str
    head: list[str]
    rows: list[list[Cell]]
    zero: bool = True
    words: bool = False


def tables(results: Sequence[Result]) -> list[Table]:
    """The tables of the report; what was not measured has no table."""
    made = []
    if any(result["text"] for result in results):
        made.append(text_table(results))
    if any(result["tasks"] for result in results):
        made.append(tasks_table(results))
    compared = differences(results)
    if compared:
        made.append(differences_table(results[0]["label"], compared))
    if any((result["text"] or {}).get("sample") for result in results):
        made.append(samples_table(results))
    return [*made, models_table(results)]


def cells(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


def models_table(results: Sequence[Result]) -> Table:
    made = any(r.get("made_by") for r in results)
    head = ["model", "dtype", "size on disk", "bits per weight", "loaded in", *(["made by", "made in"] if made else [])]
    rows = []
    for r in results:
        size, bits = number(r["bytes"], lambda count: f"{count / 1e6:.2f} MB"), number(r["bits_per_weight"], "{:.3f}".format)
        row = [r["label"], r["dtype"], size, bits, number(r["load_seconds"], "{:.2f} s".format)]
        if made:
            row += [number(r.get("made_by"), str), number(r.get("quantize_seconds"), "{:.1f} s".format)]
        rows.append(cells(*row))
    note = "Bits per weight: all that is stored for the linears, scales included, over their weights."
    return Table("Models", note, head, rows)


def text_table(results: Sequence[Result]) -> Table:
    first = next(r for r in results if r["text"])
    about, protocol = first["text"], first["text"]["protocol"]
    head = [
        *("model", f"KL to {first['label']} (nats a token)", f"token perplexity, windows of {protocol['window']}"),
        *("bits per byte of text", "same likeliest token", "bits per weight", "scored in"),
    ]
    rows = []
    for result in (r for r in results if r["text"]):
        text = result["text"]
        kl, stderr = text["kl"], text["kl_stderr"]
        measured = None if kl is None or stderr is None or result is first else (kl, stderr)
        error = "" if measured is None else f" ± {stderr:.5f}"
        rest = f"{text['token_ppl']:.4f}", f"{text['bits_per_byte']:.4f}", number(text["agreement"], "{:.2%}".format)
        bits = number(result["bits_per_weight"], "{:.3f}".format)
        divergence = Cell("other tokens" if kl is None else f"{kl:.5f}{error}", measured)
        rows.append([Cell(result["label"]), divergence, *cells(*rest, bits, result["dtype"])])
    note = (
        f"{protocol['text']}: windows of {protocol['window']} tokens, stride {protocol['stride']}, {protocol['bos']}; "
        f"{about['tokens']} tokens predicted in {about['windows']} windows. "
    )
    note += "± one standard error; bars: two." if about["windows"] > 1 else "One window gives no error bars: it proves nothing."
    return Table("Text", note, head, rows)


def tasks_table(results: Sequence[Result]) -> Table:
    names = list(
        dict.fromkeys((task, metric) for r in results for task in r["tasks"] for metric in r["tasks"][task]["metrics"])
    )
    rows = []
    for result in results:
        found = [result["tasks"].get(task, {}).get("metrics", {}).get(metric) for task, metric in names]
        rows.append([Cell(result["label"]), *map(plus_minus, found)])
    counts = dict.fromkeys(f"{task} {r['tasks'][task]['samples']}" for r in results for task in r["tasks"])
    note = f"lm-eval's own numbers, ± one standard error; bars: two. Items: {', '.join(counts)}."
    return Table("lm-eval", note, ["model", *(task_label(task, metric) for task, metric in names)], rows, zero=False)


def differences_table(first: str, compared: Sequence[tuple[str, str, Difference]]) -> Table:
    metrics = list(dict.fromkeys(metric for _, metric, _ in compared))
    rows: dict[str, dict[str, Cell]] = {}
    for label, metric, change in compared:
        measured = None if math.isnan(change.stderr) else (change.value, change.stderr)
        rows.setdefault(label, {})[metric] = Cell(signed(change), measured, change.conclusive)
    note = (
        f"Against {first}: paired over the same items, ± one standard error (bars: two); ln for perplexities. "
        "An asterisk marks what is more than two standard errors from zero. Less is inconclusive: these items do not tell "
        "which is better; in brackets, about how many times as many would, if the difference is as large as it seems."
    )
    found = [[Cell(label), *(row.get(metric, Cell("–")) for metric in metrics)] for label, row in rows.items()]
    return Table("Differences", note, ["model", *metrics], found)


def samples_table(results: Sequence[Result]) -> Table:
    """How each goes on after the first words of the text."""
    samples = {r["label"]: r["text"]["sample"] for r in results if r["text"] and r["text"].get("sample")}
    prompt = next(iter(samples.values()))["prompt"]
    rows = [cells(label, sample["greedy"]) for label, sample in samples.items()]
    return Table("Samples", f"Greedily, after: {prompt}", ["model", "goes on"], rows, words=True)


def differences(results: Sequence[Result]) -> list[tuple[str, str, Difference]]:
    """(label, metric, difference to the first result) wherever both were measured on the same items."""
    first, found = results[0], []
    for result in results[1:]:
        a, b = first["text"], result["text"]
        if a and b and a["fingerprint"] == b["fingerprint"]:
            found.append((result["label"], "ln token_ppl", difference(a["items"], b["items"], "perplexity")))
        for task, other in result["tasks"].items():
            base = first["tasks"].get(task)
            if not base or base["fingerprint"] != other["fingerprint"]:
                continue
            for metric, entry in other["metrics"].items():
                start = base["metrics"].get(metric, {})
                if "aggregation" in entry and entry["aggregation"] == start.get("aggregation"):
                    change = difference(start["items"], entry["items"], entry["aggregation"])
                    log = "ln " if entry["aggregation"] == "perplexity" else ""
                    found.append((result["label"], log + task_label(task, metric), change))
    return found


def task_label(task: str, metric: str) -> str:
    return f"{task} {metric.removesuffix(',none')}"


def number(value: Any, form: Any) -> str:
    return "–" if value is None else form(value)


def plus_minus(entry: Mapping[str, Any] | None) -> Cell:
    if entry is None:
        return Cell("–")
    value, stderr = entry["value"], entry["stderr"]
    if stderr is None or math.isnan(stderr):
        return Cell(f"{value:.4f}")
    return Cell(f"{value:.4f} ± {stderr:.4f}", (value, stderr))


def signed(change: Difference) -> str:
    if math.isnan(change.stderr):
        return f"{change.value:+.4f}"
    return f"{change.value:+.4f} ± {change.stderr:.4f}{' *' if change.conclusive else inconclusive(change)}"


def inconclusive(change: Difference) -> str:
    """Nothing where the two are equal item by item."""
    if not change.stderr:
        return ""
    times = change.items_needed and change.items_needed / change.items
    return f" inconclusive ({times:.0f}×)" if times and 1.5 <= times < 1000 else " inconclusive"


def markdown(results: Sequence[Result]) -> str:
    parts = ["# Evaluation\n"]
    for table in tables(results):
        rows = [[in_a_cell(text) for text in row] for row in (table.head, *([cell.text for cell in row] for row in table.rows))]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        rule = "|---|" + ("---|" if table.words else "---:|") * (len(table.head) - 1)
        parts.append("\n".join([f"## {table.title}", "", lines[0], rule, *lines[1:], "", plain(table.note), ""]))
    return "\n".join([*parts, plain(footer(results)), ""])


def plain(text: str) -> str:
    """For Markdown, without the markup that a model's or a file's name may bring, and in one line."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[").split())


def in_a_cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


def page(results: Sequence[Result]) -> str:
    """The HTML page."""
    body = "\n".join(section(table) for table in tables(results))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>Evaluation</h1>\n{body}\n<p>{html.escape(footer(results))}</p></body></html>\n"
    )


def footer(results: Sequence[Result]) -> str:
    versions = " ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    return f"{versions}; {results[0]['device']}."


def section(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in table.head)
    axes = [axis_of((row[column].measured for row in table.rows), table.zero) for column in range(len(table.head))]
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0].text)}</th>{"".join(map(element, row[1:], axes[1:]))}</tr>'
        for row in table.rows
    )
    return (
        f"<h2>{table.title}</h2>\n<p>{html.escape(table.note)}</p>\n"
        f'<div class="wide"><table class="{"words" if table.words else "numbers"}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


Axis = tuple[float, float] | None
"""Where a column's bars begin and end."""


def axis_of(measured: Iterable[tuple[float, float] | None], zero: bool) -> Axis:
    ends = [value + sign * stderr for value, stderr in filter(None, measured) for sign in (-2, 2)]
    low, high = min([*ends, *[0.0] * zero], default=0.0), max([*ends, *[0.0] * zero], default=0.0)
    return (low, high) if low < high else None


def element(cell: Cell, axis: Axis) -> str:
    """A cell of the page; what is measured as a dot, and two standard errors to both sides."""
    bar = ""
    if cell.measured and axis:
        (value, stderr), (low, high) = cell.measured, axis
        left, at, right, zero = (100 * (x - low) / (high - low) for x in (value - 2 * stderr, value, value + 2 * stderr, 0.0))
        bar = f'<span class="zero" style="left:{zero:.1f}%"></span>' if 0 <= zero <= 100 else ""
        bar += f'<span class="range" style="left:{left:.1f}%;width:{right - left:.1f}%"></span>'
        bar = f'<span class="bar">{bar}<span class="dot" style="left:{at:.1f}%"></span></span>'
    return f"<td{'' if cell.sure else UNSURE}>{html.escape(cell.text)}{bar}</td>"


UNSURE = ' class="unsure"'
