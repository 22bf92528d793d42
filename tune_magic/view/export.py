"""The card of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_magic.view import words
from tune_magic.view.frame import Bundle
from tune_magic.view.html import GREEN, box, bundle, code, div, grey, heading, table

_USES = {
    "adapter": "from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, {path!r})",
    "merged": "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({path!r})",
}


def export_card(receipt: dict[str, Any], name: str) -> Bundle:
    """Return the card of an export."""
    size = words.size(receipt["size_bytes"])
    title = f"exported as {receipt['to']} · {size} · checkpoint of step {receipt['step']}"
    path = _short(receipt["path"])
    use = _USES.get(receipt["to"], "").format(path=path)
    files: list[list[object]] = [[grey(file), words.size(size_of)] for file, size_of in receipt["files"].items()]
    body = [heading(GREEN, name, title, ""), div(code(path)), table(files, align="lr")]
    body += [div(code(use), style="margin-top:8px")] if use else []
    return bundle(box(*body), [f"{name}: {title}", f"  {path}"])


def _short(path: str) -> str:
    """Return the path from the working directory where it lies inside: a saved card then fits other machines."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
