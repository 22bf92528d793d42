"""What becomes of a trained run, in Python: a version that people agree on, a place on the hub, a server."""

from __future__ import annotations

from tune_magic import display, pushing, registering, servers
from tune_magic.api import resolve
from tune_magic.errors import TuneError
from tune_magic.handles import Export, Run
from tune_magic.recipe.launch import seconds_of
from tune_magic.registering import ModelList, ModelVersion
from tune_magic.servers import Server
from tune_magic.view.html import note_bundle


def register(run: Run | Export | str, name: str, *, stage: str | None = None, note: str | None = None) -> ModelVersion:
    """Register a run, or an export of one, as the next version of a named model; twin of ``%tune register``.

    ``load_run("support-bot@3")`` and ``load_run("support-bot@production")`` then find its run, and so does every place
    that takes a run's name.

    Args:
        run: A run or its name or id, or an export.
        name: Of the model: letters, digits, dots, dashes and underscores.
        stage: candidate, staging, production or archived. One version is at production; it is archived for the next.
        note: What people should know of it.

    Raises:
        TuneError: Nothing is trained yet, the export is out of tolerance, or there is no such stage.
    """
    return registering.register(run if isinstance(run, Export) else resolve(run), name, stage, note)


def push(
    run: Run | Export | str,
    to: str,
    repo: str,
    *,
    format: str | None = None,  # noqa: A002 - the word of the option
    private: bool = False,
    stage: str | None = None,
    uri: str | None = None,
) -> str:
    """Send an export with its model card to where others find it; twin of ``%tune push``.

    Args:
        run: An export; or a run, whose newest export within tolerance is sent.
        to: ``hub`` (Hugging Face; the token is that of `hf auth login` or HF_TOKEN) or ``mlflow``.
        repo: ``me/my-model`` on the hub; in MLflow the name of the registered model and of the experiment.
        format: Of a run: the newest export in this format.
        private: For you alone; hub only.
        stage: Alias of the new version; MLflow only.
        uri: Tracking server; MLflow only.

    Returns:
        Where it is.

    Raises:
        TuneError: There is no export, no network, no token, or it is refused.
    """
    target = run if isinstance(run, Export) else resolve(run)
    if isinstance(run, str) and "@" in run and format is None:
        target = registering.find(run).export or target
    where = pushing.push(target, to, repo, form=format, private=private, stage=stage, uri=uri)
    display.show(note_bundle(f"pushed to {to}: {where}"))
    return where


def list_models(name: str | None = None) -> ModelList:
    """List registered models with versions, stages and scores; twin of ``%tune models``.

    Args:
        name: Only this model, with where each version comes from.

    Raises:
        TuneError: There is no such model, with the nearest name.
    """
    return registering.list_models(name)


def set_stage(name: str, number: int | str, stage: str, *, note: str | None = None) -> ModelVersion:
    """Move a version of a model to a stage, and say what leaves production for it; twin of ``%tune stage``.

    Args:
        name: Of the model.
        number: Of the version, or the stage it is at now, or ``latest``.
        stage: candidate, staging, production or archived.
        note: Why.

    Raises:
        TuneError: There is no such model, version or stage.
    """
    found, before = registering.set_stage(name, number, stage, note)
    left = f" {before.reference} is archived." if before is not None else ""
    display.show(note_bundle(f"{found.reference} is at {found.stage} now.{left}"))
    return found


def serve(
    run: Run | str,
    *others: Run | str,
    host: str = "127.0.0.1",
    port: int = 0,
    token: bool = True,
    token_env: str | None = None,
    keep: bool = False,
    max_concurrent: int = 16,
    timeout: str = "10m",
    base: bool = True,
) -> Server:
    """Start a server of tuned models that speaks OpenAI's language over HTTP; twin of ``%tune serve``. Returns at once.

    It has ``/v1/models``, ``/v1/chat/completions``, ``/v1/completions``, ``/v1/classify`` and ``/health``. A request names
    a run as its model, or ``base``. The server ends with this process unless `keep` is set, or by ``server.stop()``.

    Args:
        run: A run with a checkpoint, or its name or id.
        *others: More. Adapters of one base share it; others are each loaded.
        host: To listen on. Others than this machine's own open the server to whoever reaches them, without encryption.
        port: 0 for a free one, see ``server.url``.
        token: Demand ``Authorization: Bearer TOKEN``; False only where no other machine can reach it.
        token_env: The environment's variable that holds the token; without it one is made, see ``server.token``.
        keep: Go on after this process.
        max_concurrent: Texts that are written at the same time; four times as many requests may be there, then comes 429.
        timeout: Longest that an answer may take, waiting included.
        base: Serve the base too, where all have one and write texts; after full fine-tuning that takes memory for two models.

    Raises:
        TuneError: A run has no checkpoint, or the server would be open to others without a token.

    Example:
        >>> server = tune_magic.serve("support_bot")  # doctest: +SKIP
        >>> client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token)  # doctest: +SKIP
    """
    try:
        timeout_s = seconds_of(timeout)
    except ValueError as error:
        raise TuneError(f"`timeout` {error}") from None
    runs = [resolve(one) for one in (run, *others)]
    return servers.start(
        runs, host=host, port=port, token=token, token_env=token_env, keep=keep, max_concurrent=max_concurrent,
        timeout_s=timeout_s, base=base,
    )  # fmt: skip
