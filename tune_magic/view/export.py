"""The card of an export: what was written, and its receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_magic.exporters.model_card import MODELS
from tune_magic.storage.events import number
from tune_magic.view import words
from tune_magic.view.html import (
    GREEN,
    ORANGE,
    RED,
    Bundle,
    box,
    bundle,
    code,
    details,
    div,
    grey,
    heading,
    rule,
    span,
    table,
)

_USES = {
    "adapter": "from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, {path!r})",
    "merged": "from transformers import {model}\nmodel = {model}.from_pretrained({path!r})",
    "gguf": (
        "# in a terminal: llama-server -m {path}/model.gguf\n"
        "# Transformers reads the file too, but overlooks the slowed positions of Llama 3"
    ),
    "onnx_adapters": (
        'import onnxruntime\nsession = onnxruntime.InferenceSession({path!r} + "/model.onnx")\n'
        "adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()\n"
        'adapter.Load({path!r} + "/{adapter}")\n'
        "options.add_active_adapter(adapter)  # session.run(None, feeds, options); without options, the base"
    ),
    "onnx SEQ_CLS": (
        "import onnxruntime\nfrom transformers import AutoTokenizer\n"
        'session = onnxruntime.InferenceSession({path!r} + "/model.onnx")\n'
        "tokenizer = AutoTokenizer.from_pretrained({path!r})\n"
        'logits = session.run(None, dict(tokenizer(texts, return_tensors="np", padding=True)))[0]'
    ),
    "onnx CAUSAL_LM": (  # traced: nothing but onnxruntime runs it
        'import onnxruntime\nsession = onnxruntime.InferenceSession({path!r} + "/model.onnx")\n'
        "[(node.name, node.shape) for node in session.get_inputs()]  # present.* is the next call's past_key_values.*"
    ),
    "onnx genai": (
        "import onnxruntime_genai as og\nfrom transformers import AutoTokenizer\n"
        "model, tokenizer = og.Model({path!r}), AutoTokenizer.from_pretrained({path!r})\n"
        "generator = og.Generator(model, og.GeneratorParams(model))\n"
        "generator.append_tokens({tokens})\n"
        "while not generator.is_done():\n    generator.generate_next_token()\n"
        "print(tokenizer.decode(generator.get_sequence(0)))"
    ),
}
_ROUNDED_BASE = (  # what was trained makes up for what these weights lost
    "# base_model: loaded with quantization_config=BitsAndBytesConfig(load_in_4bit=True,\n"
    "#     bnb_4bit_quant_type={kind!r}, bnb_4bit_use_double_quant={double_quant})\n"
)
_TOKENS = {
    True: 'tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]',
    False: 'tokenizer(text)["input_ids"]',
}
_VERDICTS = {True: (GREEN, "the same model, within tolerance"), False: (RED, "out of tolerance"), None: (ORANGE, "")}


def export_card(receipt: dict[str, Any], name: str) -> Bundle:
    """Return the card of an export."""
    parity = receipt.get("parity", {"ok": None, "complaints": []})
    colour, verdict = _VERDICTS[parity["ok"]]
    if parity["ok"] and receipt.get("quantize"):
        verdict = f"close to the trained model, within the limits of {receipt['quantize']}"
    elif parity["ok"] and "quantization" in receipt:
        verdict = f"{_merged_into(receipt['quantization'])}, within tolerance"
    kind = f"{receipt['to']} {receipt['quantize']}" if receipt.get("quantize") else receipt["to"]
    size = words.size(receipt["size_bytes"])
    title = f"exported as {kind} · {size} · checkpoint of step {receipt['step']}"
    path = _short(receipt["path"])
    files: list[list[object]] = [[grey(file), words.size(size_of)] for file, size_of in receipt["files"].items()]
    facts = [*receipt_facts(parity), *_session_facts(receipt.get("session"))]
    rows: list[list[object]] = [[grey(key), value] for key, value in facts]
    complaints = [str(text) for text in parity["complaints"]]
    body = [
        heading(colour, name, title, ""),
        div(span("● ", style=f"color:{colour}"), verdict) if verdict else None,
        table(rows) if rows else None,
        table(_session_rows(receipt["session"]), align="lrr") if receipt.get("session", {}).get("tried") else None,
        table([_ADAPTER_HEAD, *_adapter_rows(receipt)], align="lrrrrr") if "adapters" in receipt else None,
        *(div(span("▲ ", style=f"color:{ORANGE}"), text) for text in complaints),
        rule(div(code(path)), div(code(usage(receipt, path)), style="margin-top:6px")),
        details(f"{len(files)} files", table(files, align="lr")),
    ]
    lines = [f"{name}: {title}", *([f"  {verdict}"] if verdict else []), *(f"  {key}: {value}" for key, value in facts)]
    lines += [f"  {' · '.join(str(cell) for cell in row)}" for row in _adapter_rows(receipt)]
    lines += [f"  ! {text}" for text in complaints]
    return bundle(box(*(part for part in body if part)), [*lines, f"  {path}"])


def _merged_into(quantization: dict[str, Any]) -> str:
    """Say what the files are, of a run whose base was quantised."""
    if quantization["makes_up_for_rounding"]:
        return f"the trained model, its {quantization['kind']} weights unpacked"
    return f"the tuning on the base in full precision; it was trained on {quantization['kind']} weights"


def _session_facts(session: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return what computes and why, and the settings that were fastest."""
    if session is None:
        return []
    found = [("runs on", f"{session['provider']}: {session['why']} (offered: {', '.join(session['offered'])})")]
    if session["tried"]:
        best, count = session["best"], len(session["tried"])
        more = f", {session['left_out']} left out for time" if session["left_out"] else ""
        found.append(("fastest of", f"{count} settings: {_threads(best)}, graph level {best['level']}{more}"))
    return found


def _session_rows(session: dict[str, Any]) -> list[list[object]]:
    """Return a line for each setting that was tried, the fastest first."""
    head: list[object] = [grey("threads"), grey("graph level"), grey("latency")]
    ordered = sorted(session["tried"], key=lambda one: number(one["seconds"]))
    return [head, *([str(one["threads"]), one["level"], f"{1000 * one['seconds']:.2f} ms"] for one in ordered)]


def _threads(settings: dict[str, Any]) -> str:
    count = settings["threads"]
    return f"{count} thread{'' if count == 1 else 's'}" if count else "threads as onnxruntime likes"


_ADAPTER_HEAD: list[object] = [
    grey(text) for text in ("adapter", "rank", "layers", "same answers", "largest logit difference", "latency")
]


def _adapter_rows(receipt: dict[str, Any]) -> list[list[object]]:
    """Return a line for each adapter on a base, and one for the base with none."""
    if "adapters" not in receipt:
        return []
    about = {**receipt["adapters"], "base": {"rank": "–", "layers": "–", "parity": receipt["base"]}}
    return [[name, str(one["rank"]), str(one["layers"]), *_figures(one["parity"])] for name, one in about.items()]


def _figures(parity: dict[str, Any]) -> list[str]:
    """Return same answers, largest logit difference and latency of a comparison, in short."""
    if "rows" not in parity:
        return ["–"] * 3
    difference, largest = number(parity["logit_difference"]), number(parity["largest_logit"])
    return [
        f"{parity['same_answers']} of {parity['rows']}",
        f"{difference:.2g} ({difference / largest if largest else 0.0:.2%})",
        f"{1000 * parity['exported_seconds']:.1f} ms",
    ]


def receipt_facts(parity: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what a comparison found."""
    if "rows" not in parity:
        return []
    count = parity["rows"]
    difference, largest = number(parity["logit_difference"]), number(parity["largest_logit"])
    share = difference / largest if largest else 0.0
    trained, exported = parity["trained_seconds"], parity["exported_seconds"]
    found = [
        ("compared on", f"{count} {parity['split']} rows, one at a time"),
        ("largest logit difference", f"{difference:.2g} ({share:.2%} of {words.value(largest)})"),
        ("same answers", f"{parity['same_answers']} of {count}"),
    ]
    if parity["trained_right"] is not None:
        found.append(
            ("right answers", f"trained {parity['trained_right']}, exported {parity['exported_right']} of {count}")
        )
    if "on_quantized" in parity:
        apart = parity["on_quantized"]
        difference, largest = number(apart["logit_difference"]), number(apart["largest_logit"])
        share = difference / largest if largest else 0.0
        same = f"{apart['same_answers']} of {count} answers the same, largest logit difference {difference:.2g} ({share:.1%})"
        found.append(("than on quantised weights", same))
    speed = trained / exported if exported else float("inf")
    each = f"{1000 * trained:.1f} ms → {1000 * exported:.1f} ms"
    if parity.get("computed_by") == "Transformers":
        found.append(("measured by", "Transformers, its numbers unpacked; llama.cpp rounds activations too"))
    by = "" if parity.get("computed_by", "PyTorch") == "PyTorch" else f", by {parity['computed_by']}"
    if parity.get("trained_loss") is not None:
        losses = f"{number(parity['trained_loss']):.4f} → {number(parity['exported_loss']):.4f}"
        found.append(("loss of what was right", losses))
    return [*found, ("latency", f"{each} a {parity.get('unit', 'row')}{by}, {speed:.1f} times as fast")]


def usage(receipt: dict[str, Any], path: str) -> str:
    """Return the Python that loads an export lying at `path` without this package."""
    task, files = receipt.get("task", "CAUSAL_LM"), receipt["files"]
    kind = "genai" if "genai_config.json" in files else task
    to = "onnx" if receipt["to"] == "genai" else receipt["to"]
    template = _USES.get(to) or _USES.get(f"{to} {kind}", "")
    tokens = _TOKENS["chat_template.jinja" in files]
    if receipt["to"] == "adapter" and receipt.get("new_tokens"):
        template = f"base_model.resize_token_embeddings({receipt['vocab_size']}, mean_resizing=False)  # room for new words\n{template}"
    adapter = next((about["file"] for about in receipt.get("adapters", {}).values()), "")
    quantization = receipt.get("quantization")
    if receipt["to"] == "adapter" and quantization and quantization["makes_up_for_rounding"]:
        template = _ROUNDED_BASE.format(**quantization) + template
    return template.format(path=path, model=MODELS.get(task, "AutoModel"), tokens=tokens, adapter=adapter)


def _short(path: str) -> str:
    """Return the path from the working directory where it lies inside: a saved card then fits other machines."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
