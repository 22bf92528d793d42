"""Personal data and secrets in a text: where they are, and the text without them.

Shapes that carry a check sum or a numbering plan are checked by it, so that any long number is not taken for one.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator

from tune_magic.secrets import SHAPES

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_DIGITS = re.compile(r"\d(?:[\s()./-]*\d){8,}")  # what may hold a telephone or card number
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d.-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
_ADDRESS = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])")
_SOCIAL = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)")
_REGION = "US"  # of telephone numbers without a country
# modules of detect-secrets whose shapes are theirs alone; those that look for words or entropy see secrets in any prose
_DETECTORS = (
    "aws:AWSKeyDetector", "discord:DiscordBotTokenDetector", "github_token:GitHubTokenDetector",
    "gitlab_token:GitLabTokenDetector", "jwt:JwtTokenDetector", "mailchimp:MailchimpDetector", "npm:NpmDetector",
    "openai:OpenAIDetector", "pypi_token:PypiTokenDetector", "sendgrid:SendGridDetector", "slack:SlackDetector",
    "square_oauth:SquareOAuthDetector", "stripe:StripeDetector", "telegram_token:TelegramBotTokenDetector",
)  # fmt: skip


def personal(text: str) -> dict[str, list[str]]:
    """Return what in a text points to a person, by kind: email, telephone, card, iban, address (IPv4), social (US).

    Example:
        >>> personal("write to ada@example.org")
        {'email': ['ada@example.org']}
    """
    found: dict[str, list[str]] = {}
    for kind, value in _personal(text):
        found.setdefault(kind, []).append(value)
    return found


def _personal(text: str) -> Iterator[tuple[str, str]]:
    if "@" in text:
        yield from (("email", match[0]) for match in _EMAIL.finditer(text))
    if not any(c.isdigit() for c in text):
        return
    yield from (("address", match[0]) for match in _ADDRESS.finditer(text))
    yield from (("social", match[0]) for match in _SOCIAL.finditer(text))
    if _IBAN.search(text):
        from stdnum import iban

        yield from (("iban", match[0]) for match in _IBAN.finditer(text) if iban.is_valid(match[0]))
    if _DIGITS.search(text):
        from phonenumbers import PhoneNumberMatcher
        from stdnum import luhn

        cards = [match[0] for match in _CARD.finditer(text) if luhn.is_valid(re.sub(r"\D", "", match[0]))]
        yield from (("card", card) for card in cards)
        for match in PhoneNumberMatcher(text, _REGION):
            if not any(match.raw_string in card for card in cards):
                yield "telephone", match.raw_string


def secrets(text: str) -> list[str]:
    """Return the keys, tokens and passwords in a text."""
    if len(text) < 16:
        return []
    found = [match[0] for pattern in _patterns() for match in pattern.finditer(text)]
    return sorted(dict.fromkeys(found), key=len, reverse=True)


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    found = [SHAPES, _KEY_BLOCK]
    for name in _DETECTORS:
        module, _, kind = name.partition(":")
        found += getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), kind).denylist
    return tuple(found)


def without_personal(text: str) -> str:
    """Return a text with what points to a person replaced by its kind, ``[email]`` say."""
    for kind, values in personal(text).items():
        for value in values:
            text = text.replace(value, f"[{kind}]")
    return text


def without_secrets(text: str) -> str:
    """Return a text with keys, tokens and passwords replaced by ``[secret]``."""
    for value in secrets(text):
        text = text.replace(value, "[secret]")
    return text
