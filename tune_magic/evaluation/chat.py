"""The chat job: tuned models answer, their base beside them, token by token, until nobody asks any more."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import psutil

from tune_magic.errors import TuneError
from tune_magic.evaluation.speakers import Speakers, speakers_of
from tune_magic.models.decode import Sampling
from tune_magic.models.generate import stream
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.outputs import outputs_of
from tune_magic.training.stack import BASE
from tune_magic.training.tuned import Tuned

_IDLE_S = 15 * 60.0
_LOOK_S = 0.05
_PIECE_S = 0.1  # pieces of an answer are told no more often
_SHOWN_CLASSES = 5


def chat(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Answer what is said until a stop, the end of the process that asks, or a quarter of an hour of silence."""
    options = job.info["options"]
    talk = _Talk(speakers_of(job), log, control)
    log.append("state", state="running")
    heard = time.monotonic()
    while time.monotonic() - heard < _IDLE_S:
        if not psutil.pid_exists(options["owner"]):
            return {"state": "finished", "reason": "owner"}
        control.check()
        said = control.content("say")
        if said is None:
            time.sleep(_LOOK_S)
            continue
        talk.answer(said)
        heard = time.monotonic()
    return {"state": "finished", "reason": "idle"}


class _Talk:
    """A conversation, with a history of its own for each side."""

    def __init__(self, speakers: Speakers, log: EventLog, control: Control) -> None:
        self._speakers = speakers
        self._log = log
        self._control = control
        self._sides = (*speakers.sides, BASE)
        self._renderers = {side: speakers.tuned(side).rows().renderer for side in self._sides}
        self._histories: dict[str, list[dict[str, str]]] = {side: [] for side in self._sides}

    def answer(self, said: dict[str, Any]) -> None:
        """Answer on each side that is asked, and log it piece by piece."""
        self._control.take("hush")  # one from before is not about this
        if said["fresh"]:
            self._histories = {side: [] for side in self._sides}
        finds = self._speakers.tuned(self._sides[0]).objective.scores_rows  # then the base has nothing to say
        for side in self._sides if said["base"] and not finds else self._speakers.sides:
            with self._speakers.speaking(side) as speaker:
                if speaker is not None:
                    (self._find if finds else self._say)(side, speaker, said)

    def _say(self, side: str, speaker: Tuned, said: dict[str, Any]) -> None:
        history = [*self._histories[side], {"role": "user", "content": said["text"]}]
        sampling = Sampling(said["max_new_tokens"], said["temperature"], said["top_p"], said["seed"])
        prompt, history = self._prompt(side, speaker, history, said["system"], sampling.max_new_tokens)
        began, told_at, told, tokens = time.monotonic(), 0.0, "", 0

        def tell(text: str, count: int) -> None:
            nonlocal told, told_at, tokens
            tokens = count
            if text.startswith(told) and len(text) > len(told) and time.monotonic() - told_at >= _PIECE_S:
                self._log.append("piece", turn=said["turn"], side=side, text=text[len(told) :])
                told, told_at = text, time.monotonic()

        def is_over() -> bool:
            self._control.check()
            return self._control.take("hush")

        text = stream(speaker.model, speaker.tokenizer, prompt, sampling, tell=tell, is_over=is_over)
        self._histories[side] = [*history, {"role": "assistant", "content": text}]
        seconds = round(time.monotonic() - began, 3)
        self._log.append(
            "answer", turn=said["turn"], side=side, text=text, tokens=tokens, seconds=seconds, prompt_tokens=len(prompt)
        )

    def _prompt(
        self, side: str, speaker: Tuned, history: list[dict[str, str]], system: str, max_new_tokens: int
    ) -> tuple[np.ndarray, list[dict[str, str]]]:
        """Return the tokens to go on from, and the history they hold: the oldest turns go where all are too long."""
        renderer, config = self._renderers[side], speaker.model.config
        if not renderer.uses_template:  # a model of plain texts has no turns
            tokens = speaker.objective.prompt_tokens(renderer, history[-1]["content"])
            return np.asarray(tokens, dtype=np.int32), history[-1:]
        first = [{"role": "system", "content": system}] if system else []
        room = (getattr(config, "max_position_embeddings", None) or 1 << 30) - max_new_tokens
        room -= speaker.method.num_virtual_tokens
        while True:
            tokens = renderer.prompt_tokens([*first, *history])
            if len(tokens) <= room or len(history) < 3:
                return np.asarray(tokens, dtype=np.int32), history
            history = history[2:]

    def _find(self, side: str, speaker: Tuned, said: dict[str, Any]) -> None:
        """Say what the model finds in a text."""
        began, objective = time.monotonic(), speaker.objective
        try:
            examples = speaker.asked([said["text"]])
            outputs = outputs_of(speaker.engine(), objective, examples)
            if objective.gives == "classes":
                likely = objective.frame(outputs, examples).iloc[0].nlargest(_SHOWN_CLASSES)
                text = "\n".join(f"{share:.3f}  {name}" for name, share in likely.items())
            else:
                text = objective.spoken(outputs, examples)[0][1]
        except TuneError as error:
            text = f"{error.message} {error.hint or ''}".strip()
        seconds = round(time.monotonic() - began, 3)
        self._log.append("answer", turn=said["turn"], side=side, text=text, tokens=0, seconds=seconds)
