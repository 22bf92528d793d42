"""Pushing: what is sent to the hub and to MLflow, and what is said where it cannot be."""

from types import SimpleNamespace

import httpx
import pytest

import tune_magic
from tune_magic import commands
from tune_magic.commands import BadUsage
from tune_magic.errors import TuneError
from tune_magic.executors import local
from tune_magic.magics.verbs import do_verb


@pytest.fixture
def exported(train, monkeypatch):
    """Return a run with an export."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda path, *_: start(path, "inline"))
    run = train(max_steps=4)
    run.export("adapter", rows=2)
    return run


class Hub:
    """Takes down what would be sent."""

    def __init__(self, monkeypatch, fails=None, is_public=False):
        import huggingface_hub

        self.is_public = is_public

        self.sent, self.fails = [], fails
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def create_repo(self, repo, **options):
        if self.fails:
            raise self.fails
        self.sent.append(("repo", repo, options))
        return f"https://hub/{repo}"

    def repo_info(self, repo):
        return SimpleNamespace(private=not self.is_public)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **_):
        assert _["delete_patterns"] == "*"
        self.sent.append(
            ("folder", repo_id, sorted(p.name for p in folder_path.iterdir() if p.name not in ignore_patterns))
        )

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, **_):
        self.sent.append(("file", repo_id, path_in_repo, path_or_fileobj.decode()))


def do(line, run):
    return do_verb("push", commands.parse(commands.COMMANDS["tune push"], line), lambda _: run)


def test_the_hub_is_sent_the_files_and_the_card(exported, monkeypatch, capsys, tmp_path):
    hub = Hub(monkeypatch)
    do("tiny_run --to hub --repo me/bot --private", exported)
    repo, folder, card = hub.sent
    assert repo == ("repo", "me/bot", {"private": True, "exist_ok": True})
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(folder[2])
    assert "README.md" not in folder[2]
    assert card[:3] == ("file", "me/bot", "README.md")
    assert 'PeftModel.from_pretrained(base, "me/bot")' in card[3]
    assert "THIS_FOLDER" not in card[3]
    assert str(tmp_path) not in card[3]
    assert "pushed to hub: https://hub/me/bot" in capsys.readouterr().out
    assert tune_magic.push(exported.exports[0], "hub", "me/bot") == "https://hub/me/bot"
    assert hub.sent[3][2] == {"private": None, "exist_ok": True}


def test_a_public_repository_does_not_become_private_by_asking(exported, monkeypatch):
    hub = Hub(monkeypatch, is_public=True)
    with pytest.raises(TuneError, match="is there already, and it is public"):
        do("tiny_run --to hub --repo me/bot --private", exported)
    assert [kind for kind, *_ in hub.sent] == ["repo"]


def refused(status):
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("POST", "https://hub")))


def test_what_goes_wrong_is_told(exported, monkeypatch):
    import huggingface_hub

    for fails, said in ((httpx.ConnectError("no route"), "cannot be reached"), (refused(403), "refuses to take me/bot.*HF_TOKEN"),
                        (refused(500), "refuses.*later"), (huggingface_hub.errors.HFValidationError("x"), "no name of a repository")):  # fmt: skip
        Hub(monkeypatch, fails)
        with pytest.raises(TuneError, match=said):
            do("tiny_run --to hub --repo me/bot", exported)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(TuneError, match=r"no token.*HF_TOKEN"):
        do("tiny_run --to hub --repo me/bot", exported)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TuneError, match="HF_HUB_OFFLINE is set"):
        do("tiny_run --to hub --repo me/bot", exported)


@pytest.mark.parametrize(("line", "error", "said"), [
    ("r --to hub", BadUsage, "--repo is missing"), ("r --repo me/bot", BadUsage, "--to is missing"), ("r --to hbu --repo x", BadUsage, "Did you mean hub"),
    ("r --to mlflow --repo bot --private", TuneError, "--private is for `--to hub`"), ("r --to hub --repo me/b --stage production", TuneError, "--stage is for"),
    ("r --to hub --repo me/bot", TuneError, r"has no export that could be pushed.*%export tiny_run --to adapter"),
    ("r --to hub --repo me/bot --format onnx", TuneError, r"no export in the format onnx.*--to onnx"),
])  # fmt: skip
def test_mistakes_are_told(make_run, line, error, said):
    with pytest.raises(error, match=said):
        do(line, make_run())


def test_mlflow_is_sent_recipe_curves_files_and_a_version(exported, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    exported.rename("bot_run")
    for number in (1, 2):
        assert tune_magic.push(exported, "mlflow", "bot", stage="production", uri=uri) == f"models:/bot/{number}"
    client = MlflowClient(uri, uri)
    version = client.get_model_version_by_alias("bot", "production")
    assert version.version == 2
    logged = client.get_run(version.run_id)
    assert logged.info.run_name == "bot_run"
    assert logged.data.params["method.r"] == "4"
    assert logged.data.tags["tune_magic.run"] == exported.id
    assert logged.data.metrics["held_out_loss"] == pytest.approx(exported.summary().evaluations[4]["loss"])
    curve = {metric.step: metric.value for metric in client.get_metric_history(version.run_id, "loss")}
    assert curve == pytest.approx({step: event["loss"] for step, event in exported.summary().steps.items()})
    assert {"model/adapter_model.safetensors", "model/README.md"} <= {
        one.path for one in client.list_artifacts(version.run_id, "model")
    }


def test_without_mlflow_the_extra_is_named(exported, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "mlflow" else find(name, *more)
    )
    with pytest.raises(TuneError, match=r"not installed.*tune-magic\[mlflow\]"):
        tune_magic.push(exported, "mlflow", "bot")
