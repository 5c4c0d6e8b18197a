"""A run's waiting times as a small SVG, readable in a browser and in a repository's page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tokenwire.bench.summary import Distribution, Summary

_WIDTH = 560
_LABEL_WIDTH = 48
_BAR_WIDTH = 400
_BAR_HEIGHT = 16
_ROW_HEIGHT = 22
_PANEL_GAP = 18
# Readable on a white and on a dark page.
_STYLE = "text{font:12px sans-serif;fill:#777}.title{font-weight:bold}rect{fill:#3b82c4}"


def render_svg(summary: Summary, title: str, load: str) -> str:
    """Horizontal bars: TTFT and inter-token latency, each with the percentiles that the run can carry.

    Each panel has a scale of its own, from zero.

    Args:
        title: what was measured.
        load: under which load.
    """
    panels = [
        ("Time to first token, ms", _bars(summary.ttft_ms)),
        ("Inter-token latency, ms", _bars(summary.itl_ms)),
    ]
    body = [
        f'<text class="title" x="8" y="20">{escape(title)}</text>',
        f'<text x="8" y="38">{escape(load)}</text>',
    ]
    y = 52 + _PANEL_GAP
    for name, bars in panels:
        body.append(f'<text x="8" y="{y}">{escape(name)}</text>')
        y += 8
        scale = max((value for _, value in bars), default=0.0) or 1.0
        for label, value in bars:
            width = max(1.0, _BAR_WIDTH * value / scale)
            middle = y + _BAR_HEIGHT - 4
            body.append(f'<text x="8" y="{middle}">{label}</text>')
            body.append(f'<rect x="{_LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="{_BAR_HEIGHT}"/>')
            body.append(f'<text x="{_LABEL_WIDTH + width + 6:.1f}" y="{middle}">{value:.1f}</text>')
            y += _ROW_HEIGHT
        y += _PANEL_GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}">'
    return "\n".join([head, f"<style>{_STYLE}</style>", *body, "</svg>", ""])


def _bars(distribution: Distribution | None) -> Sequence[tuple[str, float]]:
    if distribution is None:
        return ()
    named = (("p50", distribution.p50), ("p95", distribution.p95), ("p99", distribution.p99))
    return [(label, value) for label, value in named if value is not None]
