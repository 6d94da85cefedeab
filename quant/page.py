"""The report of a quantization as one HTML page: no scripts, nothing from elsewhere, for light and dark screens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["page"]

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 60, 44  # of a plot; its margins

_STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --faint: #6a7280; --line: #d5d9e0; --back: #fff; --one: #1763b6;
  --other: #c2570c; --good: #1a7f37; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ee; --faint: #9aa3b2; --line: #3a4150; --back: #14171c;
  --one: #6cb0ff; --other: #ffab66; --good: #56d364; --bad: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 780px;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
svg text.strong { fill: var(--text); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: 0.15rem 0.7rem 0.15rem 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); } .faint { color: var(--faint); }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page of `Report.as_json()`; plots of what the gate measured stand in it where there was one."""
    gate = report.get("gate")
    parts = [
        "<!doctype html>", '<html lang="en">', '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(_name(report))}</title>", f"<style>{_STYLE}</style>", f"<h1>{escape(_name(report))}</h1>",
        *_summary(report),
    ]  # fmt: skip
    if gate:
        parts += _gate(gate)
    parts += ["<h2>Bits per tensor</h2>", '<div class="wide">', *_bits(report["tensors"]), "</div>"]
    parts += ["<h2>Tensors</h2>", *_tensors(report["tensors"]), "</html>"]
    return "\n".join(parts) + "\n"


def _name(report: Mapping[str, Any]) -> str:
    return f"{report['out'] or report['source']}: {report['recipe']}"


def _summary(report: Mapping[str, Any]) -> Iterator[str]:
    yield "<table>"
    yield f"<tr><th>source<td>{escape(report['source'])}"
    for name, part in report["parts"].items():
        yield f"<tr><th>{escape(name)}<td>{part['nbytes']:,} bytes, {part['bits_per_weight']:.3f} bits per weight"
    yield f"<tr><th>whole<td>{report['nbytes']:,} bytes, {report['bits_per_weight']:.3f} bits per weight"
    if report["seconds"]:
        yield f"<tr><th>time<td>{report['seconds']:.1f} s"
    yield "</table>"


# --- what the gate measured ------------------------------------------------------------------------------------------


def _gate(gate: Mapping[str, Any]) -> Iterator[str]:
    kl, plain = gate["kl"], gate["plain_rounding"]
    verdict = '<span class="good">passed</span>' if gate["passed"] else '<span class="bad">failed</span>'
    yield f"<h2>Check on text that was held out: {verdict}</h2>"
    yield (
        f'<p class="faint">{gate["chunks"]} chunks of {gate["context"]} tokens, {kl["positions"]:,} positions; '
        "float32 activations; beside it the same of plain rounding to the same bits.</p>"
    )
    yield '<table><tr><th><th class="n">this model<th class="n">plain rounding'
    rows = (
        ("mean KL divergence, nats", "mean", ".6f"), ("standard error", "mean_error", ".6f"),
        ("median", "median", ".6f"), ("99 %", "p99", ".5f"), ("99.9 %", "p999", ".5f"), ("largest", "max", ".4f"),
        ("same most likely token", "top1", ".2%"), ("perplexity", "perplexity", ".4f"),
        ("perplexity of the source", "reference_perplexity", ".4f"),
        ("ln of the ratio", "delta_ln_perplexity", "+.5f"),
    )  # fmt: skip
    for title, key, form in rows:
        yield f'<tr><td>{title}<td class="n">{_number(kl[key], form)}<td class="n">{_number(plain["kl"][key], form)}'
    yield "</table>"
    for one in gate["verdicts"]:
        if not one["passed"]:
            found = f"{one['found']:.3g}, expected at most {one['bound']:.3g}"
            yield f'<p class="bad">{escape(one["what"])} is {found}</p>'
    yield "<h2>Error after each layer</h2>"
    yield '<p class="faint">Squared error of the hidden states over their squares; dashed: plain rounding.</p>'
    yield from _lines(list(gate["drift"]), list(gate["drift"].values()), list(plain["drift"].values()))
    yield "<h2>KL divergence by position</h2>"
    yield '<p class="faint">How many positions have so much, in nats.</p>'
    yield from _histogram(gate["kl_histogram"]["edges"], gate["kl_histogram"]["counts"])


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None or not math.isfinite(value) else format(value, form)


def _lines(names: Sequence[str], found: Sequence[float], plain: Sequence[float]) -> Iterator[str]:
    """Two lines over the steps, on a logarithmic axis."""
    shown = [x for x in (*found, *plain) if math.isfinite(x) and x > 0] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = max(high, low + 1)
    step = (WIDTH - LEFT - 10) / max(1, len(names) - 1)

    def place(i: int, x: float) -> str:
        up = (math.log10(x) - low) / (high - low) if math.isfinite(x) and x > 0 else 0.0
        return f"{LEFT + i * step:.1f},{_y(up):.1f}"

    yield _open("NMSE of what comes out of each step")
    for power in range(low, high + 1):
        yield from _rule(_y((power - low) / (high - low)), f"1e{power}")
    every = max(1, len(names) // 12)
    for i, name in enumerate(names):
        if i % every == 0 or i == len(names) - 1:
            label = escape(name.removeprefix("layer."))
            yield f'<text x="{LEFT + i * step:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{label}</text>'
    for style, values in (("var(--other)", plain), ("var(--one)", found)):
        points = " ".join(place(i, x) for i, x in enumerate(values))
        dashed = ' stroke-dasharray="5 4"' if values is plain else ""
        yield f'<polyline points="{points}" fill="none" stroke="{style}" stroke-width="2"{dashed}/>'
    for i, (name, x) in enumerate(zip(names, found, strict=True)):
        x_at, y_at = place(i, x).split(",")
        yield f'<circle cx="{x_at}" cy="{y_at}" r="3" fill="var(--one)"><title>{escape(name)}: {x:.3g}</title></circle>'
    yield "</svg>"


def _histogram(edges: Sequence[float], counts: Sequence[int]) -> Iterator[str]:
    """Bars on a logarithmic axis of KL divergence; the first one holds everything below, the last everything above."""
    most, width = max(1, *counts), (WIDTH - LEFT - 10) / len(counts)
    yield _open("How many positions have which KL divergence")
    for share in (0.0, 0.5, 1.0):
        yield from _rule(_y(share), f"{most * share:,.0f}")
    for i, count in enumerate(counts):
        x, top = LEFT + i * width, _y(count / most)
        above = f"above {edges[-1]:.2g}" if i == len(edges) else f"up to {edges[i]:.2g}"
        yield (
            f'<rect x="{x + 0.5:.1f}" y="{top:.1f}" width="{max(width - 1, 1):.1f}" height="{_y(0) - top:.1f}" '
            f'fill="var(--one)"><title>{above}: {count:,}</title></rect>'
        )
    for i, edge in enumerate(edges):
        power = math.log10(edge)
        if abs(power - round(power)) < 1e-6:
            x = LEFT + (i + 1) * width
            yield f'<text x="{x:.1f}" y="{HEIGHT - 24}" text-anchor="middle">1e{round(power)}</text>'
    yield "</svg>"


def _open(title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'


def _y(share: float) -> float:
    """Where a share of the height stands."""
    return 10 + (1 - share) * (HEIGHT - BOTTOM - 10)


def _rule(y: float, label: str) -> Iterator[str]:
    yield f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
    yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


# --- what was written ------------------------------------------------------------------------------------------------


def _bits(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Matrices as a grid, kinds down and layers across: bits per weight of each, scales counted."""
    grid: dict[str, dict[int, float]] = {}
    for t in tensors:
        if len(t["shape"]) < 2 or t["part"] != "text":
            continue
        found = re.match(r"layers\.(\d+)\.(.*)", t["name"])
        kind, layer = (found[2], int(found[1])) if found else (t["name"], 0)
        grid.setdefault(kind.removesuffix(".weight"), {})[layer] = 8 * t["nbytes"] / math.prod(t["shape"])
    layers, cell, left = 1 + max((i for row in grid.values() for i in row), default=0), 26, 190
    yield (
        f'<svg viewBox="0 0 {left + layers * cell + 10} {len(grid) * cell + 24}" '
        f'width="{left + layers * cell + 10}" role="img" aria-label="Bits per weight of every matrix">'
    )
    for row, (kind, values) in enumerate(grid.items()):
        y = row * cell
        yield f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(kind)}</text>'
        for layer, bits in values.items():
            x, shown = left + layer * cell, f"{bits:.3g}" if bits < 10 else f"{bits:.0f}"
            fill, strength = ("var(--one)", bits / 14) if bits < 10 else ("var(--other)", 0.5)
            yield (
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" rx="3" fill="{fill}" '
                f'fill-opacity="{strength:.2f}"><title>{escape(kind)}, layer {layer}: {bits:.3f}</title></rect>'
                f'<text x="{x + cell / 2 - 1}" y="{y + 16}" text-anchor="middle" class="strong">{shown}</text>'
            )
    for layer in range(layers):
        middle = left + layer * cell + cell / 2 - 1
        yield f'<text x="{middle}" y="{len(grid) * cell + 14}" text-anchor="middle">{layer}</text>'
    yield "</svg>"


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield '<details><summary>All of them</summary><div class="wide"><table>'
    yield '<tr><th>tensor<th>shape<th>type<th class="n">bytes<th class="n">NMSE<th>'
    for t in tensors:
        error = "" if t["nmse"] is None else f"{t['nmse']:.2e}"
        size = " x ".join(map(str, t["shape"]))
        yield (
            f'<tr><td>{escape(t["name"])}<td>{size}<td>{escape(t["type"])}<td class="n">{t["nbytes"]:,}'
            f'<td class="n">{error}<td>{escape(t["note"])}'
        )
    yield "</table></div></details>"
