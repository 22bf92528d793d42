"""What may be asked, in OpenAI's forms: understood or refused by name, never passed over in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_SAYS_NOTHING = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # of the answer, whatever they hold
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values of what is not done here that ask for nothing
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "best_of": (1,),
    "echo": (False,), "suffix": ("",), "store": (False,), "modalities": (["text"],), "service_tier": ("auto", "default"),
    "reasoning_effort": (), "verbosity": (), "audio": (), "prediction": (), "web_search_options": (), "moderation": (),
    "prompt_cache_options": (), "prompt_cache_retention": ("in_memory",), "dimensions": (), "encoding_format": ("float",),
}  # fmt: skip
_OF_A_MESSAGE = ("role", "content")
_MOST_STOPS = 16
_LONGEST_STOP = 256  # characters: it is looked for at every token
_MOST_LIKELY = 20
_MOST_INPUTS = 256  # in which something is found in one go, while others wait
MOST_PROMPTS = 64


class Refused(Exception):
    """A request that is not answered, in OpenAI's form.

    Args:
        status: Of HTTP.
        message: In words.
        param: Name of the parameter, where it is one's fault.
        code: OpenAI's, where it has one.
        headers: Further ones of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, usual)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message; only texts are read."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Return it as chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """Of an answer that is sent as it comes."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


Stop = Annotated[str, Field(max_length=_LONGEST_STOP)]


class _Asked(_Strict):
    """What all answers have; the usual values are OpenAI's."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] = Field(default_factory=list)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Asked):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=_MOST_LIKELY)

    @property
    def wanted(self) -> int | None:
        """Most tokens of an answer, where that is said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_likely(self) -> int | None:
        """Likeliest tokens told of each place; None: no probabilities."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Asked):
    """Body of ``/v1/completions``."""

    prompt: str | Annotated[list[int] | list[str] | list[list[int]], Field(min_length=1)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def wanted(self) -> int:
        """Most tokens of an answer."""
        return self.max_tokens

    @property
    def num_likely(self) -> int | None:
        """Likeliest tokens told of each place; None: no probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of the prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [list(self.prompt)] if isinstance(self.prompt[0], int) else list(self.prompt)


class ClassifyRequest(_Strict):
    """Body of ``/v1/classify``."""

    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=_MOST_INPUTS)]

    @property
    def inputs(self) -> list[str]:
        """Each of the texts."""
        return [self.input] if isinstance(self.input, str) else self.input


Body = TypeVar("Body", bound=BaseModel)


def understood(kind: type[Body], content: bytes) -> Body:
    """Return a request's body, understood.

    Args:
        kind: What it must be.
        content: JSON.

    Raises:
        Refused: It is no JSON; or a parameter is unknown, of another type or out of range, or asks for what is not done
            here; it is named.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # also bytes that are no text
        raise Refused(400, "The body is not valid JSON.") from None
    if not isinstance(found, dict):
        raise Refused(400, "The body must be a JSON object.")
    given = {key: value for key, value in found.items() if value is not None and key not in _SAYS_NOTHING}
    for name in [name for name in given if name in _NEUTRAL and name not in kind.model_fields]:
        if given[name] not in _NEUTRAL[name]:
            raise Refused(
                400, f"`{name}` is not supported by this server; leave it out.", name, "unsupported_parameter"
            )
        del given[name]
    if isinstance(given.get("messages"), list):
        given["messages"] = [_said(message) for message in given["messages"]]
    try:
        return kind.model_validate_json(json.dumps(given))  # strict about JSON's own types
    except ValidationError as error:
        raise _refusal(error) from None


def _said(message: Any) -> Any:
    """Return a message without what it says nothing in, as clients send an answer back."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if key in _OF_A_MESSAGE or value not in (None, [])}


def _refusal(error: ValidationError) -> Refused:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    same = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
    fault = next(
        (fault for fault in same if not fault["type"].endswith("_type")), same[0]
    )  # of several forms, the meant
    if not fault["loc"]:  # half a pair of surrogates, which is no text
        return Refused(400, "The body is not valid JSON.")
    param = str(fault["loc"][0])
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return Refused(400, f"`{where}` is not known to this server; leave it out.", param, "unknown_parameter")
    if fault["type"] == "missing":
        return Refused(400, f"`{where}` is missing.", param, "missing_required_parameter")
    return Refused(400, f"`{where}`: {fault['msg']}.", param, "invalid_value")
