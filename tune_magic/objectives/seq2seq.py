"""Encoder and decoder: a text becomes another, as in translation and summaries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tune_magic.data.content import PromptCompletion
from tune_magic.data.example import Example, Segment
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import DataError, ModelError
from tune_magic.models.load import load_head
from tune_magic.objectives.padding import padded
from tune_magic.objectives.sft import SFT
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import torch

    from tune_magic.training.target_states import TargetStates


class Seq2SeqOptions(ObjectiveOptions):
    """Keys of `objective: seq2seq`."""

    name: Literal["seq2seq"] = Field("seq2seq", description="Train an encoder and decoder to turn a text into another.")
    source_prefix: str = Field("", description="Put before each source, as T5 was trained with: `summarize: `.")
    max_target_length: int = Field(256, ge=2, description="Longest target in tokens; longer ones are cut at the end.")


class Seq2Seq(SFT):
    """Minus the log-likelihood of each token of the target, given the source and the target before it."""

    Options = Seq2SeqOptions
    formats = ("source_target", "translation", "prompt_completion", "instruction", "question_answer")
    task = "SEQ_2_SEQ_LM"
    engine = "outputs"
    summary = "An encoder reads the source, a decoder learns to write the target token by token."
    formula = "L = − (1 / T) Σ_t log p(y_t | source, y_1 … y_(t−1)), t over the tokens of targets"
    source = "Sutskever et al. 2014, arXiv:1409.3215; Raffel et al. 2020, T5, arXiv:1910.10683."
    when = "With T5, BART and their kin, for translation, summaries and rewriting; `sft` for models that are a decoder alone."

    def __init__(self, options: ObjectiveOptions | None = None) -> None:
        super().__init__(options)
        self._start: int | None = None

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode source and target, each with the tokenizer's special tokens and cut to its own length."""
        known = [content for content in part.contents if isinstance(content, PromptCompletion)]
        if len(known) != len(part.contents):
            raise DataError("Chats have no one source and target.", hint="Take `objective: sft` with a decoder model.")
        sources = renderer.whole([self._source(content) for content in known], part.numbers)
        targets = renderer.encodings([content.completion for content in known])
        found = []
        for example, content, encoding in zip(sources, known, targets, strict=True):
            ids = np.asarray(encoding.ids, dtype=np.int32)
            kept = ids[: self.options.max_target_length]
            weights = np.ones(len(kept), dtype=np.float32)
            found.append(
                Example(
                    trunk=example.trunk,
                    branches=(Segment(kept, weights),),
                    answer_start=len(example.trunk),
                    question=content.prompt,
                    reference=content.completion,
                    num_cut=example.num_cut + len(ids) - len(kept),
                    index=example.index,
                )
            )
        return found

    def prompt_tokens(self, renderer: Renderer, prompt: str | list[dict[str, str]]) -> list[int]:
        """The source, with the tokenizer's special tokens; of a chat, its last message."""
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        (example,) = renderer.whole([f"{self.options.source_prefix}{text}"], [0])
        return [int(token) for token in example.trunk.tokens]

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model; the decoder's first token is its configuration's.

        Raises:
            ModelError: It is no encoder and decoder, or says no first token.
        """
        model = load_head(folder, dtype, "Seq2SeqLM")
        self._start = model.config.decoder_start_token_id
        if self._start is None:
            raise ModelError(f"The model in {folder} does not say which token a decoder begins with.")
        return model

    def batch(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, np.ndarray]:
        """Padded sources, and targets one place later, behind the decoder's first token."""
        given = padded([example.trunk.tokens for example in examples], pad_token_id)
        before = [np.concatenate([[self._start], _target(example).tokens[:-1]]) for example in examples]
        return {**given, "decoder_input_ids": padded(before, pad_token_id)["input_ids"]}

    def computed_tokens(self, examples: Sequence[Example]) -> int:
        """Sources are padded to the longest source, and targets to the longest target."""
        longest = max(len(example.trunk) for example in examples) + max(len(_target(example)) for example in examples)
        return len(examples) * longest

    def states(self, outputs: Any, examples: Sequence[Example]) -> TargetStates:
        """Take the logits at the targets."""
        import torch

        from tune_magic.training.target_states import TargetStates

        logits = outputs.logits
        lengths = [len(_target(example)) for example in examples]
        places = [row * logits.shape[1] + np.arange(length) for row, length in enumerate(lengths)]
        owners = np.repeat(np.arange(len(examples)), lengths)
        targets = np.concatenate([_target(example).tokens for example in examples]).astype(np.int64)
        columns = [np.concatenate(places), targets, owners]
        chosen, targets_, owners_ = (torch.from_numpy(column).to(logits.device) for column in columns)
        weights = torch.from_numpy(np.concatenate([_target(example).weights for example in examples]))
        return TargetStates(
            states=logits.flatten(0, 1).index_select(0, chosen), head=None, targets=targets_,
            weights=weights.to(logits.device), owners=owners_, vocabulary=logits.shape[-1],
        )  # fmt: skip

    def _source(self, content: PromptCompletion) -> str:
        system = f"{content.system}\n\n" if content.system else ""
        return f"{self.options.source_prefix}{system}{content.prompt}"


def _target(example: Example) -> Segment:
    return example.branches[0]
