"""What an epoch is made of, and what became of rows that were not as they should be, in words."""

from __future__ import annotations

from typing import Any

from tune_magic.view import words
from tune_magic.view.compression import compressed
from tune_magic.view.html import clean

_MOST_PARTS = 12
_MOST_ROWS = 8
_SHOWN = 3
_EXCERPT = 80
_LONGEST_NAME = 40
_MENDED = ("encoding", "personal", "secrets")


def made_of(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what an epoch is made of, and of rows that were mended, left out or skipped."""
    rows = []
    if "mixture" in facts:
        parts = [f"{_name(part)} {100 * part['share']:.0f} % ({_drawn(part)})" for part in facts["mixture"]]
        rows.append(("an epoch", ", ".join(parts[:_MOST_PARTS])))
    objective = facts.get("objective", {})
    if "weights" in objective:
        pairs = zip(objective["classes"], objective["weights"], strict=True)
        weights = [f"{clean(name, _LONGEST_NAME)} {weight:.3g}" for name, weight in pairs]
        more = ", …" if len(weights) > _MOST_PARTS else ""
        rows.append(("a row counts, by class", ", ".join(weights[:_MOST_PARTS]) + more))
    if "teacher" in facts:
        rows.append(("teacher", _teacher(facts["teacher"])))
    if "taught" in facts:
        rows.append(("answered by the teacher", _answered(facts["taught"])))
    rows += compressed(facts)
    if "retain" in facts:
        rows.append(("kept near its start by", _retained(facts["retain"])))
    if "vocabulary" in facts:
        rows.append(("new words", _new_words(facts["vocabulary"])))
    for found in facts.get("augmented", []):
        shown = "; ".join(f"{_short(old)} → {_short(new)}" for old, new in found["shown"])
        verb = "to be made" if found.get("is_preview") else "made"
        rows.append((f"{verb} by {found['kind']}", f"{_counted(found['rows'])} ({shown})"))
    for found in facts.get("cleaned", []):
        verb = "mended" if found["kind"] in _MENDED else "left out"
        where = "" if len(facts.get("mixture", [])) < 2 else f" of {_tail(found['source'])}"
        rows.append((f"cleaned: {found['kind']}", f"{_counted(found['count'])} {verb}{where}{rows_named(found)}"))
    for name, found in facts.get("skipped", {}).items():
        first = "; ".join(f"{row['place']}: {_short(row['problem'])}" for row in found["rows"][:_SHOWN])
        more = ", …" if found["count"] > _SHOWN else ""
        rows.append(("skipped", f"{_counted(found['count'], 'bad row')} of {_tail(name)} ({first}{more})"))
    return rows


def _teacher(found: dict[str, Any]) -> str:
    """Say who teaches, and what it costs to have it beside the student."""
    name = _tail(found["name"]) if found["kind"] != "address" else clean(found["name"], _EXCERPT)
    parameters = found.get("parameters")
    if parameters is None:
        return name
    return f"{name} ({words.count(parameters)} parameters beside)" if parameters else f"{name} (the base itself)"


def _answered(found: dict[str, Any]) -> str:
    left_out = f", {found['left_out']} left out without an answer" if found["left_out"] else ""
    return f"{_counted(found['rows'])}{left_out} ({'; '.join(map(_short, found['shown']))})"


def _retained(found: dict[str, Any]) -> str:
    """Name the penalties with their factors."""
    named = {
        "l2_sp": "L2-SP", "kl_base": "KL to the base", "ewc": f"EWC on {_tail(found.get('ewc_data', ''))}",
    }  # fmt: skip
    return ", ".join(f"{name} × {found[key]:g}" for key, name in named.items() if key in found)


def _new_words(found: dict[str, Any]) -> str:
    """Say how many words became tokens, the first of them, and what that saves."""
    shown = ", ".join(clean(word, _LONGEST_NAME) for word in found["examples"])
    more = ", …" if found["added"] > len(found["examples"]) else ""
    saved = f"{found['fertility_before']:.2f} → {found['fertility_after']:.2f} tokens a word"
    return f"{_counted(found['added'], 'token')} ({shown}{more}), {saved} of {_tail(found['corpus'])}"


def _counted(count: int, noun: str = "row") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _short(text: str) -> str:
    return clean(" ".join(text.split()), _EXCERPT)


def _tail(name: str) -> str:
    return clean(words.tail(name), _LONGEST_NAME)


def _name(part: dict[str, Any]) -> str:
    label = f", {clean(part['class'], _LONGEST_NAME)}" if "class" in part else ""
    return f"{_tail(part['name'])}{label}{' (replay)' if part.get('replay') else ''}"


def _drawn(part: dict[str, Any]) -> str:
    all_once = part["per_epoch"] == part["rows"]
    return f"{part['rows']} rows" if all_once else f"{part['per_epoch']} drawn of {part['rows']} rows"


def rows_named(finding: dict[str, Any]) -> str:
    """Return the numbers of the first rows of a finding, in brackets."""
    if not finding["rows"]:
        return ""
    shown = finding["rows"][:_MOST_ROWS]
    more = ", …" if finding["count"] > len(shown) else ""
    return f" (rows {', '.join(map(str, shown))}{more})"
