"""Load a tuned model: base, method, and a run's best checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tune_magic import cell_code, plugins
from tune_magic.data.example import Example
from tune_magic.data.read import RowFaults
from tune_magic.data.render import Part
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models.compression import Compression, release
from tune_magic.models.find import find_model
from tune_magic.models.generate import generate
from tune_magic.models.load import local_folder
from tune_magic.objectives.base import Objective
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.schema import QuantizationOptions, Recipe
from tune_magic.storage import fingerprint
from tune_magic.storage.folder import RunFolder
from tune_magic.training import checkpoint, compress
from tune_magic.training.alike import objective_of
from tune_magic.training.dataset import Rows
from tune_magic.training.engine import Engine
from tune_magic.training.outputs import outputs_of
from tune_magic.training.prepare import build_model, device, load_base, longest_example, make_engine
from tune_magic.training.vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    import pandas as pd

Chat = list[dict[str, str]]


@dataclass
class Tuned:
    """A run's best checkpoint, loaded.

    Attributes:
        run: The run.
        recipe: Its recipe.
        objective: What was minimised, with what it learned of the rows.
        method: How parameters were made trainable.
        model: In evaluation mode, on the device.
        vocabulary: Its tokens.
        base: Folder of the base model.
        checkpoint: Where the weights are from. A run that goes on may have a better one by now.
        print: The checkpoint's fingerprint.
        compression: What was taken from the base before training.
    """

    run: RunFolder
    recipe: Recipe
    objective: Objective
    method: Method
    model: Any
    vocabulary: Vocabulary
    base: Path
    checkpoint: Path
    print: str
    compression: Compression | None = None

    @property
    def step(self) -> int:
        """The checkpoint's step."""
        return int(self.checkpoint.name.removeprefix("step-"))

    @property
    def tokenizer(self) -> Any:
        """What texts are encoded by for this model."""
        return self.vocabulary.tokenizer

    def rows(self, folder: Path | None = None, room: int = 0) -> Rows:
        """Return a reader of rows as this model was trained on; `folder` holds tables given as objects.

        Args:
            folder: The job folder; default: the run's.
            room: Rows may have so many tokens, where the model can read them, though it was trained on shorter ones.
        """
        roomy = self.recipe.model_copy(update={"max_length": max(room, self.recipe.max_length)})
        longest = longest_example(roomy, self.base, self.method, self.vocabulary)
        return Rows(self.recipe, folder or self.run.path, self.tokenizer, longest, self.objective)

    def asked(self, inputs: Sequence[Any]) -> list[Example]:
        """Return examples of what people want predictions for; their labels mean nothing.

        Raises:
            TuneError: They are not of the kind that the model reads.
        """
        contents = self.objective.asked(inputs)
        places = [f"input {number + 1}" for number in range(len(contents))]
        part = Part(contents, places, range(len(contents)), RowFaults("what was given"))
        examples = self.objective.examples(part, self.rows().renderer)
        part.faults.raise_if_any()
        return examples

    def predict(self, inputs: Sequence[Any]) -> pd.DataFrame:
        """Return what the model finds in inputs, one line each; see `asked`."""
        examples = self.asked(inputs)
        return self.objective.frame(outputs_of(self.engine(), self.objective, examples), examples)

    def load_base(self) -> Tuned:
        """Load the model once more as it was before it was compressed and trained, new parameters with their first values."""
        own = self.vocabulary.unextended()
        model = build_model(self.recipe, self.base, self.objective, self.method, torch.float32, vocabulary=own)
        return replace(self, model=model.to(device()).eval(), vocabulary=own)

    @property
    def holds_base(self) -> bool:
        """Whether the model without what was added is its base, whole."""
        return self.method.adds and self.compression is None

    @property
    def is_quantized(self) -> bool:
        """Whether its base is quantised."""
        return self.recipe.quantization.is_on

    def unquantised(self) -> Tuned:
        """Load the checkpoint once more, over a base of full precision, into which it can be merged.

        What a method trained to make up for rounding is put on the rounded matrices, unpacked.
        """
        if not self.is_quantized:
            return self
        plain = self.recipe.model_copy(update={"quantization": QuantizationOptions.model_validate({})})
        where = (self.base, self.objective, self.method, torch.float32)
        unpacked = self.method.makes_up_for_rounding
        model = build_model(
            self.recipe if unpacked else plain, *where, vocabulary=self.vocabulary, compression=self.compression,
            unpacked=unpacked,
        )  # fmt: skip
        checkpoint.restore(self.checkpoint, model)
        return replace(self, recipe=plain, model=model.to(device()).eval())

    def adapter_base(self) -> Any:
        """Load the base that an exported adapter is put on: in full precision, unless the adapter belongs on a rounded one."""
        if not self.method.makes_up_for_rounding:
            return self.objective.load(self.base, torch.float32)
        return load_base(recipe_of(self.run), self.base, self.objective, torch.float32)

    @contextlib.contextmanager
    def without_tuning(self) -> Iterator[Tuned]:
        """Yield the model as it was before training, by the tokens it had; only where it `holds_base`."""
        inner = self.method.inner(self.model)
        with self.method.without(self.model), self.vocabulary.hidden(inner):
            yield replace(self, vocabulary=self.vocabulary.unextended())

    def engine(self, model: Any = None) -> Engine:
        """Return an engine over this model, or over another of its kind, in float32."""
        return make_engine(self.recipe, model or self.model, self.method, self.objective, torch.float32)


def recipe_of(run: RunFolder) -> Recipe:
    """Return the recipe of a run.

    Raises:
        TuneError: It needs a plug-in of a cell that is not here.
    """
    cell_code.require(run)
    return build_recipe(run.info["recipe"])


def tokenizer_of(run: RunFolder) -> Any:
    """Return what a run encodes texts by."""
    recipe = recipe_of(run)
    method: Method = plugins.get("method", recipe.method.name)(recipe.method)
    return vocabulary_of(recipe, run.path, local_folder(find_model(recipe.model)), method).tokenizer


def check_unchanged(run: RunFolder, role: str, now: str) -> None:
    """Refuse to go on with other data or another model than the run was trained with.

    Raises:
        TuneError: The fingerprint of `role` is not the one in the run's plan.
    """
    if run.summary().plan["fingerprints"].get(role) != now:
        raise TuneError(f"The {role} of {run.name or run.id} has changed since it was trained.",
                        hint="Put it back as it was, or name other rows with `--data`." if role != "model" else None)  # fmt: skip


def without_weights(run: RunFolder) -> Tuned:
    """Read everything of a run's tuned model but its weights: `model` is None.

    Raises:
        TuneError: The run has no whole checkpoint, or its base model is gone or another.
    """
    best = run.best_checkpoint
    checkpoint.verify(best)
    recipe, objective = recipe_of(run), objective_of(run)
    source = find_model(recipe.model)
    folder = local_folder(source)
    check_unchanged(run, "model", fingerprint.of_model(source.path or folder))
    method: Method = plugins.get("method", recipe.method.name)(recipe.method)
    vocabulary = vocabulary_of(recipe, run.path, folder, method)
    compression = compress.read(recipe, run.path, run.summary().plan)
    return Tuned(
        run,
        recipe,
        objective,
        method,
        None,
        vocabulary,
        folder,
        best,
        fingerprint.of_file(best / "manifest.json"),
        compression,
    )


def load_tuned(run: RunFolder, *, dtype: torch.dtype = torch.float32) -> Tuned:
    """Load the run's best checkpoint; of a compressed model, with plain layers of the weights it computes with.

    Raises:
        TuneError: The run has no whole checkpoint, or its base model is gone.
    """
    return with_weights(without_weights(run), dtype=dtype)


def with_weights(tuned: Tuned, *, dtype: torch.dtype = torch.float32) -> Tuned:
    """Load the weights of a tuned model into it; see `load_tuned`."""
    tuned.model = build_model(
        tuned.recipe, tuned.base, tuned.objective, tuned.method, dtype, vocabulary=tuned.vocabulary,
        compression=tuned.compression,
    )  # fmt: skip
    checkpoint.restore(tuned.checkpoint, tuned.model)
    release(tuned.model, tuned.recipe.compress)
    tuned.model.to(device()).eval()
    return tuned


def answer(run: RunFolder, prompts: Sequence[str | Chat], max_new_tokens: int) -> list[str]:
    """Answer user messages, or chats that end with one, with the run's best checkpoint.

    Raises:
        TuneError: The run classifies.
    """
    if objective_of(run).scores_rows:
        raise TuneError(
            f"{run.name or run.id} writes no texts.", hint="`run.predict(texts)` gives what it finds in them."
        )
    tuned = load_tuned(run)
    renderer = tuned.rows().renderer
    encoded = [np.asarray(tuned.objective.prompt_tokens(renderer, prompt), dtype=np.int32) for prompt in prompts]
    return generate(tuned.model, tuned.tokenizer, encoded, max_new_tokens=max_new_tokens)


def predict(run: RunFolder, inputs: Sequence[Any]) -> pd.DataFrame:
    """Return what the run's best checkpoint finds in inputs, one line each.

    Raises:
        TuneError: The run writes texts, or the inputs are of another kind than it reads.
    """
    if not objective_of(run).scores_rows:
        raise TuneError(f"{run.name or run.id} answers texts.", hint="`run.generate(prompts)` gives its answers.")
    return load_tuned(run).predict(inputs)
