"""The registry: names for models, versions that are never given twice, one version at production, runs found by them."""

import json
import multiprocessing
import re
import types

import pytest

import tune_magic
from tune_magic import cli, commands
from tune_magic.commands import BadUsage
from tune_magic.errors import TuneError
from tune_magic.handles import Run
from tune_magic.magics.complete import complete
from tune_magic.magics.verbs import do_verb
from tune_magic.storage import places, versions
from tune_magic.storage.events import EventLog


@pytest.fixture
def known(train, tmp_path, monkeypatch):
    """Return trained runs, found as in a notebook of their folder."""
    monkeypatch.chdir(tmp_path)

    def make(name="tiny_run", **changes):
        return train(max_steps=2, **changes).rename(name)

    return make


def do(line):
    verb, _, rest = line.partition(" ")
    return do_verb(verb, commands.parse(commands.COMMANDS[f"tune {verb}"], rest), tune_magic.load_run)


def test_versions_count_up_and_are_found_wherever_a_run_is_named(known, capsys):
    first, second = known("one"), known("two", seed=1)
    do("register one --as support-bot --note 'the first'")
    assert "support-bot@1 is the run one" in capsys.readouterr().out
    assert tune_magic.register(second, "support-bot", stage="staging").reference == "support-bot@2"
    for reference, run in (("support-bot@1", first), ("support-bot@2", second), ("support-bot@staging", second), ("support-bot@candidate", first),
                           ("support-bot@latest", second), ("support-bot", second)):  # fmt: skip
        assert tune_magic.load_run(reference).id == run.id, reference
        assert Run(places.find(reference)).id == run.id
    assert [(v.reference, v.stage, v.note) for v in tune_magic.list_models().versions] == [
        ("support-bot@2", "staging", None), ("support-bot@1", "candidate", "the first"),
    ]  # fmt: skip


def test_the_same_run_keeps_its_version(known):
    run = known()
    assert tune_magic.register(run, "bot").number == 1
    again = tune_magic.register(run, "bot", stage="production", note="good")
    assert (again.number, again.stage, again.note) == (1, "production", "good")
    assert len(tune_magic.list_models("bot")) == 1


def test_one_version_is_at_production_and_the_one_before_is_archived(known, capsys):
    for seed in range(3):
        tune_magic.register(known(f"r{seed}", seed=seed), "bot", stage="production")
    assert [v.stage for v in tune_magic.list_models("bot").versions] == ["production", "archived", "archived"]
    capsys.readouterr()
    do("stage bot 1 production --note 'back'")
    assert capsys.readouterr().out.strip() == "bot@1 is at production now. bot@3 is archived."
    assert tune_magic.load_run("bot@production").name == "r0"
    assert tune_magic.load_run("bot").name == "r0"
    assert [stage for stage, _ in tune_magic.list_models("bot")[2].version.history] == [
        "candidate",
        "production",
        "archived",
        "production",
    ]
    assert tune_magic.list_models("bot")[2].note == "back"


def test_a_version_remembers_scores_and_where_it_came_from(known):
    run = known()
    version = tune_magic.register(run, "bot")
    assert version.metrics["held_out_loss"] == pytest.approx(run.metrics["held_out_loss"])
    story = "\n".join(version.lineage)
    for part in (
        run.id,
        run.summary().plan["fingerprints"]["train"],
        run.summary().plan["fingerprints"]["model"],
        run.summary().plan["identity"],
    ):
        assert part in story
    card = tune_magic.list_models("bot").card()
    assert run.id in card["text/plain"]
    assert "held out loss" in card["text/plain"]
    assert "Base: `tiny`" in card["text/html"]
    assert "<script" not in card["text/html"]
    frame = tune_magic.list_models().frame()
    assert list(frame.loc[0, ["name", "number", "stage", "run"]]) == ["bot", 1, "candidate", run.id]


def test_an_export_can_be_a_version(known, monkeypatch):
    from tune_magic.executors import local

    start = local.start
    monkeypatch.setattr(local, "start", lambda path, *_: start(path, "inline"))
    run = known("exported")
    exported = run.export("merged", rows=2)
    do("register exported --as bot --to merged")
    version = tune_magic.list_models("bot")[0]
    assert version.export is not None
    assert version.export.path == exported.path
    assert tune_magic.load_run("bot@1").id == run.id
    assert f"Export as merged ({exported.id})" in version.lineage
    assert tune_magic.register(run, "bot").number == 2  # the run itself is another thing
    with pytest.raises(BadUsage, match="no export in the format onnx"):
        do("register exported --as bot --to onnx")


def test_a_registered_run_is_not_deleted_unsaid(known, monkeypatch):
    run = known("kept")
    tune_magic.register(run, "bot", stage="production")
    with pytest.raises(TuneError, match=r"kept is registered as bot@1 \(production\)"):
        run.delete()
    with pytest.raises(BadUsage, match=r"bot@1 \(production\).*--registered"):
        do("rm kept --yes")
    assert run.path.exists()
    do("rm kept --yes --registered")
    assert not run.path.exists()
    with pytest.raises(TuneError, match=r"bot@1 is the run .* not there any more"):
        tune_magic.load_run("bot@production")
    assert "(gone)" in tune_magic.list_models().card()["text/plain"]
    assert tune_magic.register(known("next", seed=5), "bot").number == 2  # a number is never given again


MISTAKES = [
    ("register r --as 'a b'", "cannot be a model's name"),
    ("register r --as ../up", "cannot be a model's name"),
    ("register r --as bot@2", "cannot be a model's name"),
    ("register r", "--as is missing"),
    ("register r --as bot --stage prod", "must be candidate or staging or production or archived, got 'prod'. Did you mean production?"),
    ("stage bot 1 prod", "There is no stage 'prod'"),
    ("stage bot 7 production", r"There is no `bot@7`. There are: bot@1 \(candidate\)"),
    ("stage bto 1 production", "There is no model `bto`. Did you mean bot?"),
    ("stage bot 1", "Usage: %tune stage NAME VERSION STAGE"),
    ("models bto", "There is no model `bto`. Did you mean bot?"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), MISTAKES)
def test_mistakes_are_told(make_run, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    run = make_run()
    run.rename("r")
    (run.path / "checkpoints" / "step-1").mkdir()
    (run.path / "checkpoints" / "step-1" / "manifest.json").write_text("{}")
    versions.add(run.path.parent, "bot", run=run.id)
    with pytest.raises((TuneError, BadUsage), match=said):
        do(line)
    assert len(versions.of("bot", [run.path.parent])) == 1


def test_nothing_untrained_is_registered(make_run):
    with pytest.raises(TuneError, match="no checkpoint yet"):
        tune_magic.register(make_run(), "bot")


def test_a_name_goes_on_in_the_folder_where_it_is_known(known, tmp_path):
    import shutil

    first = known("one")
    other = tmp_path / "elsewhere" / "tune_runs"
    other.mkdir(parents=True)
    shutil.copytree(first.path, other / first.id.replace(first.id[-2:], "zz"))
    moved = Run(next(other.iterdir()))
    tune_magic.register(first, "bot")
    assert tune_magic.register(moved, "bot").reference == "bot@2"
    assert tune_magic.load_run("bot@2").path == moved.path
    assert not (other / "models").exists()


def _register(root, number):
    return [versions.add(root, "bot", run=f"run-{number}-{i}").number for i in range(20)]


def test_two_processes_get_different_numbers(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_register, [(tmp_path, 0), (tmp_path, 1)])
    assert sorted(found[0] + found[1]) == list(range(1, 41))
    known = versions.of("bot", [tmp_path])
    assert len({version.run for version in known}) == 40


def _promote(root, number):
    version = next(one for one in versions.of("bot", [root]) if one.number == number)
    for _ in range(20):
        versions.change(version, stage="production")


def test_two_that_promote_at_once_leave_one_at_production(tmp_path):
    for number in range(2):
        versions.add(tmp_path, "bot", run=f"run-{number}")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_promote, [(tmp_path, 1), (tmp_path, 2)])
    assert sorted(version.stage for version in versions.of("bot", [tmp_path])) == ["archived", "production"]
    assert len(list((tmp_path / "models" / "bot" / "changes").iterdir())) == 40


def test_a_process_that_dies_on_the_way_costs_a_number_and_nothing_else(tmp_path):
    versions.add(tmp_path, "bot", run="a")
    (tmp_path / "models" / "bot" / "2").mkdir()
    (tmp_path / "models" / "bot" / "changes" / ".tmp-17-x").write_text("{")
    assert versions.add(tmp_path, "bot", run="b").number == 3
    assert [version.number for version in versions.of("bot", [tmp_path])] == [3, 1]
    assert versions.names([tmp_path]) == ["bot"]


def test_a_newer_format_says_so(tmp_path):
    versions.add(tmp_path, "bot", run="a")
    path = tmp_path / "models" / "bot" / "1" / "version.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9, "unknown": 1}))
    with pytest.raises(TuneError, match="newer tune_magic"):
        versions.of("bot", [tmp_path])


def test_tab_completes_models_versions_and_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "tune_runs"
    version = versions.add(root, "support-bot", run="a")
    versions.change(version, stage="production")

    shell = types.SimpleNamespace(user_ns={})

    for typed, found in (("%evaluate support", ["support-bot@1", "support-bot@production"]), ("%tune stage ", ["support-bot"]),
                         ("%tune stage support-bot ", ["1"]), ("%tune stage support-bot 1 p", ["production"]), ("%tune models s", ["support-bot"])):  # fmt: skip
        assert complete(shell, typed)[1] == found, typed


def test_the_command_line_knows_it_too(known, capsys):
    known("one")
    assert cli.main(["register", "one", "--as", "bot", "--stage", "production"]) == 0
    assert cli.main(["models"]) == 0
    assert re.search(r"bot@1\s+production", capsys.readouterr().out)
    assert cli.main(["models", "nobody"]) == 1


def test_a_run_that_may_still_change_has_no_version(train):
    run = train(max_steps=8)
    with EventLog(run.path / "events.jsonl", attempt=1) as log:
        log.append("state", state="stopped", reason="asked")
    with pytest.raises(TuneError, match=r"is stopped; a version is of a run that will not change"):
        tune_magic.register(run, "bot")
