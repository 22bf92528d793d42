"""What was exported, sent to where others find it: the Hugging Face hub, an MLflow registry."""

from __future__ import annotations

import importlib.util
import math

from tune_magic.commands import DESTINATIONS, nearest
from tune_magic.errors import TuneError
from tune_magic.exporters import model_card
from tune_magic.handles import Export, Run
from tune_magic.recipe.differences import flat
from tune_magic.storage.events import number

_LONGEST_PARAMETER = 500  # characters that MLflow takes
_AT_ONCE = 1000  # metrics in a request
_LOG_IN = "`hf auth login` in a terminal, or the variable HF_TOKEN, gives one that may write."


def push(
    target: Run | Export, to: str, name: str, *, form: str | None, private: bool, stage: str | None, uri: str | None
) -> str:
    """Send an export, or the newest of a run that is within tolerance, and return where it is; arguments as in `tune_magic.push`."""
    if to not in DESTINATIONS:
        raise TuneError(
            f"Nothing is pushed to {to!r}.{nearest(to, DESTINATIONS)}", hint=f"Destinations: {', '.join(DESTINATIONS)}."
        )
    for flag, value, owner in (("private", private, "hub"), ("stage", stage, "mlflow"), ("uri", uri, "mlflow")):
        if value and to != owner:
            raise TuneError(f"--{flag} is for `--to {owner}`.", hint="Leave it out.")
    export = target if isinstance(target, Export) else _export_of(target, form)
    if export.ok is False:
        raise TuneError(
            f"The export {export.id} is out of tolerance, so it is not the model.", hint="Export it otherwise."
        )
    return _to_hub(export, name, private=private) if to == "hub" else _to_mlflow(export, name, stage, uri)


def _export_of(run: Run, form: str | None) -> Export:
    name = run.name or run.id
    found = [one for one in run.exports if one.ok is True and form in (None, one.receipt["to"]) and one.path.is_dir()]
    if not found:
        raise TuneError(f"{name} has no export{f' in the format {form}' if form else ''} that could be pushed.",
                        hint=f"`%export {name} --to {form or 'adapter'}` makes one.")  # fmt: skip
    return found[0]


def _to_hub(export: Export, repo: str, *, private: bool) -> str:
    """Upload an export's folder with its model card.

    Raises:
        TuneError: There is no network, no token, or the hub refuses.
    """
    import httpx
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise TuneError(
            "The hub cannot be reached: HF_HUB_OFFLINE is set.", hint="Unset it, restart the kernel and push again."
        )
    if get_token() is None:
        raise TuneError("There is no token for the hub.", hint=_LOG_IN)
    card = model_card.model_card(export.run, export.receipt).replace(model_card.HERE, repo)
    message = f"{export.run.name or export.run.id}: {export.receipt['to']}, step {export.receipt['step']}"
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise TuneError(
                f"{repo} is there already, and it is public.", hint="Name another, or make it private on the hub."
            )
        api.upload_folder(
            repo_id=repo, folder_path=export.path, ignore_patterns=[model_card.FILE], commit_message=message,
            delete_patterns="*",  # an adapter that was there before would be put on
        )  # fmt: skip
        api.upload_file(
            repo_id=repo,
            path_or_fileobj=card.encode(),
            path_in_repo=model_card.FILE,
            commit_message=f"{message}: model card",
        )
    except HFValidationError as error:
        raise TuneError(f"{repo!r} is no name of a repository.", hint="`--repo me/my-model`.") from error
    except HfHubHTTPError as error:
        hint = (
            _LOG_IN if error.response is not None and error.response.status_code in (401, 403) else "Try again later."
        )
        raise TuneError(f"The hub refuses to take {repo}.", hint=hint) from error
    except (OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise TuneError("The hub cannot be reached.", hint="Is there a network? Nothing here was changed.") from error
    return str(url)


def _to_mlflow(export: Export, name: str, stage: str | None, uri: str | None) -> str:
    """Log recipe, curves, scores and files as an MLflow run, and register them as the next version of a model.

    Raises:
        TuneError: MLflow is not installed, or refuses.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise TuneError("MLflow is not installed.", hint="pip install 'tune-magic[mlflow]'")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    run = export.run
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        logged = client.create_run(experiment_id, run_name=run.name or run.id).info
        parameters = [Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in flat(run.recipe).items()]
        tags = [
            RunTag("tune_magic.run", run.id),
            RunTag("tune_magic.identity", str(run.summary().plan.get("identity"))),
        ]
        client.log_batch(logged.run_id, params=parameters, tags=tags)
        metrics = [Metric(key, value, when, step) for key, value, when, step in _metrics(run)]
        for first in range(0, len(metrics), _AT_ONCE):
            client.log_batch(logged.run_id, metrics=metrics[first : first + _AT_ONCE])
        client.log_artifacts(logged.run_id, str(export.path), "model")
        client.log_text(logged.run_id, model_card.model_card(run, export.receipt), "model_card.md")
        client.set_terminated(logged.run_id)
        if not [one for one in client.search_registered_models() if one.name == name]:
            client.create_registered_model(name)
        version = client.create_model_version(
            name, f"{logged.artifact_uri}/model", logged.run_id, description=run.meta.get("note")
        )
        if stage is not None:
            client.set_registered_model_alias(name, stage, version.version)
    except (MlflowException, OSError) as error:
        raise TuneError(
            f"MLflow does not take {name}.", hint="Is the tracking server there? `--uri` names another."
        ) from error
    return f"models:/{name}/{version.version}"


def _metrics(run: Run) -> list[tuple[str, float, int, int]]:
    """Return (name, value, time in ms, step) of the curves, and of the scores at the best step."""
    summary = run.summary()
    found = [
        (name, number(event[name]), event["t"], step)
        for step, event in sorted(summary.steps.items())
        for name in ("loss", "learning_rate", "grad_norm")
    ]
    found += [
        ("held_out_loss", number(event["loss"]), event["t"], step)
        for step, event in sorted(summary.evaluations.items())
    ]
    report = run.report
    last = max((event["t"] for event in summary.steps.values()), default=run.info["created"])
    found += [
        (f"evaluate.{name}", value, last, summary.step) for name, value in (report.metrics if report else {}).items()
    ]
    return [(name, value, int(1000 * when), step) for name, value, when, step in found if math.isfinite(value)]
