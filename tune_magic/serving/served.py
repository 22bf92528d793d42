"""The models of a server by the names they are asked for, and what they make of messages and texts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import numpy as np

from tune_magic.errors import TuneError
from tune_magic.evaluation.speakers import Speakers
from tune_magic.models.generate import end_tokens, positions_of
from tune_magic.models.processor import reads_texts
from tune_magic.serving.protocol import Refused
from tune_magic.training.stack import BASE

_LEAST_ROOM = 1


@dataclass(frozen=True)
class Model:
    """A model that can be asked for.

    Attributes:
        name: As it is asked for.
        side: As the speakers call it.
        gives: ``texts``, ``classes`` or ``outputs``.
        reads: Whether it reads texts.
        positions: Places for prompt and answer together; None: there is no end.
        tokenizer: Of its answers; the thread that writes has it.
        ends: Tokens that end an answer.
        repetition_penalty: What its authors want, see `decode.Draw`.
    """

    name: str
    side: str
    gives: str
    reads: bool
    positions: int | None
    tokenizer: Any
    ends: Sequence[int]
    repetition_penalty: float = 1.0
    _renderer: Any = None

    @property
    def writes(self) -> bool:
        """Whether it answers with texts."""
        return self.gives == "texts"


class Served:
    """Models by name.

    Args:
        speakers: The models.
        names: Of each side.
        base_names: What the base is called; nothing where it is not served.

    Raises:
        TuneError: A model is of a kind that this server does not know how to write with.
    """

    def __init__(self, speakers: Speakers, names: Mapping[str, str], base_names: Sequence[str] = ()) -> None:
        self._encoding = threading.Lock()
        self.models: dict[str, Model] = {names[side]: _model(speakers, side, names[side]) for side in speakers.sides}
        for name in base_names:
            self.models.setdefault(name, _model(speakers, BASE, name))

    def find(self, name: str) -> Model:
        """Return a model by name.

        Raises:
            Refused: There is none.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"The model `{name}` does not exist. There are: {known}.", "model", "model_not_found")
        return self.models[name]

    def of_messages(self, model: Model, messages: list[dict[str, str]]) -> np.ndarray:
        """Return the tokens up to where a model answers a chat.

        Raises:
            Refused: Its template does not take them.
        """
        renderer = model._renderer
        if renderer.uses_template:
            return self._encoded(renderer, messages, "messages")
        if len(messages) > 1 or messages[0]["role"] != "user":
            said = f"The model `{model.name}` has no turns: one message of a user, or `/v1/completions`."
            raise Refused(400, said, "messages")
        return self._encoded(renderer, messages[0]["content"], "messages")

    def of_text(self, model: Model, prompt: str | list[int]) -> np.ndarray:
        """Return the tokens of a text to go on from, with the tokenizer's opening ones; tokens stay what they are.

        Raises:
            Refused: There is nothing to go on from, or no such token.
        """
        renderer = model._renderer
        if isinstance(prompt, str):
            with self._encoding:
                ids = renderer.opened(prompt)
        else:
            ids = prompt
            if any(not 0 <= token < len(renderer.tokenizer) for token in ids):
                raise Refused(400, f"Tokens are numbers from 0 to {len(renderer.tokenizer) - 1}.", "prompt")
        if not ids:
            raise Refused(400, "The prompt has no token to go on from.", "prompt")
        return np.asarray(ids, dtype=np.int32)

    def _encoded(self, renderer: Any, asked: Any, name: str) -> np.ndarray:
        try:
            with self._encoding:
                return np.asarray(renderer.prompt_tokens(asked), dtype=np.int32)
        except (TuneError, jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise Refused(400, f"The model's chat template does not take these messages: {error}", name) from None


def room_for(model: Model, num_tokens: int, wanted: int | None, usual: int, name: str) -> int:
    """Return the most tokens of an answer.

    Args:
        model: Which answers.
        num_tokens: Of the prompt.
        wanted: What was asked for, if anything.
        usual: Otherwise.
        name: Of the parameter that holds the prompt.

    Raises:
        Refused: Prompt and answer do not fit into the model's places.
    """
    if model.positions is None:
        return wanted or usual
    left = model.positions - num_tokens
    if left < (wanted or _LEAST_ROOM):
        asked = f" and {wanted} of an answer" if wanted else ""
        said = f"This model has {model.positions} places; the prompt has {num_tokens} tokens{asked}."
        raise Refused(400, said, name, "context_length_exceeded")
    return wanted or min(usual, left)


def _model(speakers: Speakers, side: str, name: str) -> Model:
    tuned = speakers.tuned(side)
    objective, reads = tuned.objective, reads_texts(tuned.base)
    if objective.scores_rows:
        return Model(name, side, objective.gives, reads, None, tuned.tokenizer, ())
    with speakers.speaking(side) as speaker:
        assert speaker is not None
        if speaker.model.config.is_encoder_decoder:
            raise TuneError(
                f"{tuned.run.name or tuned.run.id} is an encoder with a decoder, which this server does not write with.",
                hint="`run.generate(prompts)` and `%tune chat` do.",
            )
        places, ends = positions_of(speaker.model), end_tokens(speaker.model, speaker.tokenizer)
        penalty = getattr(speaker.model.generation_config, "repetition_penalty", None) or 1.0
    own = replace(tuned.vocabulary, tokenizer=copy.deepcopy(tuned.tokenizer))  # two threads must not share one
    return Model(
        name, side, objective.gives, reads, places, tuned.tokenizer, ends, penalty,
        replace(tuned, vocabulary=own).rows().renderer,
    )  # fmt: skip
