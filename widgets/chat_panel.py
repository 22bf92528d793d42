"""Talk to tuned models, their base beside them."""

from __future__ import annotations

from typing import Any

import ipywidgets
from tune_magic.widgets.panel import Panel, button

from tune_magic.chatting import MAX_NEW_TOKENS, Chat
from tune_magic.errors import TuneError
from tune_magic.handles import Run
from tune_magic.storage import places
from tune_magic.view.chat import chat_card
from tune_magic.view.html import Bundle, note_bundle

_PERIOD_S = 0.3
_WIDE = ipywidgets.Layout(width="100%", max_width="980px")
_NARROW = ipywidgets.Layout(width="230px")
_STYLE = {"description_width": "120px"}


class ChatPanel(Panel):
    """A text field; below it what was said, with the answers of the tuned models and their base as they come.

    A worker loads the models when the panel is shown and goes with `close`, with this kernel, or after a quarter of an
    hour of silence; the next thing said then starts another. The conversation stays in the saved notebook.

    Args:
        run: A run with a checkpoint, or its name or id.
        *others: More, which answer beside it.
        base: Whether the base model may answer too.

    Attributes:
        text: What is to be said.
        send: Says it.

    Raises:
        TuneError: There is no such run, or it has no checkpoint.

    Example:
        >>> ChatPanel("support_bot")  # doctest: +SKIP
    """

    def __init__(self, run: Run | str, *others: Run | str, base: bool = True) -> None:
        self.runs = [one if isinstance(one, Run) else Run(places.find(one)) for one in (run, *others)]
        self.run = self.runs[0]
        for one in self.runs:
            one.best_checkpoint  # noqa: B018 - without one, say so now
        self._with_base = base
        self._chat: Chat | None = None
        self._past: list[Any] = []  # turns of workers that are gone
        self._problem: str | None = None
        self._is_asked = self._fresh = False
        self.text = ipywidgets.Textarea(
            placeholder="Say something to the tuned model", rows=3, tooltip="Your message", layout=_WIDE
        )
        self.system = ipywidgets.Text(description="system", tooltip="System message", layout=_WIDE, style=_STYLE)
        self.temperature = ipywidgets.BoundedFloatText(
            0.0, min=0, max=5, step=0.1, description="temperature", tooltip="0 takes the likeliest token",
            layout=_NARROW, style=_STYLE,
        )  # fmt: skip
        self.top_p = ipywidgets.BoundedFloatText(
            1.0, min=0.05, max=1, step=0.05, description="top_p", tooltip="Share of probability that is drawn from",
            layout=_NARROW, style=_STYLE,
        )  # fmt: skip
        self.max_new_tokens = ipywidgets.BoundedIntText(
            MAX_NEW_TOKENS, min=1, max=4096, description="max_new_tokens", tooltip="Longest answer in tokens",
            layout=_NARROW, style=_STYLE,
        )  # fmt: skip
        self.base = ipywidgets.Checkbox(
            base, description="base answers too", indent=False, tooltip="Ask the base model"
        )
        self.send = button("Send", "Say it; the model answers below", self._send, button_style="primary")
        self.hush = button("Enough", "End the answer here", self._hush)
        self.forget = button("New conversation", "Forget what was said before", self._forget)
        parameters = ipywidgets.Accordion(
            [ipywidgets.VBox([
                self.system,
                ipywidgets.HBox(
                    [self.temperature, self.top_p, self.max_new_tokens, self.base],
                    layout=ipywidgets.Layout(flex_flow="row wrap"),
                ),
            ])],
            titles=["parameters"], selected_index=None,
        )  # fmt: skip
        buttons = ipywidgets.HBox([self.send, self.hush, self.forget])
        super().__init__(ipywidgets.VBox([self.text, buttons, parameters]), _PERIOD_S)
        self.text.observe(self.wake, "value")

    def bundle(self) -> Bundle:
        """Return the conversation."""
        if self._problem is not None:
            return note_bundle(self._problem)
        if self._chat is None:
            return note_bundle("starting the model")
        name = ", ".join(one.name or one.id for one in self.runs)
        return chat_card(name, [*self._past, *self._chat.turns], self._chat.state)

    def act(self) -> None:
        """Start a worker where there is none, and say what was sent."""
        if self._chat is None:
            self._start()
            if self._chat is None:
                return
            self.system.value = self.system.value or self._chat.usual_system()
        if self._is_asked and not self._chat.is_answering:
            self._is_asked = False
            self.settle()
            self._say(self.text.value.strip())
        is_answering = self._chat.is_answering
        self.send.disabled, self.hush.disabled = is_answering, not is_answering

    def close(self) -> None:
        """Let the worker go and take the controls away; the conversation stays."""
        if self._chat is not None:
            self._chat.close()
        super().close()

    def _start(self) -> None:
        try:
            self._chat, self._problem = Chat(*self.runs, base=self._with_base), None
        except TuneError as error:
            self._problem = str(error)

    def _say(self, text: str) -> None:
        if not text:
            return
        assert self._chat is not None
        if self._chat.has_ended:
            self._past += self._chat.turns
            self._start()
        try:
            self._chat.say(
                text, system=self.system.value, max_new_tokens=self.max_new_tokens.value, base=self.base.value,
                temperature=self.temperature.value, top_p=self.top_p.value, fresh=self._fresh,
            )  # fmt: skip
        except TuneError as error:
            self._problem = str(error)
            return
        self._fresh, self.text.value = False, ""

    def _send(self) -> None:
        self._is_asked = True
        self.wake()

    def _hush(self) -> None:
        if self._chat is not None:
            self._chat.hush()

    def _forget(self) -> None:
        self._fresh = True
