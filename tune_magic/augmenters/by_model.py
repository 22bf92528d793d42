"""Other wordings by a language model: here, or behind an address that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from tune_magic.augmenters.base import Augmenter
from tune_magic.data.render import Renderer
from tune_magic.errors import DataError
from tune_magic.models.address import Address
from tune_magic.models.find import find_model
from tune_magic.models.generate import generate
from tune_magic.models.load import load_causal_lm, load_tokenizer, local_folder
from tune_magic.recipe.schema import AugmentOptions

_LONGEST = 3.0  # times the length of the text; what is longer has been answered, not reworded
_LONGEST_PROMPT = 4096


class ModelOptions(AugmentOptions):
    """Keys of what a model rewords."""

    model: str | None = Field(
        None, description="A chat model, found as a recipe's `model` is; default: the recipe's own."
    )
    endpoint: str | None = Field(
        None, description="An address with OpenAI's protocol, such as http://127.0.0.1:8000/v1."
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="Variable of the environment that holds the address's key.")
    max_new_tokens: int = Field(128, ge=8, le=4096, description="Longest wording, in tokens.")

    @model_validator(mode="after")
    def _address_needs_a_model(self) -> ModelOptions:
        if self.endpoint and not self.model:
            raise ValueError("`endpoint` needs the name of a `model` there.")
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"`endpoint` must begin with http:// or https://, got {self.endpoint!r}.")
        return self


class Paraphrase(Augmenter):
    """Asks a model to say a text in other words."""

    Options: ClassVar[type[ModelOptions]] = ModelOptions
    _instructions: tuple[str, ...] = (
        "Say the following in other words that mean exactly the same. Answer with the new wording alone.",
    )

    def change(self, texts: Sequence[str], draw: np.random.Generator, tell: Callable[[int], None]) -> list[str | None]:
        """Return what the model says, None where it says the same, nothing, or far too much."""
        said = list(texts)
        for number, instruction in enumerate(self._instructions):
            asked = [f"{instruction}\n\n{text}" for text in said]
            before = number * len(texts) / len(self._instructions)
            said = [answer.strip().strip('"') for answer in self._answers(asked, before, tell)]
        pairs = zip(said, texts, strict=True)
        return [new if new and new != old and len(new) <= _LONGEST * len(old) + 20 else None for new, old in pairs]

    def _answers(self, asked: Sequence[str], before: float, tell: Callable[[int], None]) -> list[str]:
        """Return an answer to each; `before` texts count as done already."""
        done = 0

        def count(answered: int) -> None:
            nonlocal done
            done += answered
            tell(round(before + done / len(self._instructions)))

        return self._at_address(asked, count) if self.options.endpoint else self._here(asked, count)

    def _here(self, asked: Sequence[str], count: Callable[[int], None]) -> list[str]:
        import torch
        from accelerate import PartialState

        folder = local_folder(find_model(self.options.model))
        tokenizer = load_tokenizer(folder)
        if tokenizer.chat_template is None:
            problem = f"`{self.options.model}` rewords nothing: it is no chat model."
            raise DataError(problem, hint="Name one that is: `model: ...`.")
        renderer = Renderer(tokenizer, chat_template=True, max_length=_LONGEST_PROMPT)
        prompts = [np.asarray(renderer.prompt_tokens(text), dtype=np.int32) for text in asked]
        model = load_causal_lm(folder, torch.float32).to(PartialState().device).eval()
        return generate(
            model, tokenizer, prompts,
            max_new_tokens=self.options.max_new_tokens, between=lambda: count(0), done=count,
        )  # fmt: skip

    def _at_address(self, asked: Sequence[str], count: Callable[[int], None]) -> list[str]:
        options = self.options
        address = Address(options.endpoint, options.model, options.api_key_env, options.max_new_tokens)
        return address.answers([[{"role": "user", "content": text}] for text in asked], count)


class BackTranslationOptions(ModelOptions):
    """Keys of `back_translation`."""

    language: str = Field("English", description="Language of the texts.")
    via: str = Field("German", description="Language they are translated to, and back from.")


class BackTranslation(Paraphrase):
    """Has a model translate a text into another language and back."""

    Options = BackTranslationOptions

    def __init__(self, options: BackTranslationOptions) -> None:
        super().__init__(options)
        self._instructions = tuple(
            f"Translate the following to {language}. Answer with the translation alone."
            for language in (options.via, options.language)
        )
