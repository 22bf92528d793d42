"""Named models with versions and stages: register a run or an export, list them, move them on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tune_magic import display
from tune_magic.commands import STAGES
from tune_magic.errors import TuneError
from tune_magic.handles import Export, Run
from tune_magic.storage import places, versions
from tune_magic.storage.versions import Version
from tune_magic.view.registry import models_card

if TYPE_CHECKING:
    import pandas as pd


class ModelVersion:
    """A version of a named model, as it is now.

    Example:
        >>> best = tune_magic.register(run, "support-bot", stage="staging")  # doctest: +SKIP
        >>> best.stage, best.number  # doctest: +SKIP
        ('staging', 3)
    """

    def __init__(self, version: Version) -> None:
        self.version = version

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.reference} {self.stage} run {self.version.run}>"

    @property
    def reference(self) -> str:
        """As it is typed: ``support-bot@3``; where a run is wanted, this may stand."""
        return self.version.reference

    @property
    def name(self) -> str:
        """The model's name."""
        return self.version.name

    @property
    def number(self) -> int:
        """The version's number, from 1."""
        return self.version.number

    @property
    def stage(self) -> str:
        """candidate, staging, production or archived."""
        return self.version.stage

    @property
    def note(self) -> str | None:
        """What was written of it."""
        return self.version.note

    @property
    def metrics(self) -> dict[str, float]:
        """The run's scores when it was registered."""
        return dict(self.version.metrics)

    @property
    def lineage(self) -> list[str]:
        """What it was made of, from the base model on, in words."""
        return list(self.version.lineage)

    @property
    def run(self) -> Run:
        """Its run.

        Raises:
            TuneError: The run is gone.
        """
        return Run(versions.run_of(self.version))

    @property
    def export(self) -> Export | None:
        """The export that was registered; None where it was the run."""
        job = self.version.path / "exports" / str(self.version.export)
        return Export(job) if self.version.export and (job / "receipt.json").is_file() else None

    def move(self, stage: str, note: str | None = None) -> ModelVersion:
        """Move it to a stage; what was at production before is archived then.

        Raises:
            TuneError: There is no such stage.
        """
        said = {"stage": stage} | ({} if note is None else {"note": note})
        self.version = versions.change(self.version, **said)
        return self


class ModelList:
    """Registered models with their versions, the newest of each first.

    Args:
        found: The versions.
        one: Whether they are of one model, whose lineage is then shown.
    """

    def __init__(self, found: Sequence[Version], *, one: bool = False) -> None:
        self.versions = [ModelVersion(version) for version in found]
        self._one = one

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} versions>"

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, place: int) -> ModelVersion:
        return self.versions[place]

    def frame(self) -> pd.DataFrame:
        """Return a row a version: name, number, stage, run, note, and each score."""
        import pandas as pd

        return pd.DataFrame([
            {"name": v.name, "number": v.number, "stage": v.stage, "run": v.version.run, "note": v.note, **v.metrics} for v in self.versions
        ])  # fmt: skip

    def card(self) -> dict[str, str]:
        """Return the table as HTML and as text."""
        return models_card([v.version for v in self.versions], with_lineage=self._one)

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()


def register(target: Run | Export, name: str, stage: str | None, note: str | None) -> ModelVersion:
    """Give a run or an export a version under a name; one that has one keeps it. Arguments as in `tune_magic.register`."""
    run = target.run if isinstance(target, Export) else target
    export = target.id if isinstance(target, Export) else None
    versions.check_name(name)
    if stage is not None and stage not in STAGES:
        raise TuneError(f"There is no stage {stage!r}.", hint=f"Stages: {', '.join(STAGES)}.")
    run.best_checkpoint  # noqa: B018 - without one, there is nothing to register
    if run.status != "finished":
        raise TuneError(f"{run.name or run.id} is {run.status}; a version is of a run that will not change.",
                        hint=f"Let it finish: `%tune resume {run.name or run.id}`.")  # fmt: skip
    if isinstance(target, Export) and target.ok is False:
        raise TuneError(
            f"The export {target.id} is out of tolerance, so it is not the model.",
            hint="Register the run, or export it otherwise.",
        )
    own = run.path.parent
    places.remember_root(own)
    roots = list(dict.fromkeys([*places.roots(), own]))
    same = [one for one in versions.of(name, roots) if (one.run, one.export) == (run.id, export)]
    found = ModelVersion(same[0] if same else _new(run, export, name, versions.home(name, roots) or own))
    if stage is not None and stage != found.stage:
        found.move(stage)
    if note is not None:
        found.version = versions.change(found.version, note=note)
    return found


def _new(run: Run, export: str | None, name: str, root: Any) -> Version:
    from tune_magic.exporters.model_card import lineage

    scores = {key: value for key, value in run.metrics.items() if math.isfinite(value)}
    return versions.add(root, name, run=run.id, path=str(run.path), export=export, metrics=scores, lineage=lineage(run))


def find(reference: str) -> ModelVersion:
    """Return a version by ``NAME@NUMBER`` or ``NAME@STAGE``.

    Raises:
        TuneError: There is none, with what there is.
    """
    return ModelVersion(versions.pick(reference, places.roots()))


def list_models(name: str | None = None) -> ModelList:
    """Return the versions of all models, or of one."""
    roots = places.roots()
    if name is not None:
        versions.pick(name, roots)  # says what there is where it is not there
        return ModelList(versions.of(name.partition("@")[0], roots), one=True)
    return ModelList([version for known in versions.names(roots) for version in versions.of(known, roots)])


def set_stage(name: str, number: int | str, stage: str, note: str | None = None) -> tuple[ModelVersion, Version | None]:
    """Move a version to a stage; return it, and the version that had to leave production for it."""
    roots = places.roots()
    chosen = versions.pick(f"{name}@{number}", roots)
    before = next(
        (one for one in versions.of(name, roots) if one.stage == "production" and one.number != chosen.number), None
    )
    return ModelVersion(chosen).move(stage, note), before if stage == "production" else None
