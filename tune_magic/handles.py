"""What users hold: a run, a report, an export. Cheap; no torch until a model is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_magic import cell_code, display
from tune_magic.diagnosis import Diagnosis, diagnose
from tune_magic.errors import RunFailed, Stopped, TuneError
from tune_magic.evaluation.report import Scores, newest_report
from tune_magic.storage.events import number
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.state import RESUMABLE, State
from tune_magic.view.html import clean
from tune_magic.view.words import size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from tune_magic.rating import Preferences, Rating

HISTORY = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds")
_POLL_S = 0.2
_LONGEST_NAME = 80


class Run(RunFolder):
    """A fine-tuning run in its folder.

    Example:
        >>> run = tune_magic.load_run("support_bot")  # doctest: +SKIP
        >>> run.status, run.metrics["held_out_loss"]  # doctest: +SKIP
        ('finished', 0.29)
    """

    @property
    def status(self) -> State:
        """The state by the table of `storage.state`; a worker that died before it could write is lost at once."""
        from tune_magic.executors import local

        state = super().status
        died = self.is_coming_up and local.exit_code(self.path) is not None
        return "lost" if died else state

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as given, normalised."""
        return dict(self.info["recipe"])

    @property
    def cell_code(self) -> dict[str, str]:
        """The source of each plug-in it needs that a notebook cell defined, by kind and name: ``objective my_loss``."""
        return {f"{code.kind} {code.name}": code.source for code in cell_code.needed(self)}

    @property
    def metrics(self) -> dict[str, float]:
        """Plain floats: the held-out loss of base and best, and of the last `evaluate` everything it scored.

        Of a search for the learning rate, that rate, if one was found.
        """
        summary = self.summary()
        found: dict[str, float] = {}
        if summary.result.get("learning_rate") is not None:
            found["learning_rate"] = number(summary.result["learning_rate"])
        if 0 in summary.evaluations:
            found["base_held_out_loss"] = number(summary.evaluations[0]["loss"])
        if summary.best:
            found["held_out_loss"] = number(summary.best["loss"])
        if summary.steps:
            found["train_loss"] = number(summary.steps[summary.step]["loss"])
        report = self.report
        return found | (report.metrics if report else {})

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: step, epoch, loss, learning_rate, grad_norm, tokens, seconds, held_out_loss.

        Numbers that callbacks logged follow as ``callback.number``.
        """
        import pandas as pd

        summary = self.summary()
        rows = [{key: number(event[key]) for key in HISTORY} for _, event in sorted(summary.steps.items())]
        frame = pd.DataFrame(rows, columns=list(HISTORY)).astype({"step": int, "tokens": int})
        losses = {step: number(event["loss"]) for step, event in summary.evaluations.items()}
        frame["held_out_loss"] = frame["step"].map(losses).astype(float)
        for name in dict.fromkeys(name for notes in summary.notes.values() for name in notes):
            found = {step: number(notes[name]) for step, notes in summary.notes.items() if name in notes}
            frame[name] = frame["step"].map(found).astype(float)
        return frame

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """What its curve means, in words, each with a line of the recipe to change."""
        return diagnose(self.summary())

    @property
    def report(self) -> Report | None:
        """The newest finished evaluation, if any."""
        path = newest_report(self.path)
        return Report(path) if path else None

    @property
    def exports(self) -> list[Export]:
        """What was exported of it, newest first, also what was out of tolerance."""
        return [Export(path.parent) for path in sorted(self.path.glob("exports/*/receipt.json"), reverse=True)]

    def export_table(self) -> pd.DataFrame:
        """Return a line for each export, newest first: format, size, latency, same and right answers, losses, verdict.

        Shares are of the rows that were compared, seconds are medians a row or a token; see `view.exports.COLUMNS`.
        """
        import pandas as pd

        from tune_magic.view.exports import COLUMNS, export_rows

        return pd.DataFrame(export_rows([export.receipt for export in self.exports]), columns=list(COLUMNS))

    def plot_exports(self) -> Figure:
        """Return the quality of all exports, and their latency, against their size as a matplotlib figure."""
        from tune_magic.view.exports import exports_figure

        return exports_figure([export.receipt for export in self.exports])

    def wait(self, timeout_s: float | None = None, each: Callable[[], None] | None = None) -> Run:
        """Block until the run has ended.

        Args:
            timeout_s: Longest wait in seconds.
            each: Called at every look, several times a second.

        Raises:
            TimeoutError: It is still going.
        """
        from tune_magic.executors import local

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.is_live or local.is_starting(self.path):
            if each is not None:
                each()
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.name or self.id} is still {self.status} after {timeout_s} s")
            time.sleep(_POLL_S)
        local.job_ended()
        return self

    def stop(self) -> None:
        """Ask the worker to stop at the next microbatch; it saves its last completed step first."""
        if self.is_live or self.is_coming_up:
            self.request("stop")

    @property
    def stop_requested(self) -> bool:
        """Whether somebody has asked this attempt to stop."""
        return self.requested("stop")

    def pause(self) -> None:
        """Ask the worker to save and wait; its memory stays taken."""
        self.request("pause")

    def checkpoint(self) -> None:
        """Ask the worker to save a checkpoint after its current step."""
        self.request("checkpoint")

    def kill(self) -> bool:
        """End the worker at once, whether or not it has come up yet; the last checkpoint stands."""
        from tune_magic.executors import local

        return local.kill(self.path) or super().kill()

    def limit(self, budget: str | None) -> None:
        """Let this attempt end within a time such as ``10m`` from now, evaluated and saved; None does nothing."""
        from tune_magic.recipe.launch import seconds_of

        if budget is not None:
            self.request("budget", until=time.time() + seconds_of(budget))

    def resume(self, executor: str = "worker", budget: str | None = None, *, now: bool = False) -> Run:
        """Go on where a stopped, lost or failed run ended, let a paused one continue, or a queued one start at once.

        It returns at once.

        Raises:
            TuneError: It is running, or finished.
        """
        from tune_magic.executors import local

        if self.status in ("paused", "queued"):
            if budget is not None:
                raise TuneError(
                    f"A {self.status} run keeps the time it was given.", hint="Stop it, then resume with a budget."
                )
            self.request("continue")
            return self
        if self.status not in RESUMABLE:
            raise TuneError(f"{self.name or self.id} is {self.status}; there is nothing to resume.", run=self)
        cell_code.require(self)
        self.expect_attempt(self.summary().attempt + 1)
        self.limit(budget)
        if now:
            self.skip_line()
        local.start(self.path, executor)
        return self

    def skip_line(self) -> None:
        """Let this attempt start although another run holds the device."""
        self.request("continue")

    def raise_for_state(self) -> None:
        """Raise what the run's end means for the code after it.

        Raises:
            Stopped: It was stopped. RunFailed: It failed, or its worker died.
        """
        from tune_magic.executors import local

        name, state, outcome = self.name or self.id, self.status, self.summary().outcome
        if state == "stopped" and outcome.get("reason") == "budget":
            return
        if state == "stopped":
            if self.kind != "finetune":
                raise Stopped(f"{name}: {self.kind} was stopped.")
            where = f"at step {self.summary().step}" if self.summary().steps else "before the first step"
            raise Stopped(f"{name} was stopped {where}.", hint=f"Go on with `%tune resume {name}`.", run=self)
        if state == "failed":
            cause = f" ({outcome['cause']})" if outcome.get("cause") else ""
            message = f"{name}: {outcome.get('error', 'failed')}{cause}"
            raise RunFailed(message, hint=outcome.get("hint"), log=self.log, run=self)
        if state == "lost":
            killed = local.exit_code(self.path) == -9
            what = "was killed (by someone, or for lack of memory)" if killed else "lost its worker"
            hint = f"Go on from the last checkpoint with `%tune resume {name}`."
            if self.is_coming_up:
                what, hint = "did not start", "The log tells why."
            elif self.kind != "finetune":
                hint = "Try it again."
            raise RunFailed(f"{name} {what}.", hint=hint, log=self.log, run=self)

    def rename(self, name: str) -> Run:
        """Give the run another name.

        Raises:
            TuneError: It is not one that can be typed: a word without spaces or slashes.
        """
        check_name(name)
        self.annotate(name=name)
        return self

    def note(self, text: str | None) -> Run:
        """Write a note that its card and the table of runs show; None removes it."""
        self.annotate(note=text)
        return self

    def code(self, target: str = "python") -> str:
        """Return the Python that trains it, or merges it, again, or its recipe for another program.

        Args:
            target: ``python``, ``yaml``, ``script``, ``trl``, ``axolotl``, ``llama-factory`` or ``olive``. What that program has no
                counterpart for is listed at the top, with why.

        Raises:
            TuneError: There is no such target, or that program cannot do what the recipe says.

        Example:
            >>> print(run.code("axolotl"))  # doctest: +SKIP
        """
        if target != "python":
            from tune_magic.handover import targets

            return targets.write(self, target)
        from tune_magic.recipe.twin import merge_code, twin_code

        if self.kind == "merge":
            return merge_code(self.info["merge"], self.name)
        name = self.name if self.name and self.name.isidentifier() else None
        return twin_code(self.recipe, name, {})

    def model_card(self) -> str:
        """Return its model card, Markdown as the Hugging Face hub reads it; each export's folder has one as README.md.

        Raises:
            TuneError: Nothing is trained yet.
        """
        from tune_magic.exporters.model_card import model_card

        return model_card(self)

    def load(self) -> tuple[Any, Any]:
        """Load the best checkpoint into this process and return (model, tokenizer), ready to answer."""
        from tune_magic.training.tuned import load_tuned

        tuned = load_tuned(self)
        return tuned.model, tuned.tokenizer

    def generate(self, prompts: str | Sequence[str | list[dict[str, str]]], max_new_tokens: int = 128) -> list[str]:
        """Answer greedily with the tuned model, loaded into this process.

        Args:
            prompts: A user's message, or a list; an item may also be a chat, a list of role and content.
            max_new_tokens: Longest answer in tokens.

        Returns:
            One answer each, in order.
        """
        from tune_magic.training.tuned import answer

        return answer(self, [prompts] if isinstance(prompts, str) else list(prompts), max_new_tokens)

    def predict(self, texts: Any) -> pd.DataFrame:
        """Return what the tuned model, loaded into this process, finds in texts.

        Args:
            texts: One or more of what it was trained on: texts, pairs of texts, lists of words, (question, context),
                images, recordings.

        Returns:
            One line each. Of a classifier, the probability of each class, and ``.idxmax(axis=1)`` names the likeliest.

        Raises:
            TuneError: The run writes texts, or reads something else.
        """
        import pandas as pd

        from tune_magic.training.tuned import predict

        rows = [texts] if isinstance(texts, str | bytes | Path) else list(texts)
        found = predict(self, rows)
        if len(found) == len(rows) and all(isinstance(row, str) for row in rows):
            found.index = pd.Index(rows, name="text")
        return found

    def evaluate(self, **options: Any) -> Report:
        """Twin of `tune_magic.evaluate(run, ...)`."""
        from tune_magic import api

        return api.evaluate(self, **options)

    def export(self, to: str, **options: Any) -> Export:
        """Twin of `tune_magic.export(run, to=...)`."""
        from tune_magic import api

        return api.export(self, to=to, **options)

    def plot(self) -> Figure:
        """Return the loss curve as a matplotlib figure; of a search for the learning rate, loss against rate."""
        from tune_magic.view.figure import loss_figure, rates_figure

        if self.kind == "find_lr":
            return rates_figure(self.summary().result)
        return loss_figure(self.summary())

    def card(self, banner: str | None = None) -> dict[str, str]:
        """Return the card as HTML and as text; a dry run has its plan, a data job its rows."""
        if self.kind == "plan":
            from tune_magic.view.plan import plan_card

            return plan_card(self)
        if self.kind == "find_lr":
            from tune_magic.view.rates import rates_card

            return rates_card(self)
        if self.kind == "data":
            from tune_magic.view.data import data_card

            return data_card(self)
        from tune_magic.view.card import card
        from tune_magic.view.merge import merge_card

        report = self.report
        show = merge_card if self.kind == "merge" else card
        return show(self, report.comparisons if report else None, banner)

    def show(self) -> None:
        """Show the card: in a notebook as HTML, elsewhere as text."""
        display.show(self.card(), run=self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self)} if display.was_shown(self.path) else self.card()


def check_name(name: str) -> None:
    """Refuse a name that no run can have.

    Raises:
        TuneError: It is not one that can be typed: a word without spaces or slashes.
    """
    if not name or name != clean(name, _LONGEST_NAME) or any(c.isspace() or c in "/\\$'\"" for c in name):
        raise TuneError(
            f"`{clean(name, 40)}` cannot be a run's name.", hint="A word without spaces, slashes or quotes."
        )


class Report(Scores):
    """Scores of base and tuned over the same rows, with their differences and intervals.

    Example:
        >>> report = run.evaluate()  # doctest: +SKIP
        >>> report.difference["exact_match"]  # doctest: +SKIP
        0.88
    """

    @property
    def run(self) -> Run:
        """The run that was evaluated."""
        return Run(self.path.parent.parent)

    @property
    def votes(self) -> pd.DataFrame:
        """What people said of the answers, see `tune_magic.rate`: each rater's last vote on each row.

        Columns: rater, row, against, choice (A, B, equal, bad, skip), better (the side that was chosen), comment, time.
        """
        from tune_magic.rating import votes_frame

        return votes_frame(self)

    def rating(self, against: str | None = None, rater: str | None = None) -> Rating:
        """Return what the votes say: who wins, how sure, whether raters agree; of one rater where one is named.

        Raises:
            TuneError: Nobody has voted.
        """
        from tune_magic.rating import Rating

        return Rating(self, against, rater)

    def preferences(self, against: str | None = None, rater: str | None = None) -> Preferences:
        """Return the votes as rows of preferences, a row each by the majority, ties left out; `.save(path)` writes them.

        Raises:
            TuneError: Nobody has voted.
        """
        from tune_magic.rating import Preferences

        return Preferences(self, against, rater)

    def card(self) -> dict[str, str]:
        """Return the card as HTML and as text."""
        from tune_magic.view.report import report_card

        return report_card(self, self.run.name or self.run.id)

    def show(self) -> None:
        """Show the card: in a notebook as HTML, elsewhere as text."""
        display.show(self.card(), run=self.run)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self)} if display.was_shown(self.path) else self.card()


class Export:
    """A tuned model on disk.

    Attributes:
        path: Folder with the files.
        receipt: What was written, format, step, size of each file in bytes, and under ``parity`` how it compares with
            the trained model over held-out rows.
        ok: Whether it is the same model within tolerance; None when there were no rows to compare on.
    """

    def __init__(self, job: Path) -> None:
        self._job = job
        self.receipt: dict[str, Any] = json.loads((job / "receipt.json").read_text(encoding="utf-8"))
        self.path = Path(self.receipt["path"])
        self.ok: bool | None = self.receipt.get("parity", {}).get("ok")

    def __repr__(self) -> str:
        return f"<Export {self.receipt['to']} {size(self.receipt['size_bytes'])} in {self.path.name}>"

    @property
    def id(self) -> str:
        """The name of its job's folder."""
        return self._job.name

    @property
    def run(self) -> Run:
        """The run that was exported."""
        return Run(self._job.parent.parent)

    def card(self) -> dict[str, str]:
        """Return the card as HTML and as text."""
        from tune_magic.view.export import export_card

        return export_card(self.receipt, self.run.name or self.run.id)

    def show(self) -> None:
        """Show the card: in a notebook as HTML, elsewhere as text."""
        display.show(self.card(), run=self.run)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self)} if display.was_shown(self._job) else self.card()
