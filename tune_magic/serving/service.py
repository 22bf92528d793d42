"""What stands between a request and the models: who is let in, what is asked, what comes back and when."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from starlette.requests import Request

from tune_magic.models.decode import Draw, Sampling
from tune_magic.serving.protocol import (
    MOST_PROMPTS,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Refused,
    StreamOptions,
)  # fmt: skip
from tune_magic.serving.scheduler import Failure, Found, Look, Piece, Row, Scheduler, Task, Told
from tune_magic.serving.served import Model, Served, room_for
from tune_magic.serving.writing import Writing

_CLOSING = "The server is shutting down."
_NEAR = 4  # tokens of a prompt before what goes on from it, for the tokenizer
_READING_S = 60.0  # for whoever reads an answer slowly
_GONE = Failure(499, "Whoever asked has gone.")  # as nginx counts them; nobody reads it


@dataclass(frozen=True)
class Limits:
    """What is too much.

    Attributes:
        max_concurrent: Texts that are written at the same time.
        timeout_s: Longest that an answer may take, waiting included.
        max_waiting: Requests at work and in line; further ones are sent away.
        max_body_bytes: Of a request.
        max_n: Texts of one request, over all of its prompts.
        usual_tokens: Longest answer of a chat that does not say.
    """

    max_concurrent: int = 16
    timeout_s: float = 600.0
    max_waiting: int = 64
    max_body_bytes: int = 2 << 20
    max_n: int = 64
    usual_tokens: int = 1024


class Asking:
    """What was asked in one request, and what comes of it.

    Args:
        over: Called when nothing more will come, or nobody wants it.
        longest_s: After these seconds nobody waits: whoever does not read what is sent keeps no place.
    """

    def __init__(self, over: Callable[[], None], longest_s: float) -> None:
        self._longest_s = longest_s
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[Told] = asyncio.Queue()
        self._ended = asyncio.Event()
        self._open = 0
        self._over = over
        self._is_over = False
        self.tasks: list[Task] = []

    def add(self, task: Task) -> None:
        """Take one more task; it is gone already where whoever asked is."""
        task.is_gone = self._is_over
        self.tasks.append(task)
        self._open += 1

    def tell(self, told: Told) -> None:
        """Hand over what has come; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._came.put_nowait, told)

    async def all(self) -> AsyncIterator[Piece | Found]:
        """Yield what comes until everything has.

        Raises:
            Refused: Something failed.
        """
        while self._open:
            told = await self._came.get()
            if isinstance(told, Failure):
                self._open = 0
                raise Refused(told.status, told.message)
            self._open -= isinstance(told, Found) or told.reason is not None
            yield told

    async def watch(self, request: Request) -> None:
        """Wait until it is over, or until whoever asked is gone."""
        gone = asyncio.ensure_future(_disconnected(request))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED, timeout=self._longest_s)
        finally:
            gone.cancel()
            ended.cancel()
            self._is_over = True
            for task in self.tasks:
                task.is_gone = True
            self._came.put_nowait(_GONE)  # nothing more comes of them, and nobody should wait for it
            self._over()

    def end(self) -> None:
        """Nothing more is wanted."""
        self._ended.set()


class Service:
    """The models of a server, once they are loaded, and the line before them.

    Args:
        limits: What is too much.

    Attributes:
        statuses: How often each status of HTTP was answered.
        is_closing: Whether new requests are sent away.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.statuses: Counter[int] = Counter()
        self.is_closing = False
        self._opened: Future[tuple[Served, Scheduler]] = Future()
        self._num_asking = 0
        self._watchers: set[asyncio.Task[None]] = set()

    @property
    def is_ready(self) -> bool:
        """Whether the models are loaded."""
        return self._opened.done() and not self.is_closing

    def open(self, served: Served, scheduler: Scheduler) -> None:
        """Let requests through to the models."""
        self._opened.set_result((served, scheduler))

    def close(self, grace_s: float) -> None:
        """Send new requests away and let those at work finish within some seconds."""
        self.is_closing = True
        if not self._opened.done():
            self._opened.set_exception(Refused(503, _CLOSING))
        elif self._opened.exception() is None:
            self._opened.result()[1].close(grace_s)

    async def served(self) -> Served:
        """Return the models, once they are loaded.

        Raises:
            Refused: The server is closing, or loading takes too long.
        """
        return (await self._loaded())[0]

    async def _loaded(self) -> tuple[Served, Scheduler]:
        if self.is_closing:
            raise Refused(503, _CLOSING)
        try:
            return await asyncio.wait_for(
                asyncio.shield(asyncio.wrap_future(self._opened)), self.limits.timeout_s
            )  # shielded: one who leaves must not take the models from the others
        except TimeoutError:
            raise Refused(504, "The models take longer to load than this server allows.") from None

    async def chat(self, asked: ChatRequest, request: Request) -> tuple[Asking, int]:
        """Begin the answers of a chat; returns them and the tokens of the prompt."""
        with self._place(request) as asking:
            model = await self._writer(asked.model)
            messages = [message.plain() for message in asked.messages]
            prompt = await asyncio.to_thread((await self.served()).of_messages, model, messages)
            return asking, await self._write(asking, model, [prompt], asked, param="messages")

    async def complete(self, asked: CompletionRequest, request: Request) -> tuple[Asking, int]:
        """Begin what goes on from prompts; returns it and the tokens of the prompts."""
        if len(asked.prompts) > MOST_PROMPTS:
            raise Refused(
                400, f"A request may have {MOST_PROMPTS} prompts; this one has {len(asked.prompts)}.", "prompt"
            )
        with self._place(request) as asking:
            model, served = await self._writer(asked.model), await self.served()
            prompts = [await asyncio.to_thread(served.of_text, model, prompt) for prompt in asked.prompts]
            return asking, await self._write(asking, model, prompts, asked, param="prompt")

    async def classify(self, asked: ClassifyRequest, request: Request) -> tuple[Found, bool]:
        """Return what a model finds in texts, and whether it is probabilities of classes."""
        asking = self._let_in(request)
        try:
            served, scheduler = await self._loaded()
            model = served.find(asked.model)
            if model.writes or not model.reads:
                what = "writes texts; ask `/v1/chat/completions`" if model.writes else "reads no texts"
                raise Refused(400, f"The model `{model.name}` {what}.", "model")
            asking.add(Look(model.side, asking.tell, self._until(), inputs=asked.inputs))
            scheduler.submit(asking.tasks)
            async for found in asking.all():
                if isinstance(found, Found):
                    return found, model.gives == "classes"
        finally:
            asking.end()
        raise AssertionError("a look gives something, or fails")

    async def _writer(self, name: str) -> Model:
        model = (await self.served()).find(name)
        if not model.writes:
            raise Refused(400, f"The model `{name}` writes no texts; ask `/v1/classify`.", "model")
        return model

    async def _write(
        self, asking: Asking, model: Model, prompts: Sequence[np.ndarray], asked: ChatRequest | CompletionRequest, *,
        param: str,
    ) -> int:  # fmt: skip
        """Hand prompts to the scheduler and return their tokens."""
        scheduler = (await self._loaded())[1]
        if asked.n * len(prompts) > self.limits.max_n:
            raise Refused(400, f"A request may have {self.limits.max_n} answers, `n` of each prompt.", "n")
        if asked.stream_options is not None and not asked.stream and asked.stream_options != StreamOptions():
            raise Refused(400, "`stream_options` are for `stream: true`.", "stream_options")
        rooms = [room_for(model, len(prompt), asked.wanted, self.limits.usual_tokens, param) for prompt in prompts]
        seed = asked.seed if asked.seed is not None else secrets.randbits(62)
        until = self._until()
        for number, prompt in enumerate(prompts):
            seen = prompt.tolist() if model.repetition_penalty != 1 else ()
            before = prompt[-_NEAR:].tolist() if param == "prompt" else ()  # a chat's answer begins a text of its own
            for index in range(number * asked.n, (number + 1) * asked.n):
                sampling = Sampling(rooms[number], asked.temperature, asked.top_p, seed + index)
                draw = Draw(
                    sampling, presence_penalty=asked.presence_penalty, frequency_penalty=asked.frequency_penalty,
                    repetition_penalty=model.repetition_penalty, prompt=seen,
                )  # fmt: skip
                writing = Writing(
                    model.tokenizer,
                    draw,
                    rooms[number],
                    ends=model.ends,
                    stops=asked.stops,
                    num_likely=asked.num_likely,
                    before=before,
                )
                asking.add(Row(model.side, asking.tell, until, index=index, prompt=prompt, writing=writing))
        scheduler.submit(asking.tasks)
        return sum(map(len, prompts))

    @contextlib.contextmanager
    def _place(self, request: Request) -> Iterator[Asking]:
        """Hold a place for a request before anything is computed for it; it is free again where that fails.

        Raises:
            Refused: There are too many already.
        """
        asking = self._let_in(request)
        try:
            yield asking
        except BaseException:
            asking.end()
            raise

    def _until(self) -> float:
        return time.monotonic() + self.limits.timeout_s

    def _let_in(self, request: Request) -> Asking:
        """Return a place for a request.

        Raises:
            Refused: There are too many already.
        """
        if self._num_asking >= self.limits.max_waiting:
            said = f"{self._num_asking} requests are at work or wait already; ask again in a moment."
            raise Refused(429, said, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self._num_asking += 1
        asking = Asking(self._let_out, 2 * self.limits.timeout_s + _READING_S)  # loading, writing, and reading it
        watcher = asyncio.create_task(asking.watch(request))
        self._watchers.add(watcher)  # the loop itself holds tasks weakly
        watcher.add_done_callback(self._watchers.discard)
        return asking

    def _let_out(self) -> None:
        self._num_asking -= 1
        if self._opened.done() and self._opened.exception() is None:
            self._opened.result()[1].wake()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
