"""Make the data set of the classification notebook: messages to a bank's help desk, each with its intent.

Every message is put together from the phrasings and particulars below, so nothing is copied from elsewhere. The test
rows use phrasings that no training row has: a model must have learned what is meant, not how it is said.

    python make_intents.py [FOLDER]
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

# intent -> phrasings; the last two of each are kept for the test rows
PHRASINGS = {
    "card_lost": [
        "i lost my card {where}", "my card is gone since {when}", "somebody stole my wallet with the card in it",
        "i left my card {where} and it is not there any more", "please block my card, i cannot find it",
        "my purse was taken {where} and the card with it", "the card must have fallen out of my pocket {when}",
    ],
    "card_declined": [
        "my card was refused {where}", "the payment did not go through {when}", "why is my card not accepted {where}",
        "the terminal {where} says declined", "i could not pay with my card {when}",
        "at the till {where} they told me the card does not work", "three shops turned my card away {when}",
    ],
    "pin_forgotten": [
        "i forgot my pin", "how do i get a new pin for the card", "the pin i remember is wrong",
        "i typed the wrong code three times {when}", "can you send me my pin again",
        "what do i do when i no longer know the four digits", "i need another secret number for withdrawals",
    ],
    "transfer_pending": [
        "my transfer of {amount} has not arrived", "i sent {amount} {when} and it is still pending",
        "how long does a transfer take", "the receiver still waits for my {amount}",
        "the transfer i made {when} is not booked", "where are the {amount} that i sent {when}",
        "my landlord says the money did not reach him yet",
    ],
    "transfer_wrong": [
        "i sent {amount} to the wrong account", "can i call back a transfer i made {when}",
        "i mistyped the account number {when}", "i transferred {amount} by mistake, please undo it",
        "how do i cancel a payment to the wrong person", "{amount} went to a stranger because of a typo",
        "i need to reverse what i sent {when}, it was the wrong receiver",
    ],
    "fee_question": [
        "why was i charged {amount}", "what is this fee of {amount} {when}", "how much does the account cost a month",
        "do i pay for withdrawing cash abroad", "there is a charge of {amount} i do not understand",
        "you took {amount} from me for nothing", "is there a price for using foreign machines",
    ],
    "balance": [
        "how much money do i have", "what is on my account", "show me my balance", "can i see what is left {when}",
        "tell me the amount available on my account", "am i in the red at the moment",
        "how much may i still spend this month",
    ],
    "app_problem": [
        "the app crashes when i open it", "i cannot log in to the app {when}", "the app shows a white screen",
        "since the update {when} nothing loads on my phone", "the login code never arrives in the app",
        "your program freezes on my tablet", "after starting it on the phone i only see an error",
    ],
    "address_change": [
        "i moved and need to change my address", "please send my letters to a new place", "my street has changed {when}",
        "how do i tell you my new address", "i live somewhere else since {when}",
        "post should go to my new flat from now on", "update where i live, please",
    ],
    "loan": [
        "i would like to borrow {amount}", "can i get a loan for a car", "what does a credit of {amount} cost",
        "do you finance a kitchen of {amount}", "i want to apply for a loan of {amount}",
        "could you lend me {amount} for two years", "i need money for a new roof, what are your rates",
    ],
    "close_account": [
        "i want to close my account", "please cancel my account by the end of the month", "how do i leave your bank",
        "end my contract with you", "i would like to terminate everything i have with you",
        "i am switching to another bank, shut mine down", "delete my account and all that belongs to it",
    ],
    "talk_to_human": [
        "i want to speak to a person", "can somebody call me back {when}", "connect me with an employee",
        "is there a phone number i can ring", "i do not want to talk to a machine",
        "give me one of your colleagues, please", "let me talk to someone real",
    ],
}  # fmt: skip
PARTICULARS = {
    "where": [
        "at the station",
        "in the supermarket",
        "on the bus",
        "at the petrol station",
        "in a restaurant",
        "abroad",
    ],
    "when": ["yesterday", "this morning", "last night", "two days ago", "on monday", "an hour ago", "last week"],
    "amount": ["20 euros", "350", "1200 euros", "75.50", "5000", "99 euros", "12.40"],
}
OPENINGS = ["", "", "", "hello, ", "hi, ", "good morning, ", "excuse me, ", "help! ", "quick question: "]
ENDINGS = ["", "", "", ".", "?", ", please", ", thanks", ", it is urgent"]
NUM_KEPT_FOR_TEST = 2


def messages(phrasings: list[str], count: int, generator: random.Random) -> list[str]:
    """Return `count` different messages, every phrasing in its turn."""
    made: dict[str, None] = {}
    number = 0
    while len(made) < count:
        filled = phrasings[number % len(phrasings)].format(
            **{name: generator.choice(values) for name, values in PARTICULARS.items()}
        )
        made[generator.choice(OPENINGS) + filled + generator.choice(ENDINGS)] = None
        number += 1
    return list(made)


def rows(*, test: bool, a_class: int, seed: int) -> list[dict[str, str]]:
    """Return rows with `text` and `label`, shuffled, `a_class` of each intent."""
    generator = random.Random(seed)
    found = []
    for intent, phrasings in PHRASINGS.items():
        chosen = phrasings[-NUM_KEPT_FOR_TEST:] if test else phrasings[:-NUM_KEPT_FOR_TEST]
        found += [{"text": text, "label": intent} for text in messages(chosen, a_class, generator)]
    generator.shuffle(found)
    return found


def write(folder: Path) -> None:
    """Write train.csv and test.csv into ``folder/intents``."""
    target = folder / "intents"
    target.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("train", rows(test=False, a_class=40, seed=1)),
        ("test", rows(test=True, a_class=15, seed=2)),
    ):
        with (target / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, ["text", "label"])
            table.writeheader()
            table.writerows(content)
        print(f"{target.name}/{name}.csv: {len(content)} rows")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
