"""A report in a few lines."""


def scores_of(report: dict) -> dict[str, dict]:
    """By model, where a text was evaluated on."""
    return {name: value for name, value in report.items() if isinstance(value, dict) and "ppl" in value}


def summary(report: dict) -> str:
    """What a person wants to know at the end of a run."""
    linears = report["linears"]
    settings = report["settings"]
    lines = [f"{len(linears)} linears, {settings['format']}, {report['bytes'] / 1e6:.0f} MB, {report['seconds']:.0f} s"]
    measured = [linear for linear in linears if linear["error"] is not None]
    mean = {key: sum(linear[key] for linear in measured) / len(measured) for key in ("error", "rtn_error")}
    worst = max(measured, key=lambda linear: linear["error"])
    lines.append(f"relative output error: mean {mean['error']:.4f} (RTN absmax {mean['rtn_error']:.4f})")
    lines.append(f"                       largest {worst['error']:.4f}, {worst['name']}")
    apart = [linear["validation_error"] for linear in linears if linear["validation_error"] is not None]
    if apart:
        lines.append(f"outputs on held-out tokens, all that came before included: mean {sum(apart) / len(apart):.4f} off")
    if "allocation" in report:
        chosen = report["allocation"]
        what, _, usual = chosen["uniform"][0]
        kl = f"predicted KL {chosen['predicted_kl']:.5f} ({what} {usual:.5f})"
        lines.append(f"formats chosen: {chosen['bits']:.3f} bits a weight, {kl}")
    scores = scores_of(report)
    if scores:
        first = next(iter(scores.values()))
        lines.append(f"{first['tokens']} tokens in windows of {first['window']}, scored in {first['dtype']}:")
        lines.append(f"  {'':10} {'token ppl':>10} {'KL (nats)':>10}")
        lines += [f"  {name:10} {value['ppl']:10.3f} {value['kl']:10.5f}{plus_minus(value)}" for name, value in scores.items()]
        lines += against_rtn(report.get("kl_against_rtn"))
    if "samples" in report:
        prompt, *others = report["samples"].items()
        lines.append(f"greedily, after …{one_line(prompt[1])[-90:]}")
        lines += [f"  {name:10} {one_line(text)[:100]}" for name, text in others]
    if "reload_max_abs_diff" in report:
        lines.append(f"read back by transformers: max |logit difference| = {report['reload_max_abs_diff']:g}")
    return "\n".join(lines)


def plus_minus(score: dict) -> str:
    return f" ± {score['kl_stderr']:.5f}" if score["kl"] and score.get("kl_stderr") is not None else ""


def against_rtn(change: dict | None) -> list[str]:
    """A line where the windows are too few to tell the result from the baseline."""
    if change is None or not change["value"]:
        return []
    if change["stderr"] is None:
        return ["  one window gives no error bars and does not tell the result from rtn; evaluate on more"]
    if abs(change["value"]) > 2 * change["stderr"]:
        return []
    return [
        f"  KL against rtn {change['value']:+.5f} ± {change['stderr']:.5f}: {change['windows']} windows do not tell the two "
        f"apart; about {change['windows_needed']} would"
    ]


def one_line(text: str) -> str:
    return " ".join(text.split())
