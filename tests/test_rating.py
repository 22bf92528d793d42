"""Votes of people: blind, kept, resumed, counted, and read back as preferences."""

import errno
import itertools
import json
import math
import os
import threading

import numpy as np
import pytest
from conftest import normalise
from test_view import Page
from tune_magic.widgets import RatePanel

import tune_magic
from tune_magic import cli, files
from tune_magic.ballot import KEYS, Ballot
from tune_magic.data.content import Preference, PromptCompletion, Text, Turns
from tune_magic.data.example import Example, Segment
from tune_magic.errors import TuneError
from tune_magic.evaluation import opinions, prompts, votes
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.votes import A, B, Vote
from tune_magic.handles import Report, Run
from tune_magic.recipe.schema import SourceOptions
from tune_magic.storage import events, folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Run(folder.create(tmp_path / "tune_runs", "finetune", {"name": "bot", "recipe": {}}))


@pytest.fixture
def evaluate(run):
    """Make a finished evaluation of rows, each a mapping of what is not usual; ten rows where none are given."""

    def make(*changes, **about):
        path = folder.create(run.path / "evals", "evaluate", {})
        score = Comparison("exact match", 0.5, 0.5, 0.0, 0.0, 0.0, higher_is_better=True).to_dict()
        report = {"format": 1, "about": {"rows": len(changes) or 10}, "metrics": {"exact_match": score}, **about}
        files.write_json(path / "report.json", report)
        usual = [
            {"row": i, "question": f"q {i}", "reference": "r", "base": f"one {i}", "tuned": f"two {i}",
             "exact_match_base": 0.0, "exact_match_tuned": 1.0}
            for i in range(len(changes) or 10)
        ]  # fmt: skip
        files.write_json_lines(path / "rows.jsonl", [a | b for a, b in zip(usual, changes or usual, strict=True)])
        return Report(path)

    return make


def vote_for(ballot, side, comment=""):
    """Vote for a side, which nobody at the panel could do."""
    ballot.vote(A if ballot.current.sides[0] == side else B, comment)


def rate_all(report, wins, **options):
    """Vote for the tuned model on so many pairs, for the base on the others."""
    ballot = Ballot(report, **options)
    for number in range(len(ballot.pairs)):
        vote_for(ballot, "tuned" if number < wins else "base")
    return ballot


# --- blind -----------------------------------------------------------------------------------------------------------


def pages(ballot):
    """Return everything a browser is given while a rater votes on every pair: widgets, views, cards."""
    panel = RatePanel(ballot)
    widgets = [panel.keys, panel.comment, panel.finish, panel.controls, *panel.buttons.values()]
    found = []
    while ballot.current is not None:
        states = [
            {key: value for key, value in each.get_state().items() if "IPY_MODEL" not in str(value)} for each in widgets
        ]
        found.append([states, panel.bundle(), ballot.card(), repr(ballot), repr(ballot.current)])
        ballot.vote(A)
    return found


def test_nothing_a_browser_is_given_depends_on_whose_answer_is_which(evaluate, monkeypatch):
    """The same answers said by the other model make the same page to the letter."""
    monkeypatch.setattr(votes, "_print", lambda rows: "the same")
    here = pages(Ballot(evaluate()))
    number = votes._drawn_number
    monkeypatch.setattr(votes, "_drawn_number", lambda salt, place: number(salt, place) + salt.endswith("|sides"))
    there = evaluate(*({"tuned": f"one {i}", "base": f"two {i}"} for i in range(10)))
    assert pages(Ballot(there)) == here
    for word in ("tuned", "base"):
        assert word not in json.dumps(here)
    assert len({page[1]["text/plain"] for page in here}) == 10


def test_places_are_drawn_anew_for_each_rater_and_rows_are_the_same(evaluate):
    report = evaluate(*[{}] * 300)
    ann, bob = (Ballot(report, rater=rater, limit=200) for rater in ("ann", "bob"))
    assert {pair.place for pair in ann.pairs} == {pair.place for pair in bob.pairs}
    assert [pair.place for pair in ann.pairs] != [pair.place for pair in bob.pairs]
    left = [{pair.place: pair.sides[0] for pair in ballot.pairs} for ballot in (ann, bob)]
    for sides in left:
        assert 70 < sum(side == "tuned" for side in sides.values()) < 130  # half of 200, four deviations
    assert 70 < sum(left[0][place] == left[1][place] for place in left[0]) < 130
    again, other = Ballot(report, rater="ann", limit=200), Ballot(report, rater="ann", limit=200, seed=1)
    assert again.pairs == ann.pairs != other.pairs
    assert {pair.place for pair in Ballot(report, rater="ann", limit=20).pairs} < {pair.place for pair in ann.pairs}


def test_who_knows_seed_and_rater_alone_cannot_tell(evaluate):
    """The same seed and rater give other sides where the rows are others: the rows are part of the draw."""
    sides = [{pair.place: pair.sides for pair in Ballot(evaluate(*[{"reference": text}] * 60)).pairs} for text in "xy"]
    assert sides[0] != sides[1]


# --- voting ----------------------------------------------------------------------------------------------------------


def test_a_rating_goes_on_where_it_was_and_the_last_vote_counts(evaluate):
    report = evaluate()
    first = Ballot(report, rater="ann")
    order = [pair.place for pair in first.pairs]
    vote_for(first, "tuned", "polite")
    first.vote("bad")
    first.vote("skip")
    again = Ballot(report, rater="ann")
    assert [pair.place for pair in again.pairs] == order
    assert again.current.place == order[3]
    for _ in range(3):
        again.back()
    assert again.chosen(again.current) == (A if again.current.sides[0] == "tuned" else B, "polite")
    vote_for(again, "base", "on second thought")
    assert again.current.place == order[3]  # on to the first pair without a vote
    frame = report.votes.set_index("row")
    assert frame.loc[order[0], "better"] == "base"
    assert frame.loc[order[0], "comment"] == "on second thought"
    assert list(frame.loc[order[:3], "choice"])[1:] == ["bad", "skip"]
    assert len(frame) == 3
    again.back()
    again.back()
    again.vote("skip")  # what has a vote keeps it
    assert report.votes.set_index("row").loc[order[1], "choice"] == "bad"
    assert again.current.place == order[2]


def test_another_seed_shows_an_earlier_vote_as_it_is_seen_now(evaluate):
    report = evaluate()
    rate_all(report, 10)
    other = Ballot(report, seed=5)
    assert other.is_done
    for pair in other.pairs:
        assert other.chosen(pair)[0] == (A if pair.sides[0] == "tuned" else B)


def test_rows_with_equal_answers_are_ties_and_not_shown(evaluate):
    same = {"base": "same ", "tuned": "same"}
    report = evaluate({}, same, {}, same, same)
    assert "3 rows have equal answers" in Ballot(report).shown()["text/plain"]
    ballot = rate_all(report, 1)
    assert (len(ballot.pairs), ballot.num_equal) == (2, 3)
    rating = report.rating()
    assert (rating.wins, rating.ties, rating.losses, rating.num_equal) == (1, 3, 1, 3)
    assert "3 rows have equal answers: they count as ties" in rating.card()["text/plain"]
    nothing = Ballot(evaluate(same, same))
    assert nothing.current is None
    assert "nothing to rate" in nothing.shown()["text/plain"]
    with pytest.raises(TuneError, match="me has not voted on answers of base yet"):
        nothing.rating()


def test_two_raters_and_two_tabs_do_not_disturb_each_other(evaluate, monkeypatch):
    report = evaluate()
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(events.time, "time", lambda: next(seconds))  # a vote of two tabs in one millisecond has no last
    ann, bob, tab = (Ballot(report, rater=rater) for rater in ("ann", "bob", "ann"))
    order = [pair.place for pair in ann.pairs]
    for _ in range(4):
        vote_for(ann, "tuned")
        vote_for(bob, "base")
    assert tab.current.place == order[0]
    vote_for(tab, "base")
    assert tab.current.place == order[4]  # what was rated in the other tab is not asked again
    vote_for(tab, "base")
    vote_for(ann, "tuned")
    frame = report.votes
    assert len(list((report.path / "votes").iterdir())) == 3
    said = frame[frame["rater"] == "ann"].set_index("row").loc[order[:5], "better"]
    assert list(said) == ["base", "tuned", "tuned", "tuned", "tuned"]  # the last one counts
    assert list(frame[frame["rater"] == "bob"]["better"]) == ["base"] * 4


def test_f24_a_vote_that_cannot_be_written_is_told_and_not_counted(evaluate, monkeypatch):
    report = evaluate()
    ballot = Ballot(report)
    ballot.vote(A)
    pair, append = ballot.current, files.append

    def full(descriptor, data, *, durable):
        os.write(descriptor, data[:7])
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 7)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    panel = RatePanel(ballot)
    monkeypatch.setattr(files, "append", full)
    panel.buttons[B].click()
    panel.act()
    assert "could not be written: No space left on device" in panel.bundle()["text/plain"]
    assert ballot.current is pair
    monkeypatch.setattr(files, "append", append)
    panel.buttons[B].click()
    panel.act()
    assert "could not" not in panel.bundle()["text/plain"]
    assert list(report.votes["choice"]) == [A, B]


def test_f1_votes_before_a_torn_line_stand_and_voting_goes_on(evaluate):
    report = evaluate()
    rate_all(report, 3).close()
    (log,) = (report.path / "votes").iterdir()
    log.write_bytes(log.read_bytes()[:-9])
    assert len(report.votes) == 9
    again = Ballot(report)
    vote_for(again, "base")
    assert len(report.votes) == 10
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*lines[:3], lines[3].replace(b'"A"', b'"B"').replace(b"tuned", b"bases"), *lines[4:]]))
    assert len(report.votes) == 9
    assert "is damaged at line 4" in report.rating().card()["text/plain"]


def test_votes_of_a_newer_version_are_refused(evaluate, monkeypatch):
    report = evaluate()
    monkeypatch.setattr(votes, "FORMAT", 2)
    Ballot(report).vote(A)
    monkeypatch.setattr(votes, "FORMAT", 1)
    with pytest.raises(TuneError, match="newer tune_magic"):
        report.votes  # noqa: B018


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"against": "other"}, r"No evaluation of bot holds answers of other .*`%evaluate bot other` answers"),
        ({"against": "tuned"}, "No evaluation of bot holds answers of tuned beside its own"),
        ({"rater": " "}, "cannot be a rater's name"),
        ({"rater": "a\x1b[31mb"}, "cannot be a rater's name"),
        ({"rater": "a" * 61}, "cannot be a rater's name"),
        ({"limit": 0}, "must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_rated_says_why(evaluate, run, options, says):
    evaluate()
    with pytest.raises(TuneError, match=says):
        tune_magic.rate(run, **options)


def test_without_answers_the_line_is_told_that_makes_them(run, evaluate):
    with pytest.raises(TuneError, match=r"no finished evaluation.*`%evaluate bot` answers the rows"):
        tune_magic.rate(run)
    evaluate({"tuned": "spam", "base": "ham"}, classes=["ham", "spam"])
    with pytest.raises(TuneError, match="tells classes apart"):
        tune_magic.rate(run)
    ballot = Ballot(evaluate({}))
    with pytest.raises(TuneError, match=r"no choice 'C'"):
        ballot.vote("C")
    ballot.vote(A)
    with pytest.raises(TuneError, match="Every row has its vote"):
        ballot.vote(A)


def test_the_newest_evaluation_that_holds_both_answers_is_taken(run, evaluate):
    evaluate()
    wanted = evaluate(*[{"few-shot": "three"}] * 10)
    other = evaluate()
    assert tune_magic.rate(run).report.path == other.path
    assert tune_magic.rate("bot", "few-shot").report.path == wanted.path
    assert tune_magic.rate(wanted).report.path == wanted.path


# --- what votes say --------------------------------------------------------------------------------------------------


def cast(said, side=("tuned", "base")):
    """Votes from a text a rater: + tuned is better, - the base, 0 neither, a blank no vote."""
    better = {"+": side[0], "-": side[1], "0": None}
    return [
        Vote(rater, side, place, "A" if better[letter] else "equal", better[letter], side[0], "", 0.0)
        for rater, letters in said.items()
        for place, letter in enumerate(letters)
        if letter != " "
    ]


@pytest.mark.parametrize(
    ("said", "same", "beyond", "measure"),
    [
        ({"a": "+-0+", "b": "+-0+"}, 1.0, 1.0, "Cohen's kappa"),
        # 20 of 50 both say yes, 15 both no, 5 and 10 differ: the textbook's 0.4
        ({"a": "+" * 25 + "-" * 25, "b": "+" * 20 + "-" * 5 + "+" * 10 + "-" * 15}, 0.7, 0.4, "Cohen's kappa"),
        ({"a": "++++", "b": "++++"}, 1.0, None, "Cohen's kappa"),
        # three observers, five units, by hand: 1 - (4 / 15) / (2 * 9 * 6 / (15 * 14))
        ({"a": "+++--", "b": "+++--", "c": "++-+-"}, 11 / 15, 1 - 14 * 4 / 108, "Krippendorff's alpha"),
        ({"a": "+- ", "b": "  +"}, None, None, None),
    ],
)
def test_agreement_is_that_of_the_textbooks(said, same, beyond, measure):
    found = opinions.agreement(cast(said))
    if same is None:
        assert found is None
        return
    assert found.measure == measure
    assert found.same == pytest.approx(same)
    assert found.beyond_chance == (beyond if beyond is None else pytest.approx(beyond))


def test_rows_that_only_some_have_rated_count_in_alpha_as_published():
    """Krippendorff 2011, section C: three observers, fifteen units, values missing, nominal: 0.691."""
    published = [
        "* * * * * 3 4 1 2 1 1 3 3 * 3",
        "1 * 2 1 3 3 4 3 * * * * * * *",
        "* * 2 1 3 4 4 * 2 1 1 3 3 * 4",
    ]
    by_row = {}
    for rater, line in enumerate(published):
        for place, value in enumerate(line.split()):
            if value != "*":
                by_row.setdefault(place, {})[f"r{rater}"] = int(value)
    shared = {place: said for place, said in by_row.items() if len(said) > 1}
    assert opinions._alpha(shared, ["r0", "r1", "r2"]) == pytest.approx(0.691, abs=5e-4)


def test_shares_have_wilsons_interval_and_the_sign_test():
    found = opinions.share(9, 10)
    assert (found.low, found.high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert found.p == pytest.approx(22 / 1024)
    nothing = opinions.share(0, 0)
    assert math.isnan(nothing.value)
    assert nothing.p == 1.0


def test_a_row_counts_once_by_the_majority_of_its_raters(evaluate):
    report = evaluate(*[{}] * 12)
    for rater, wins in (("ann", 12), ("bob", 12), ("cid", 0)):
        rate_all(report, wins, rater=rater)
    rating = report.rating()
    assert (rating.wins, rating.losses, rating.num_rows) == (12, 0, 12)
    assert rating.win_rate.p == pytest.approx(2 / 2**12)
    assert rating.verdict == "better"
    assert rating.agreement.raters == 3
    assert rating.agreement.same == pytest.approx(1 / 3)
    assert report.rating(rater="cid").losses == 12
    text = rating.card()["text/plain"]
    for words in ("rated against base on 12 rows by ann, bob, cid", "better on 12, worse on 0", "Krippendorff's alpha"):
        assert words in text
    two = evaluate(*[{}] * 4)
    rate_all(two, 4, rater="ann")
    rate_all(two, 0, rater="bob")
    assert two.rating().ties == 4
    assert len(two.preferences()) == 0


def test_a_rater_who_always_takes_the_left_is_found_out(evaluate):
    report = evaluate(*[{}] * 40)
    ballot = Ballot(report)
    while ballot.current is not None:
        ballot.vote(A)
    rating = report.rating()
    assert rating.first.value == 1.0
    assert rating.first.p < 1e-6
    assert "the place of an answer had a say" in rating.card()["text/plain"]
    fair = evaluate(*[{}] * 41)
    assert "no sign that a place was preferred" in rate_all(fair, 41).rating().card()["text/plain"]


def test_metrics_are_held_against_people(evaluate):
    """The metric prefers the tuned model on all rows but one, where it prefers none."""
    report = evaluate(*[{}] * 9, {"exact_match_base": 1.0})
    ballot = Ballot(report)
    while ballot.current is not None:
        vote_for(ballot, "base" if ballot.current.place < 3 else "tuned")
    share = report.rating().by_metric["exact_match"]
    assert (share.count, share.total) == (6, 9)
    assert "exact match prefers the same: 6 of 9 rows" in report.rating().card()["text/plain"]


def test_who_leads_is_told_only_at_the_end(evaluate):
    report = evaluate({}, {}, {})
    ballot = Ballot(report, rater="ann b", limit=5)
    vote_for(ballot, "tuned")
    text = ballot.card()["text/plain"]
    assert "rated by ann b · 1 of 3 rows" in text
    assert "`%tune rate bot --rater 'ann b' --limit 5` goes on where this ended." in text
    assert "tuned" not in text
    vote_for(ballot, "tuned")
    vote_for(ballot, "base")
    assert "tuned better on 2, worse on 1" in ballot.card()["text/plain"]


# --- preferences -----------------------------------------------------------------------------------------------------


def read_back(path):
    """Return rows as our own format of preferences reads them."""
    found = list(files.each_json_line(path))
    from tune_magic.data.read import Row

    return normalise([Row(row, f"line {i + 1}") for i, row in enumerate(found)], SourceOptions(), "prefs.jsonl")


def test_votes_become_rows_that_the_preference_format_reads(evaluate, tmp_path):
    report = evaluate({}, {}, {}, {}, {"tuned": " "})
    ballot = Ballot(report)
    said = {0: "tuned", 1: "base", 4: "base"}
    while ballot.current is not None:
        place = ballot.current.place
        vote_for(ballot, said[place]) if place in said else ballot.vote("bad" if place == 2 else "skip")
    saved = ballot.save(tmp_path / "prefs.jsonl")
    assert saved.left_out == {"tie": 1, "skipped": 1, "empty": 1}
    assert repr(saved) == "<Preferences 2 rows; left out: 1 tie, 1 skipped, 1 empty>"
    assert read_back(tmp_path / "prefs.jsonl") == [
        Preference(PromptCompletion("q 0", "two 0"), PromptCompletion("q 0", "one 0")),
        Preference(PromptCompletion("q 1", "one 1"), PromptCompletion("q 1", "two 1")),
    ]
    assert list(report.preferences().frame()["row"]) == [0, 1]
    with pytest.raises(TuneError, match=r"already.*overwrite=True"):
        report.preferences().save(tmp_path / "prefs.jsonl")
    report.preferences().save(tmp_path / "prefs.jsonl", overwrite=True)
    with pytest.raises(TuneError, match="cannot be written: No such file"):
        report.preferences().save(tmp_path / "gone" / "prefs.jsonl")


def test_without_a_preference_nothing_is_written(evaluate, tmp_path):
    ballot = Ballot(evaluate({}))
    ballot.vote("equal")
    with pytest.raises(TuneError, match="No vote prefers an answer yet"):
        ballot.save(tmp_path / "prefs.jsonl")
    assert not (tmp_path / "prefs.jsonl").exists()


def test_a_chat_is_rated_and_saved_with_what_was_said_before(train, monkeypatch, tmp_path):
    """A real run with a system message, evaluated: the rater sees it, and the row that is saved holds it."""
    from tune_magic.executors import local

    run = train(max_steps=4)
    start = local.start
    monkeypatch.setattr(local, "start", lambda path, *_: start(path, "inline"))
    report = run.evaluate(limit=4, max_new_tokens=6)
    assert [row["prompt"][0]["content"] for row in report.rows] == ["Name the colour."] * 4
    ballot = tune_magic.rate(run, rater="ann")
    assert "system: Name the colour." in ballot.shown()["text/plain"]
    while ballot.current is not None:
        vote_for(ballot, "tuned")
    ballot.save(tmp_path / "prefs.jsonl")
    for content, row in zip(read_back(tmp_path / "prefs.jsonl"), ballot.preferences().rows, strict=True):
        assert isinstance(content.chosen, Turns)
        assert [message["role"] for message in content.chosen.messages] == ["system", "user", "assistant"]
        assert content.chosen.messages[-1]["content"] == row["chosen"][0]["content"]
        assert content.chosen.trained_from == 2


CHAT = [
    {"role": "system", "content": "s"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "asked", "answered", "length"),
    [
        (Turns(CHAT), "one", "1", 6),  # the last of two that are the same
        (Turns(CHAT), "two", "2", 4),  # the rest was cut, or is another example
        (Turns(CHAT[:3], trained_from=3), "one", "1", 0),  # an answer that is not trained is none of the row's
        (PromptCompletion("one", "1", "s"), "one", "1", 2),
        (PromptCompletion("one", "1"), "one", "1", 1),
        (Text("one"), None, None, 0),
        (None, "one", "1", 0),
    ],
)
def test_what_was_said_before_an_answer_is_found(content, asked, answered, length):
    tokens = Segment(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32))
    found = prompts._before(content, Example(tokens, question=asked, reference=answered))
    assert len(found) == length
    if length:
        assert found[-1] == {"role": "user", "content": asked}


# --- surfaces --------------------------------------------------------------------------------------------------------


def test_buttons_and_keys_vote_on_the_pair_that_is_shown(evaluate):
    report = evaluate()
    panel = RatePanel(Ballot(report))
    order = [pair.place for pair in panel.ballot.pairs]
    assert panel.buttons["back"].disabled
    panel.comment.value = "short"
    panel.buttons[A].click()
    assert report.votes.empty  # the callback only asks
    worker = threading.Thread(target=panel.act)
    worker.start()
    worker.join()
    assert panel.comment.value == ""
    assert "1 of 10 rated" in panel.bundle()["text/plain"]
    for typed in ("2", "=", "X", "12", "?", "5"):
        panel.keys.value = typed
        assert panel.keys.value == ""
        panel.act()
    frame = report.votes.set_index("row").loc[order[:6]]
    assert list(frame["choice"]) == [A, B, "equal", "bad", B, "skip"]
    assert list(frame["comment"]) == ["short", *[""] * 5]
    for _ in range(6):
        panel.keys.value = "z"
    panel.act()
    assert panel.comment.value == "short"
    assert "You said: A is better" in panel.bundle()["text/plain"]
    panel.keys.value = "b"
    panel.keys.value = "b"  # both at the same pair: a key that was pressed too long votes once
    panel.act()
    assert len(report.votes) == 6
    assert report.votes.set_index("row").loc[order[0], "choice"] == B


def test_a_panel_that_is_finished_leaves_a_card_and_lost_votes_none(evaluate, run, capsys):
    evaluate({}, {})
    panel = RatePanel("bot", rater="ann")
    panel._ipython_display_()
    panel.buttons[A].click()
    panel.close()  # whether or not the thread came to the vote
    assert panel.is_over
    assert len(run.report.votes) == 1
    assert "goes on where this ended" in capsys.readouterr().out.strip().split("\n")[-1]
    again = RatePanel("bot", rater="ann")
    again.buttons[B].click()
    again.act()
    assert "Every row has its vote" in again.bundle()["text/plain"]
    assert again.buttons[A].disabled and not again.buttons["back"].disabled
    again.finish.click()
    again.act()
    assert again.is_over
    assert "rated against base on 2 rows" in again.bundle()["text/plain"]


def test_every_widget_says_what_it_is(evaluate):
    panel = RatePanel(Ballot(evaluate()))
    for widget in (panel.keys, panel.comment, panel.finish, *panel.buttons.values()):
        assert widget.tooltip
    for key, choice in KEYS.items():
        assert key in panel.buttons[choice].tooltip or key == "e"


def test_f30_hostile_answers_are_shown_and_do_nothing(evaluate):
    evil = "<img src=x onerror=alert(1)></div><script>alert(1)</script>\x1b[31m\u202e"
    report = evaluate({"question": evil, "tuned": evil, "base": evil * 2, "prompt": [{"role": evil, "content": evil}]})
    ballot = Ballot(report, rater="<b>ann</b>")
    shown = [ballot.shown(), ballot.card()]
    ballot.vote(A, evil)
    shown += [ballot.card(), report.rating().card()]
    for bundle in shown:
        page = Page(bundle["text/html"])
        assert "\x1b" not in bundle["text/html"] + bundle["text/plain"]
        assert "<script" not in bundle["text/html"]
        assert "ann" in page.text
    assert "onerror=alert(1)" in Page(shown[0]["text/html"]).text


def test_a_terminal_votes_by_typed_keys(evaluate, run, monkeypatch, capsys):
    report = evaluate({"tuned": "word " * 1500 + "end"}, {"base": " "}, {})
    typed = iter(["1 short and right", "what", "b", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert cli.main(["rate", "bot", "--rater", "ann"]) == 0
    out = capsys.readouterr().out
    assert "`what` is no vote." in out
    assert "\nB: " in out and "\nA: " in out
    assert "rated by ann · 2 of 3 rows" in out
    assert list(report.votes["choice"]) == [A, B]
    assert report.votes["comment"][0] == "short and right"
    typed = iter(["="])
    assert cli.main(["rate", "bot", "--rater", "ann"]) == 0
    out += capsys.readouterr().out
    assert "rated against base on 3 rows by ann" in out
    assert "word word end\n" in out  # nobody votes on half an answer
    assert ": (an empty answer)\n" in out
    assert cli.main(["rate", "bot", "--against", "nobody"]) == 1
    assert "No evaluation of bot holds answers of nobody" in capsys.readouterr().err
