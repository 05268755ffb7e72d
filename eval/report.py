"""The results of several models as Markdown and as one HTML page without external resources.

A result is what scripts/evaluate.py writes as JSON for a model; docs/evaluation.md says what its fields mean.  The first result
is what the others are compared with.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq.eval.paired import Difference, difference

Result = Mapping[str, Any]
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{white-space:nowrap;padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}figure{margin:1.5rem 0}"""


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def tables(results: Sequence[Result]) -> list[Table]:
    """The tables of the report; what was not measured has no table."""
    made = [models_table(results)]
    if any(result["text"] for result in results):
        made.append(text_table(results))
    if any(result["tasks"] for result in results):
        made.append(tasks_table(results))
    compared = differences(results)
    if compared:
        head = ["metric", *dict.fromkeys(label for label, _, _ in compared)]
        rows: dict[str, dict[str, str]] = {}
        for label, metric, change in compared:
            rows.setdefault(metric, {})[label] = signed(change)
        cells = [[metric, *(row.get(label, "") for label in head[1:])] for metric, row in rows.items()]
        note = (
            f"Against {results[0]['label']}: paired over the same items, ± one standard error; ln for perplexities. "
            "An asterisk marks what is more than two standard errors from zero. Less is inconclusive: these items do not tell "
            "which is better; in brackets, about how many times as many would, if the difference is as large as it seems."
        )
        made.append(Table("Differences", note, head, cells))
    return made


def models_table(results: Sequence[Result]) -> Table:
    made = any(r.get("made_by") for r in results)
    head = ["model", "dtype", "size on disk", "bits per weight", "load", *(["made by", "in"] if made else [])]
    rows = []
    for r in results:
        size, bits = number(r["bytes"], lambda count: f"{count / 1e6:.2f} MB"), number(r["bits_per_weight"], "{:.3f}".format)
        row = [r["label"], r["dtype"], size, bits, number(r["load_seconds"], "{:.2f} s".format)]
        if made:
            row += [number(r.get("made_by"), str), number(r.get("quantize_seconds"), "{:.1f} s".format)]
        rows.append(row)
    note = "Bits per weight: all that is stored for the linears, scales included, over their weights."
    return Table("Models", note, head, rows)


def text_table(results: Sequence[Result]) -> Table:
    first = next(r["text"] for r in results if r["text"])
    protocol = first["protocol"]
    head = [
        "model",
        "scored in",
        f"token_ppl@{protocol['window']}",
        "KL to the first (nats)",
        "top-1 agreement",
        "bits per byte",
    ]
    rows = []
    for result in results:
        text = result["text"]
        if text:
            error = "" if text["kl_stderr"] is None else f" ± {text['kl_stderr']:.5f}"
            kl = f"{text['kl']:.5f}{error}" if text["kl"] is not None else "other tokens"
            agreement = number(text["agreement"], "{:.2%}".format)
            rows.append(
                [result["label"], result["dtype"], f"{text['token_ppl']:.4f}", kl, agreement, f"{text['bits_per_byte']:.4f}"]
            )
    note = (
        f"{protocol['text']}: windows of {protocol['window']} tokens, stride {protocol['stride']}, {protocol['bos']}; "
        f"{first['tokens']} tokens predicted in {first['windows']} windows."
    )
    return Table("Text", note, head, rows)


def tasks_table(results: Sequence[Result]) -> Table:
    names = list(
        dict.fromkeys((task, metric) for r in results for task in r["tasks"] for metric in r["tasks"][task]["metrics"])
    )
    rows = []
    for task, metric in names:
        found = [r["tasks"].get(task, {}).get("metrics", {}).get(metric) for r in results]
        rows.append([task_label(task, metric), *(plus_minus(entry) for entry in found)])
    counts = dict.fromkeys(f"{task} {r['tasks'][task]['samples']}" for r in results for task in r["tasks"])
    note = f"lm-eval's own numbers, ± one standard error. Items: {', '.join(counts)}."
    return Table("lm-eval", note, ["metric", *(r["label"] for r in results)], rows)


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


def plus_minus(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    if entry["stderr"] is None or math.isnan(entry["stderr"]):
        return f"{entry['value']:.4f}"
    return f"{entry['value']:.4f} ± {entry['stderr']:.4f}"


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
        cells = [[in_a_cell(cell) for cell in row] for row in (table.head, *table.rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        rule = "|---|" + "---:|" * (len(table.head) - 1)
        parts.append("\n".join([f"## {table.title}", "", lines[0], rule, *lines[1:], "", plain(table.note), ""]))
    return "\n".join([*parts, plain(footer(results)), ""])


def plain(text: str) -> str:
    """For Markdown, without the markup that a model's or a file's name may bring, and in one line."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[").split())


def in_a_cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


def page(results: Sequence[Result]) -> str:
    """The HTML page: pictures are inline SVG."""
    parts = []
    for table in tables(results):
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
        parts.append(f"<h2>{table.title}</h2>\n<table><tr>{head}</tr>\n{rows}</table>\n<p>{html.escape(table.note)}</p>")
    if scatter(results):
        parts.insert(1, f"<figure>{scatter(results)}</figure>")
    if len(results) > 1 and differences(results):
        parts.append(f"<figure>{intervals(differences(results))}</figure>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style></head>\n'
        f"<body><h1>Evaluation</h1>\n{body}\n<p>{html.escape(footer(results))}</p></body></html>\n"
    )


def footer(results: Sequence[Result]) -> str:
    versions = " ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    return f"{versions}; {results[0]['device']}."


def scatter(results: Sequence[Result]) -> str:
    """Bits per byte against bits per weight as SVG; nothing where fewer than two models have both."""
    points = [
        (r["bits_per_weight"], r["text"]["bits_per_byte"], r["label"]) for r in results if r["text"] and r["bits_per_weight"]
    ]
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    low, high = min(ys), max(ys)
    margin = 0.1 * (high - low) or 0.1 * high
    bottom = max(300, 60 + 15 * len(points))
    x_at = axis(0, 1.15 * max(xs), 70, 680)
    y_at = axis(low - margin, high + margin, bottom, 20)
    marks = [f'<path d="M70 20V{bottom}H680" fill="none" stroke="#888"/>']
    for x in range(0, int(1.15 * max(xs)) + 1, 2 if max(xs) < 20 else 4):
        marks.append(f'<text x="{x_at(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x}</text>')
    for y in (low, high):
        marks.append(f'<text x="62" y="{y_at(y) + 4:.1f}" text-anchor="end">{y:.4f}</text>')
    spots = sorted((y_at(y), x_at(x), label) for x, y, label in points)
    for (y, x, label), at in zip(spots, spread([(y, x) for y, x, _ in spots]), strict=True):
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#2563a8"/>')
        marks.append(f'<path d="M{x + 5:.1f} {y:.1f}L{x + 26:.1f} {at:.1f}" stroke="#aaa"/>')
        marks.append(f'<text x="{x + 29:.1f}" y="{at + 4:.1f}">{html.escape(label)}</text>')
    marks.append(f'<text x="375" y="{bottom + 42}" text-anchor="middle">bits per weight</text>')
    marks.append('<text x="70" y="13">bits per byte of the text (lower is better)</text>')
    return svg(900, bottom + 50, marks, "bits per byte against bits per weight")


def spread(spots: Sequence[tuple[float, float]]) -> list[float]:
    """Heights for the labels of points (y, x), from the top down, none over another: each at its point, or the next free below."""
    placed: list[tuple[float, float]] = []
    for y, x in spots:
        while any(abs(y - above) < 14 and abs(x - beside) < 220 for above, beside in placed):
            y += 1
        placed.append((y, x))
    return [y for y, _ in placed]


def intervals(compared: Sequence[tuple[str, str, Difference]]) -> str:
    """Each difference with two standard errors to both sides, in units of its standard error, as SVG."""
    scores = [(f"{metric}: {label}", change.value / change.stderr) for label, metric, change in compared if change.stderr > 0]
    reach = max([4.0, *(min(abs(z), 30.0) + 2 for _, z in scores)])
    x_at = axis(-reach, reach, 330, 790)
    height = 50 + 22 * len(scores)
    marks = [f'<path d="M{x_at(0):.1f} 26V{height - 18}" stroke="#888"/>']
    for row, (name, z) in enumerate(scores):
        y, z = 40 + 22 * row, max(-30.0, min(30.0, z))
        colour = "#888" if abs(z) <= 2 else "#b3261e"
        marks.append(f'<text x="320" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>')
        marks.append(f'<path d="M{x_at(z - 2):.1f} {y}H{x_at(z + 2):.1f}" stroke="{colour}" stroke-width="2"/>')
        marks.append(f'<circle cx="{x_at(z):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    marks.append(
        f'<text x="{x_at(0):.1f}" y="15" text-anchor="middle">difference to the first, in standard errors (bar: ± 2)</text>'
    )
    return svg(820, height, marks, "differences in standard errors")


def axis(low: float, high: float, start: float, end: float) -> Any:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def svg(width: int, height: int, marks: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-size="12" '
        f'font-family="system-ui,sans-serif" role="img"><title>{title}</title>{"".join(marks)}</svg>'
    )
