"""What an epoch is made of, and what became of rows that were not as they should be, in words."""

from __future__ import annotations

from typing import Any

from tune_magic.view import words

_MOST_PARTS = 12
_MOST_ROWS = 8
_EXCERPT = 80
_MENDED = ("encoding", "personal", "secrets")


def made_of(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what an epoch is made of, and of rows that were mended, left out or skipped."""
    rows = []
    if "mixture" in facts:
        parts = [f"{_name(part)} {100 * part['share']:.0f} % ({_drawn(part)})" for part in facts["mixture"]]
        rows.append(("an epoch", ", ".join(parts[:_MOST_PARTS])))
    for found in facts.get("augmented", []):
        shown = "; ".join(f"{_excerpt(old)} → {_excerpt(new)}" for old, new in found["shown"])
        verb = "to be made" if found.get("is_preview") else "made"
        rows.append((f"{verb} by {found['kind']}", f"{found['rows']} rows ({shown})"))
    for found in facts.get("cleaned", []):
        verb = "mended" if found["kind"] in _MENDED else "left out"
        where = "" if len(facts.get("mixture", [])) < 2 else f" of {words.tail(found['source'])}"
        noun = "row" if found["count"] == 1 else "rows"
        rows.append((f"cleaned: {found['kind']}", f"{found['count']} {noun} {verb}{where}{rows_named(found)}"))
    for name, found in facts.get("skipped", {}).items():
        first = "; ".join(f"{row['place']}: {row['problem']}" for row in found["rows"][:3])
        rows.append(("skipped", f"{found['count']} bad rows of {name} ({first}{', …' if found['count'] > 3 else ''})"))
    return rows


def _name(part: dict[str, Any]) -> str:
    label = f", {part['class']}" if "class" in part else ""
    return f"{words.tail(part['name'])}{label}{' (replay)' if part.get('replay') else ''}"


def _drawn(part: dict[str, Any]) -> str:
    all_once = part["per_epoch"] == part["rows"]
    return f"{part['rows']} rows" if all_once else f"{part['per_epoch']} drawn of {part['rows']} rows"


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _EXCERPT else f"{flat[:_EXCERPT]}…"


def rows_named(finding: dict[str, Any]) -> str:
    """Return the numbers of the first rows of a finding, in brackets."""
    if not finding["rows"]:
        return ""
    shown = finding["rows"][:_MOST_ROWS]
    more = ", …" if finding["count"] > len(shown) else ""
    return f" (rows {', '.join(map(str, shown))}{more})"
