"""The magics in an in-process shell: binding, errors, help, unloading, the Python twins."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError

import tune_magic
from tune_magic.errors import RecipeError, RunFailed, TuneError


@pytest.fixture
def shell(one_shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_shell.run_line_magic("load_ext", "tune_magic")
    yield one_shell
    one_shell.run_line_magic("unload_ext", "tune_magic")
    for name in ("bot", "df", "rows", "report", "rate"):
        one_shell.user_ns.pop(name, None)


@pytest.fixture
def body(tiny, data_file):
    return (
        f"model: {tiny}\ndata: {data_file.name}\nbatch_size: 4\nmax_steps: 4\neval: {{steps: 2, max_new_tokens: 4}}\n"
    )


def test_loading_costs_nothing_and_unloading_leaves_nothing():
    code = (
        "import sys, IPython.terminal.interactiveshell; shell = IPython.terminal.interactiveshell.TerminalInteractiveShell.instance();"
        "before = (set(shell.magics_manager.magics['line']), set(shell.magics_manager.magics['cell']),"
        " len(shell.Completer.custom_matchers));"
        "shell.run_line_magic('load_ext', 'tune_magic');"
        "heavy = [m for m in ('torch', 'transformers', 'pydantic', 'ipywidgets', 'pandas', 'numpy', 'matplotlib')"
        " if m in sys.modules];"
        "assert not heavy, heavy;"
        "assert 'finetune' in shell.magics_manager.magics['cell'];"
        "shell.run_line_magic('reload_ext', 'tune_magic');"
        "shell.run_line_magic('unload_ext', 'tune_magic');"
        "assert before == (set(shell.magics_manager.magics['line']), set(shell.magics_manager.magics['cell']),"
        " len(shell.Completer.custom_matchers))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # silent


def test_a_cell_binds_the_run_and_returns_none(shell, body, capsys):
    assert shell.run_cell_magic("finetune", "bot --executor inline", body) is None
    run = shell.user_ns["bot"]
    assert run.status == "finished"
    assert tune_magic.last is run
    shown = capsys.readouterr().out
    assert "bot: finished · 4 steps" in shown
    assert "held-out loss: base" in shown
    assert run.link["source"] == body
    assert run.info["recipe_text"] == body


def test_the_same_cell_again_shows_the_run_and_fresh_trains_anew(shell, body, capsys):
    shell.run_cell_magic("finetune", "bot --executor inline", body)
    first = shell.user_ns["bot"]
    shell.run_cell_magic("finetune", "bot --executor inline", body)
    assert shell.user_ns["bot"].id == first.id
    assert "were trained before" in capsys.readouterr().out
    shell.run_cell_magic("finetune", "bot --executor inline --fresh", body)
    assert shell.user_ns["bot"].id != first.id
    shell.run_cell_magic("finetune", "bot --executor inline learning_rate=1e-3", body)
    assert len(tune_magic.runs()) == 3


def test_a_stopped_cell_goes_on_when_it_is_run_again(shell, body, monkeypatch):
    from tune_magic.training.loop import Loop

    real = Loop._note_memory
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_note_memory", lambda loop: (real(loop), tune_magic.last.request("stop")))
        with pytest.raises(tune_magic.Stopped, match=r"stopped at step 1.*%tune resume bot"):
            shell.run_cell_magic("finetune", "bot --executor inline", body)
    run = shell.user_ns["bot"]  # bound although the cell failed
    assert run.status == "stopped"
    shell.run_cell_magic("finetune", "bot --executor inline", body)
    assert shell.user_ns["bot"].id == run.id
    assert run.status == "finished"
    assert run.summary().attempt == 2


def test_tune_resume_goes_on_and_shows_the_card(slow, shell, body, monkeypatch, capsys):
    from tune_magic.training.loop import Loop

    real = Loop._note_memory
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_note_memory", lambda loop: (real(loop), tune_magic.last.request("stop")))
        with pytest.raises(tune_magic.Stopped):
            shell.run_cell_magic("finetune", "bot --executor inline", body)
    run = shell.run_line_magic("tune", "resume bot")  # a worker this time
    assert run.status == "finished"
    assert run.summary().attempt == 2
    assert "bot: finished · 4 steps" in capsys.readouterr().out


def test_names_of_the_notebook_become_objects(shell, body, data_file, tiny):
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    shell.user_ns["df"] = pd.DataFrame(
        {
            "prompt": [r["messages"][1]["content"] for r in rows],
            "completion": [r["messages"][2]["content"] for r in rows],
        }
    )
    shell.user_ns["rate"] = 3e-4
    text = f"model: {tiny}\ndata: $df\nlearning_rate: $rate\nmax_steps: 2\nbatch_size: 4\n"
    shell.run_cell_magic("finetune", "bot --executor inline", text)
    run = shell.user_ns["bot"]
    assert run.summary().plan["recipe"]["learning_rate"] == 3e-4
    assert [p.name for p in (run.path / "inputs").iterdir()] == ["df.parquet"]
    assert run.summary().plan["lens"][0]["spans"][-1] == ["red<|im_end|>", True]
    twin = tune_magic.finetune(
        model=str(tiny), data=shell.user_ns["df"], learning_rate=3e-4, max_steps=2, batch_size=4, executor="inline"
    )
    assert twin.id == run.id  # the same rows, whatever the variable was called: recognised


def test_a_list_of_dicts_travels_as_data(shell, tiny, data_file):
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    run = tune_magic.finetune(
        model=str(tiny), data={"train": rows, "held_out": rows[:4]}, max_steps=1, executor="inline", name="listed"
    )
    assert sorted(p.name for p in (run.path / "inputs").iterdir()) == ["held_out.jsonl", "train.jsonl"]
    assert run.summary().plan["held_out_rows"] == 4


def test_a_missing_value_is_named_not_learned(shell, tiny):
    rows = [{"prompt": "a", "completion": "b"}] * 20 + [{"prompt": "a", "completion": float("nan")}]
    with pytest.raises(RunFailed, match=r"line 21.*`completion` must be text, got float"):
        tune_magic.finetune(model=str(tiny), data=rows, executor="inline")


def test_a_damaged_neighbour_blocks_nothing(shell, body, tmp_path):
    bad = tmp_path / "tune_runs" / "20260101-000000-aaaa"
    bad.mkdir(parents=True)
    (bad / "run.json").write_text("{")
    shell.run_cell_magic("finetune", "bot --executor inline", body)
    assert shell.user_ns["bot"].status == "finished"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bot --frsh", "--fresh"),
        ("bot --fresh --fresh", "twice"),
        ("two words", "What is `words`"),
        ("not-a-name", "variable"),
        ("bot --executor nowhere", "worker or inline"),
    ],
)
def test_bad_lines_are_usage_errors_of_ipython_itself(shell, body, line, said):
    with pytest.raises(UsageError, match=said) as caught:
        shell.run_cell_magic("finetune", line, body)
    assert type(caught.value) is UsageError  # a subclass would print a whole traceback


def test_every_fault_of_a_recipe_is_told_with_its_line(shell):
    with pytest.raises(RecipeError) as caught:
        shell.run_cell_magic("finetune", "bot", "model: tiny\nlr: -1\ndta: x\nmethod: {r: $missing}\n")
    lines = caught.value._render_traceback_()
    assert "missing" in lines[0]
    with pytest.raises(RecipeError) as caught:
        shell.run_cell_magic("finetune", "bot", "model: tiny\nlr: -1\ndta: x\n")
    told = "\n".join(caught.value._render_traceback_())
    for part in ("line 3, `learning_rate`", "line 4, `dta`", "Did you mean `data`?", "`data`: is needed"):
        assert part in told


def test_a_missing_model_says_where_it_looked(shell, body, data_file):
    with pytest.raises(
        TuneError, match=r"no model `smolm2-135m`.*no folder.*offline.*Did you mean `smollm2-135m-instruct`"
    ):
        shell.run_cell_magic("finetune", "bot", f"model: smolm2-135m\ndata: {data_file.name}\n")


def test_a_missing_file_is_told_before_anything_starts(shell, tiny, tmp_path):
    with pytest.raises(TuneError, match=r"no file nothing\.jsonl"):
        shell.run_cell_magic("finetune", "bot", f"model: {tiny}\ndata: nothing.jsonl\n")
    assert not list((tmp_path / "tune_runs").glob("*"))


def test_a_failed_run_is_bound_and_names_its_log(shell, body, data_file):
    data_file.write_text('{"messages": []}\n')
    with pytest.raises(RunFailed, match="1 bad row") as caught:
        shell.run_cell_magic("finetune", "bot --executor inline", body)
    assert shell.user_ns["bot"] is caught.value.run
    assert any(line.startswith("log: ") for line in caught.value._render_traceback_())


def test_help_is_plain_text(shell, capsys):
    shell.run_cell_magic("finetune", "-h", "model: x")
    shell.run_line_magic("tune", "watch --help")
    shell.run_line_magic("tune", "")
    shown = capsys.readouterr().out
    assert "--dry-run" in shown
    assert "%tune watch [RUN]" in shown
    assert "\x1b" not in shown
    assert "--dry-run" in shell.magics_manager.magics["cell"]["finetune"].__doc__  # what `?` shows


def test_show_code_prints_a_twin_that_trains_the_same(shell, body, capsys):
    shell.run_cell_magic("finetune", "bot --show-code", body)
    source = capsys.readouterr().out
    assert "bot" not in shell.user_ns
    shell.run_cell_magic("finetune", "bot --executor inline", body)
    exec(source.replace("finetune(", "finetune(executor='inline', fresh=True,"), space := {})
    assert space["bot"].history["loss"].tolist() == shell.user_ns["bot"].history["loss"].tolist()
    assert space["bot"].info["identity"] == shell.user_ns["bot"].info["identity"]


def test_a_dry_run_shows_the_plan_and_leaves_nothing(shell, body, capsys, tmp_path):
    shell.run_cell_magic("finetune", "bot --dry-run --executor inline", body)
    shown = capsys.readouterr().out
    for part in ("nothing was trained", "predicted peak memory", "predicted time", "% trained"):
        assert part in shown
    assert "bot" not in shell.user_ns
    assert not (tmp_path / "tune_runs").exists()


def test_a_search_for_a_rate_shows_a_line_to_paste_and_leaves_nothing(shell, body, capsys, tmp_path):
    shell.run_cell_magic("finetune", "bot --find-lr --executor inline", body)
    shown = capsys.readouterr().out
    assert re.search(r"^  learning_rate: \d\.\de-?\d+$", shown, re.MULTILINE)
    assert "bot" not in shell.user_ns
    assert not (tmp_path / "tune_runs").exists()


def test_braces_and_dollars_of_templates_are_left_alone(shell, tiny, tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"q": "one {x}", "a": "two"}\n' * 20)
    shell.user_ns["q"] = "wrong"
    text = f'model: {tiny}\ndata: {{train: qa.jsonl, template: {{prompt: "Q: {{q}}", completion: "{{a}}"}}}}\nmax_steps: 1\n'
    shell.run_cell_magic("finetune", "bot --executor inline", text)
    spans = shell.user_ns["bot"].summary().plan["lens"][0]["spans"]
    assert "Q: one {x}" in spans[0][0]
    assert spans[-1] == ["two<|im_end|>", True]


def test_runs_show_stop_and_near_names(shell, body, capsys):
    shell.run_cell_magic("finetune", "bot --executor inline", body)
    shell.run_line_magic("tune", "runs")
    shell.run_line_magic("tune", "show bot")
    shell.run_line_magic("tune", "stop bot")
    shown = capsys.readouterr().out
    assert "finished  4 / 4" in shown
    assert "bot is finished already" in shown
    with pytest.raises(TuneError, match="Did you mean `bot`"):
        shell.run_line_magic("tune", "show bott")
    with pytest.raises(UsageError, match="Did you mean watch"):
        shell.run_line_magic("tune", "wach bot")


def test_completion_through_ipython(shell, body):
    for text, wanted in (("%%finetune bot --dr", "--dry-run"), ("%%finetune bot\nlearning_r", "learning_rate: ")):
        with provisionalcompleter():
            assert wanted in [found.text for found in shell.Completer.completions(text, len(text))]


def test_a_recipe_file_and_its_run(shell, body, tmp_path):
    (tmp_path / "small.yaml").write_text(body)
    run = shell.run_line_magic("finetune", "small.yaml --executor inline max_steps=2")
    assert run.status == "finished"
    assert run.summary().step == 2
