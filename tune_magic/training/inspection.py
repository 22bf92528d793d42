"""The data job: rows as they would be trained, without a model's weights."""

from __future__ import annotations

from typing import Any

from tune_magic import plugins
from tune_magic.data import quality
from tune_magic.data.locate import read
from tune_magic.data.read import RowFaults
from tune_magic.models.find import find_model
from tune_magic.models.load import local_folder
from tune_magic.recipe.build import build_recipe
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.dataset import Rows
from tune_magic.training.prepare import longest_example
from tune_magic.training.source import Progress
from tune_magic.training.vocabulary import vocabulary_of

_PREVIEWED = 8  # rows that each augmenter makes, for people to look at


def inspect(run: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Read, split and encode the rows of a recipe and log what they are; returns the fields of the last state event."""
    recipe = build_recipe(run.info["recipe"])
    model_folder = local_folder(find_model(recipe.model))
    method = plugins.get("method", recipe.method.name)(recipe.method)
    vocabulary = vocabulary_of(recipe, run.path, model_folder, method, control.check)
    scan = quality.TextScan()
    longest = longest_example(recipe, model_folder, method, vocabulary)
    reading = Progress(log)
    rows = Rows(
        recipe, run.path, vocabulary.tokenizer, longest, look=control.check, tell=reading.tell, watch=scan.look,
        preview=_PREVIEWED,
    )  # fmt: skip
    dataset = rows.dataset()
    facts = rows.facts(dataset)
    first = next(iter(read(recipe.data.train, run.path, RowFaults(recipe.data.train, skips=True))))
    log.append(
        "result",
        data=recipe.data.train,
        model=recipe.model,
        columns=list(first.values),
        lengths=quality.lengths(dataset.train),
        languages=scan.language_shares(),
        findings=quality.findings(dataset.train, dataset.held_out, facts["objective"].get("classes", []), scan),
        **facts,
        **vocabulary.facts(),
    )
    return {"state": "finished"}
