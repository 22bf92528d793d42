"""The one place that makes HTML, and the one escaper.

Everything from data, models, logs and exceptions is escaped here; only inline styles, tables and data images are used,
since a notebook that is not trusted loses all else. Colours are mid-tones that read on light and dark pages.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable

BLUE, GREEN, ORANGE, RED, GREY = "#4c8dff", "#2eb67d", "#ff9d3c", "#e5534b", "#8a8f98"
LINE = "rgba(138,143,152,.3)"
TRACK = "rgba(138,143,152,.2)"
MARK = "rgba(76,141,255,.22)"
_MOST_CHARACTERS = 2000
_MOST_TEXT = 8000
_MOST_LINE = 400
# terminal sequences (colours, window titles), control characters, and marks that turn the direction of text
_INVISIBLE = re.compile(
    "(?:\x1b\\[|\x9b)[0-9;?]*[A-Za-z]|(?:\x1b\\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


Bundle = dict[str, str]


class Html(str):
    """A piece of HTML that is safe to put into a page."""

    __slots__ = ()


def clean(text: object, limit: int = _MOST_CHARACTERS) -> str:
    """Return text without terminal codes and invisible marks, cut to `limit` characters."""
    plain = _INVISIBLE.sub("", str(text))
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def escape(text: object, limit: int = _MOST_CHARACTERS) -> Html:
    """Return `text` as HTML that shows it and does nothing else.

    Example:
        >>> escape("<b>&")
        '&lt;b&gt;&amp;'
    """
    plain = clean(text, limit)
    while len(html.escape(plain)) > 2 * limit:  # quotes and angles grow six times
        plain = plain[: len(plain) // 2] + "…"
    return Html(html.escape(plain))


def tag(name: str, *children: object, style: str = "", **attributes: str) -> Html:
    """Return an element; children that are not `Html` are escaped, None is left out."""
    settings = {"style": style, **attributes}
    shown = "".join(f' {key}="{html.escape(value)}"' for key, value in settings.items() if value)
    if name in ("img", "br"):
        return Html(f"<{name}{shown}>")
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None)
    return Html(f"<{name}{shown}>{inner}</{name}>")


def div(*children: object, style: str = "") -> Html:
    """Return a block."""
    return tag("div", *children, style=style)


def span(*children: object, style: str = "") -> Html:
    """Return a piece of a line."""
    return tag("span", *children, style=style)


def grey(*children: object, size: int = 12) -> Html:
    """Return quiet text."""
    return span(*children, style=f"color:{GREY};font-size:{size}px")


def code(text: object) -> Html:
    """Return text in a fixed-width face."""
    return tag("code", text, style="background:none;padding:0;white-space:pre-wrap;overflow-wrap:anywhere")


def word(text: object) -> Html:
    """Return a name in a fixed-width face, in one piece."""
    return span(text, style="white-space:nowrap;font-family:ui-monospace,Menlo,Consolas,monospace")


def ticked(text: str) -> Html:
    """Return a text with what stands between backticks as code."""
    return span(*(code(part) if number % 2 else part for number, part in enumerate(text.split("`"))))


def image(svg: bytes, alt: str) -> Html:
    """Return a picture as a data URI, which survives where inline svg does not."""
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return tag("img", style="width:100%;max-width:100%;margin:0", src=source, alt=alt)


def bar(share: float, colour: str, height: int = 4) -> Html:
    """Return a bar filled to `share`, from 0 to 1."""
    percent = round(100 * min(max(share, 0.0), 1.0))
    box = f"height:{height}px;border-radius:{height // 2}px"
    return div(div(style=f"width:{percent}%;background:{colour};{box}"), style=f"width:100%;background:{TRACK};{box}")


def table(rows: list[list[object]], *, align: str = "") -> Html:
    """Return a table without rules; `align` has one letter a column, l or r."""
    lines = []
    for row in rows:
        cells = [
            tag(
                "td",
                cell,
                style=f"padding:2px 18px 2px 0;border:none;background:none;vertical-align:top;font-size:13px;"
                f"text-align:{'right' if align[i : i + 1] == 'r' else 'left'}",
            )
            for i, cell in enumerate(row)
        ]
        lines.append(tag("tr", *cells, style="background:none"))
    body = "border-collapse:collapse;border:none;margin:4px 0 0 0;color:inherit"
    return tag("table", tag("tbody", *lines), style=body)


def details(summary: str, *children: object) -> Html:
    """Return parts that open by a click."""
    return tag("details", tag("summary", grey(summary), style="cursor:pointer"), *children, style="margin-top:8px")


def box(*children: object) -> Html:
    """Return the frame around everything we show; None is left out."""
    font = "font-family:-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif;font-size:13px;line-height:1.45"
    return div(*children, style=f"max-width:980px;border:1px solid {LINE};border-radius:8px;padding:12px 14px;{font}")


def rule(*children: object) -> Html:
    """Return a part with a thin line above it."""
    return div(*children, style=f"border-top:1px solid {LINE};margin-top:8px;padding-top:8px")


def heading(colour: str, title: str, detail: str, right: str) -> Html:
    """Return the first line: a dot that tells the state, a name, what is going on, and when."""
    left = div(span("● ", style=f"color:{colour}"), tag("b", escape(title, 80)), " ", grey(detail, size=13))
    wrap = "display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 16px;margin-bottom:4px"
    return div(left, div(right, style=f"color:{GREY}"), style=wrap)


def bundle(markup: Html, lines: Iterable[str]) -> Bundle:
    """Return HTML with its plain text, cleaned and cut as well: terminals obey codes as browsers obey tags."""
    kept = [clean(line, _MOST_LINE) for text in lines for line in text.split("\n")]
    return {"text/html": markup, "text/plain": clean("\n".join(kept), _MOST_TEXT)}


def note_bundle(text: str) -> Bundle:
    """Return one quiet line as HTML and as text."""
    return bundle(div(grey(text, size=13)), [text])


def stacked(*bundles: Bundle) -> Bundle:
    """Return bundles below each other as one."""
    parts = [Html(found["text/html"]) for found in bundles if "text/html" in found]
    texts = [found["text/plain"] for found in bundles if found["text/plain"]]
    return bundle(div(*parts), texts) if parts else {"text/plain": "\n".join(texts)}
