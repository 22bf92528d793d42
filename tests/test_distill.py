"""Distillation: the formulas by full logits, the same bits after a stop, teachers of every kind, and that students learn."""

import http.server
import json
import threading
from dataclasses import replace

import pytest
import torch
from conftest import make_model, make_tokenizer, plainly
from test_classify import labelled, make_encoder
from test_engine import CASES, engine_of, load
from test_training import SHORT, assert_same, losses, stop_and_resume
from torch.nn import functional

from tune_magic.errors import RecipeError, RunFailed
from tune_magic.methods.full import Full, FullOptions
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.objectives.distill import Distill, DistillClasses, DistillClassesOptions, DistillOptions
from tune_magic.objectives.divergence import divergence
from tune_magic.recipe import build_recipe
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.training.beside import AddedOff, Loaded
from tune_magic.training.dataset import Rows
from tune_magic.training.prepare import prepare
from tune_magic.training.rows import RowStates

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]


@pytest.fixture(scope="session")
def big(tmp_path_factory):
    """Another model with the same tokens."""
    return make_model(tmp_path_factory.mktemp("models") / "big", seed=7, hidden_size=48, num_hidden_layers=3)


def distill(teacher, **options):
    return {"name": "distill", "teacher": str(teacher), **options}


# --- the formulas ----------------------------------------------------------------------------------------------------


def by_hand(student, teacher, kind, temperature, beta):
    """The same by probabilities, in float64."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    middle = beta * p + (1 - beta) * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": beta * kl(p, middle) + (1 - beta) * kl(q, middle),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_divergence_is_its_formula(kind, temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(5, 40), 3 * torch.randn(5, 40)
    ours = divergence(student, teacher, kind, temperature=temperature, beta=0.3)
    torch.testing.assert_close(ours.double(), by_hand(student, teacher, kind, temperature, 0.3), rtol=1e-5, atol=1e-6)
    assert (ours > 0).all()
    torch.testing.assert_close(divergence(student, student, kind), torch.zeros(5), atol=1e-6, rtol=0)


def test_jensen_shannon_is_even_handed_in_the_middle_and_a_kl_at_its_ends():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 30).double().float(), torch.randn(4, 30)
    half = divergence(student, teacher, "jensen_shannon", beta=0.5)
    torch.testing.assert_close(half, divergence(teacher, student, "jensen_shannon", beta=0.5))
    assert (half <= torch.log(torch.tensor(2.0))).all()
    little = 1e-3
    low = divergence(student, teacher, "jensen_shannon", beta=little) / little
    high = divergence(student, teacher, "jensen_shannon", beta=1 - little) / little
    torch.testing.assert_close(low, divergence(student, teacher, "forward_kl"), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(high, divergence(student, teacher, "reverse_kl"), rtol=1e-2, atol=1e-3)


def test_the_gradient_keeps_its_size_whatever_the_temperature():
    """T^2 D has a gradient near (q - p) / N at high T, as Hinton says; without the factor it would vanish."""
    torch.manual_seed(0)
    teacher, norms = torch.randn(6, 50), []
    for temperature in (10.0, 50.0):
        student = torch.zeros(6, 50, requires_grad=True)
        (temperature**2 * divergence(student, teacher, "forward_kl", temperature=temperature).sum()).backward()
        norms.append(student.grad.norm())
    assert norms[0] == pytest.approx(float(norms[1]), rel=0.1)


def paths_of(examples):
    """Token ids of each way through each tree, with the weights of a token at its first occurrence."""
    from tune_magic.training.packing import _paths

    return [path for example in examples for path in _paths(example)]


def full_logits_loss(student, teacher, examples, options):
    """The whole loss by all logits of each row alone, nothing shared, nothing in chunks."""
    total = torch.zeros(())
    for path in paths_of(examples):
        ids, weights = torch.from_numpy(path.tokens).long()[None], torch.from_numpy(path.weights)[1:]
        ours = student(input_ids=ids).logits[0, :-1]
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[0, :-1]
        apart = by_hand(ours, theirs, options.divergence, options.temperature, options.beta).float()
        own = functional.cross_entropy(ours, ids[0, 1:], reduction="none")
        loss = options.alpha * options.temperature**2 * apart + (1 - options.alpha) * own
        total = total + (loss * weights).sum()
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "frozen head", "padded"])
@pytest.mark.sampled(3)
def test_loss_and_gradient_are_those_of_full_logits(kind, method, tiny, big, monkeypatch):
    monkeypatch.setattr("tune_magic.training.target_states._CHUNK_LOGITS", {"cpu": 259 * 3})
    monkeypatch.setattr("tune_magic.training.target_states._LEAST_CHUNK", 3)  # several chunks
    engine = engine_of(load(tiny), Full(FullOptions()) if method != "frozen head" else Lora(LoraOptions(r=4)))
    if method == "frozen head":  # an update that is not nothing
        for name, parameter in engine.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    engine.packed = method != "padded"
    teacher = load(big).eval()
    engine.beside = {"teacher": Loaded(engine_of(teacher))}
    options = DistillOptions(teacher="x", divergence=kind, temperature=2.0, alpha=0.7, beta=0.2)
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    for name in ("shared prefix", "branches", "equal prompts"):
        examples = CASES[name]
        loss = Distill(options).loss_sum(engine.states(examples))
        ours = torch.autograd.grad(loss, trained)
        with monkeypatch.context() as patch:
            reference = load(tiny) if method != "frozen head" else engine.inner
            if method != "frozen head":
                wanted = full_logits_loss(reference, teacher, examples, options)
                theirs = torch.autograd.grad(wanted, list(reference.parameters()))
            else:
                patch.setattr(engine.inner.config, "_attn_implementation", "sdpa")
                wanted = full_logits_loss(reference, teacher, examples, options)
                theirs = torch.autograd.grad(wanted, trained)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
        apart = sum(float((a - b).norm()) ** 2 for a, b in zip(ours, theirs, strict=True)) ** 0.5
        whole = sum(float(b.norm()) ** 2 for b in theirs) ** 0.5
        assert apart < 1e-4 * whole, name


@pytest.mark.parametrize("order", [True, False])
def test_targets_of_both_models_are_the_same_whatever_the_layout(order, tiny, big):
    """A packed student's targets come in the order of sharing, a padded teacher's in that of the rows."""
    student, teacher = engine_of(load(tiny)), engine_of(load(big))
    (teacher if order else student).packed = False
    examples = [*CASES["shared prefix"][::-1], *CASES["branches"], *CASES["nothing shared"]]
    student.beside = {"teacher": Loaded(teacher)}
    states = student.states(examples)
    theirs = states.beside["teacher"]
    for name in ("targets", "weights", "owners"):
        assert torch.equal(getattr(theirs, name), getattr(states, name))
    plain = plainly(teacher)(examples)
    own, at = torch.argsort(theirs.owners, stable=True), torch.argsort(plain.owners, stable=True)
    torch.testing.assert_close(theirs.log_probs()[own], plain.log_probs()[at], rtol=1e-4, atol=1e-4)


def test_the_base_is_the_teacher_with_what_was_added_switched_off(tiny):
    """Also where LoRA is put on the head itself, and where dropout is drawn in training; the flags stay as they are."""
    from peft import LoraConfig

    class OnHead(Lora):
        def config(self, model, task):
            return LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type=task, lora_dropout=0.3)

    for method in (Lora(LoraOptions(r=4, lora_dropout=0.3)), OnHead(LoraOptions(r=4, lora_dropout=0.3))):
        engine = engine_of(load(tiny), method)
        for name, parameter in engine.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        flags = [p.requires_grad for p in engine.model.parameters()]
        engine.beside = {"teacher": AddedOff(engine)}
        method.to_training(engine.model)
        examples = CASES["shared prefix"]
        torch.manual_seed(1)
        states = engine.states(examples)
        after = torch.random.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(engine.own_states(examples).states, states.states)  # no number was drawn for the base
        assert torch.equal(torch.random.get_rng_state(), after)
        assert engine.model.training
        assert [p.requires_grad for p in engine.model.parameters()] == flags
        base = engine_of(load(tiny).eval()).states(examples).ordered_as(states)

        def logits_of(states):
            return states.head(states.states)

        with torch.no_grad():
            plain = replace(states, states=states.states.detach())
            theirs = plain.compared("teacher", lambda logits, _, other: other.sum(-1))
            torch.testing.assert_close(theirs, logits_of(base).sum(-1), rtol=1e-4, atol=1e-4)
            assert (plain.compared("teacher", lambda a, _, b: (a - b).abs().sum(-1)) > 0.1).all()


def test_an_objective_that_lacks_its_teacher_does_not_train_quietly(tiny):
    engine = engine_of(load(tiny))
    with pytest.raises(KeyError, match="teacher"):
        Distill(DistillOptions(teacher="x")).loss_sum(engine.states(CASES["one row"]))


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"name": "lora", "r": 4, "lora_dropout": 0.1}, {"name": "full"}])
@pytest.mark.sampled(2)
def test_a_student_comes_nearer_and_resumes_exactly(method, train, make_run, monkeypatch, big):
    keys = {"objective": distill(big, alpha=1.0), "method": method, "max_steps": 15, **SHORT}
    whole = train(**keys)
    whole.raise_for_state()
    evaluations, plan = whole.summary().evaluations, whole.summary().plan
    assert evaluations[15]["divergence"] < 0.8 * evaluations[0]["divergence"]
    assert plan["teacher"]["parameters"] == load_tuned_size(big)
    assert "teacher" in plan["fingerprints"]
    run = make_run(**keys)
    stop_and_resume(run, monkeypatch, 25)
    assert_same(run, whole)
    assert "teacher: big" in whole.card()["text/plain"]


def load_tuned_size(folder):
    return sum(p.numel() for p in load(folder).parameters())


def test_held_out_loss_is_that_of_every_other_run(train, big):
    """At step 0 nothing was learned: a student, and a run that learns the rows alone, score the same."""
    short = {"max_steps": 1, "eval": {"steps": 1, "samples": 0}}
    plain, taught = train(**short), train(objective=distill(big), **short)
    assert taught.summary().evaluations[0]["loss"] == plain.summary().evaluations[0]["loss"]
    weighed = train(objective=distill(big, alpha=0.0), **short)
    assert losses(weighed)[0][1] == pytest.approx(losses(plain)[0][1], rel=1e-6)


def test_a_step_does_not_depend_on_microbatches_sharing_or_memory(slow, train, big, tiny, monkeypatch):
    for teacher in (big, tiny):
        objective = distill(teacher, alpha=0.5, divergence="jensen_shannon")
        keys = {"objective": objective, "learning_rate": 1e-3, "dtype": "float32"}
        reference, _ = losses(train(**keys))
        for changes in ({"microbatch_tokens": 80}, {"share_prefixes": False}, {"gradient_checkpointing": True}):
            found, _ = losses(train(**keys, **changes))
            for step, loss in reference.items():
                assert found[step] == pytest.approx(loss, abs=2e-5), changes
    real, failed = AddedOff.states, []

    def exhausted(beside, examples):
        if len(examples) > 1 and not failed and beside.engine.model.training:
            failed.append(1)
            raise torch.OutOfMemoryError("simulated")
        return real(beside, examples)

    monkeypatch.setattr(AddedOff, "states", exhausted)
    run = train(**keys, eval={"steps": 50, "samples": 0})
    assert failed
    assert [event["kind"] for event in run.events("warning")] == ["microbatch_changed"]
    for step, loss in reference.items():
        assert losses(run)[0][step] == pytest.approx(loss, abs=2e-5)


def test_the_base_as_its_own_teacher_takes_no_memory_and_divergence_starts_at_nothing(train, tiny, monkeypatch):
    loads = []
    real = Distill.load
    monkeypatch.setattr(Distill, "load", lambda self, *a: loads.append(1) or real(self, *a))
    run = train(objective=distill(tiny, alpha=0.5), max_steps=8, eval={"steps": 4, "samples": 0})
    run.raise_for_state()
    assert len(loads) == 1
    plan, evaluations = run.summary().plan, run.summary().evaluations
    assert plan["teacher"]["parameters"] == 0
    assert "(the base itself)" in run.card()["text/plain"]
    assert evaluations[0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert evaluations[8]["divergence"] > 1e-3
    held = train(objective=distill(tiny, alpha=0.95), max_steps=8, eval={"steps": 4, "samples": 0})
    assert held.summary().evaluations[8]["divergence"] < evaluations[8]["divergence"]
    full = train(objective=distill(tiny), method={"name": "full"}, max_steps=1)
    assert full.summary().plan["teacher"]["parameters"] > 0
    assert full.summary().evaluations[0]["divergence"] == pytest.approx(0, abs=1e-6)


def test_frozen_layers_kept_on_disk_serve_the_teacher_too(train, tiny, big):
    method = {"name": "lora", "r": 4, "target_modules": "model.layers.1.mlp.down_proj"}
    for teacher in (tiny, big):
        keys = {"objective": distill(teacher), "method": method, "max_steps": 12}
        kept, anew = train(**keys), train(**keys, cache_frozen_layers=False)
        assert kept.summary().plan["kept_layers"] == 1
        for step, loss in losses(anew)[0].items():
            assert losses(kept)[0][step] == pytest.approx(loss, rel=2e-3)


def test_a_run_teaches_and_must_not_change(train, make_run, monkeypatch, tiny):
    from test_training import StopAt

    from tune_magic.executors import local

    teacher = train(max_steps=12)
    for name in (f"run:{teacher.id}", str(teacher.path), teacher.id):
        assert train(objective=distill(name), max_steps=1).status == "finished"
    student = train(objective=distill(f"run:{teacher.id}", alpha=1.0), max_steps=12, method={"name": "lora", "r": 4})
    evaluations = student.summary().evaluations
    assert evaluations[12]["divergence"] < evaluations[0]["divergence"]
    assert evaluations[12]["loss"] < evaluations[0]["loss"]  # it never saw a row's own answer
    stopped = make_run(objective=distill(f"run:{teacher.id}"), **SHORT)
    with monkeypatch.context() as patch:
        StopAt(patch, 20)
        local.start(stopped.path, "inline")
    before = stopped.summary().plan["fingerprints"]["teacher"]
    manifest = teacher.best_checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text())  # the same content is the same teacher
    again = train(max_steps=6)
    from shutil import copytree, rmtree

    rmtree(teacher.path / "checkpoints")
    copytree(again.path / "checkpoints", teacher.path / "checkpoints")
    with pytest.raises(RunFailed, match=r"fingerprints\.teacher was"):
        stopped.resume("inline").raise_for_state()
    assert before == stopped.summary().plan["fingerprints"]["teacher"]


def test_a_changed_teacher_is_another_run(recipe, big, tmp_path):
    from shutil import copytree

    from tune_magic.launching import _identity

    teacher = copytree(big, tmp_path / "copy")
    built = build_recipe(recipe | {"objective": distill(teacher)})
    first = _identity(built, {}, tmp_path, tmp_path)
    make_model(teacher, seed=8)
    assert _identity(built, {}, tmp_path, tmp_path) != first


# --- refusals --------------------------------------------------------------------------------------------------------


def test_other_tokens_are_refused_with_a_way_out(train, tmp_path):
    other = make_model(tmp_path / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(RunFailed, match=r"has other tokens than the student.*") as caught:
        train(objective=distill(other)).raise_for_state()
    assert "level: sequence" in str(caught.value)


@pytest.mark.parametrize(("options", "says"), [
    ({}, "objective.teacher`: is needed"),
    ({"teacher": "http://127.0.0.1:1/v1"}, "say `level: sequence`"),
    ({"teacher": "http://127.0.0.1:1/v1", "level": "sequence"}, "needs `teacher_model`"),
    ({"teacher": "big", "teacher_model": "gpt"}, "`teacher` is none"),
    ({"teacher": "big", "alpha": 2}, "must be at most 1"),
    ({"teacher": "big", "divergence": "kl"}, "'forward_kl'"),
    ({"teacher": "big", "beta": 0}, "must be greater than 0"),
])  # fmt: skip
def test_what_is_wrong_is_told(options, says):
    with pytest.raises(RecipeError) as caught:
        build_recipe({"model": "m", "data": "rows.jsonl", "objective": {"name": "distill", **options}})
    assert says in str(caught.value)


def test_a_teacher_that_is_not_there_or_reads_too_little(train, tmp_path, tiny):
    with pytest.raises(RunFailed, match="There is no run `nobody`"):
        train(objective=distill("run:nobody")).raise_for_state()
    with pytest.raises(RunFailed, match="There is no model `nobody`"):
        train(objective=distill("nobody")).raise_for_state()
    short = make_model(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(RunFailed, match="reads 16 tokens at most"):
        train(objective=distill(short)).raise_for_state()
    with pytest.raises(RunFailed, match="has other tokens than the student"):
        train(objective=distill(tiny), vocabulary={"tokens": ["colour"]}).raise_for_state()


# --- classes ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_classes_is_its_formula():
    torch.manual_seed(0)
    ours, theirs, targets = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    objective = DistillClasses(
        DistillClassesOptions(teacher="run:x", alpha=0.3, temperature=2.0), classes=["a", "b", "c"]
    )
    states = RowStates(ours, targets, beside={"teacher": RowStates(theirs, targets)})
    wanted = 0.3 * 4 * by_hand(ours, theirs, "forward_kl", 2.0, 0.5).sum() + 0.7 * functional.cross_entropy(
        ours.double(), targets, reduction="sum"
    )
    assert float(objective.loss_sum(states)) == pytest.approx(float(wanted), rel=1e-5)


def test_a_classifier_teaches_another(train, make_run, tmp_path, monkeypatch):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    encoder = str(make_encoder(tmp_path / "bert", num_key_value_heads=4))
    keys = {
        "model": encoder, "data": {"train": str(path), "held_out": 0.25}, "method": {"name": "full"},
        "learning_rate": 3e-3, "max_steps": 40, "batch_size": 8, "eval": {"steps": 20, "samples": 0},
    }  # fmt: skip
    teacher = train(**keys)
    teacher.raise_for_state()
    objective = {"name": "distill_classes", "teacher": f"run:{teacher.id}", "alpha": 1.0}
    student = train(**keys | {"seed": 1, "objective": objective})
    student.raise_for_state()
    evaluations = student.summary().evaluations
    assert evaluations[40]["divergence"] < 0.5 * evaluations[0]["divergence"]
    assert evaluations[40]["loss"] < evaluations[0]["loss"] - 0.1
    run = make_run(**keys | {"seed": 1, "objective": objective})
    stop_and_resume(run, monkeypatch, 30)
    assert_same(run, student)
    assert len(student.predict(["good", "bad"])) == 2
    with pytest.raises(RunFailed, match="classifies texts; the student does not"):
        train(objective=distill(f"run:{teacher.id}")).raise_for_state()
    with pytest.raises(RunFailed, match="must be a run that classifies"):
        train(**keys | {"objective": {"name": "distill_classes", "teacher": encoder}}).raise_for_state()
    rows = [{"text": row["text"], "label": f"{row['label']}!"} for row in labelled()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunFailed, match="knows other classes"):
        train(**keys | {"objective": objective}).raise_for_state()


# --- whole answers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def address(monkeypatch):
    """An address that speaks OpenAI's protocol, answers every chat by its last message in capitals, and notes what came."""
    monkeypatch.setattr("tune_magic.models.address._LOOK_S", 60.0)
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), content))
            said = content["messages"][-1]["content"]
            answer = "" if said == "item 3 is black" else said.upper()
            body = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_teacher_behind_an_address_answers_once_and_its_key_stays_in_the_environment(
    address, make_run, monkeypatch, data_file
):
    url, asked = address
    monkeypatch.setenv("MY_KEY", "of-mine-alone-123")
    objective = distill(url, level="sequence", teacher_model="large", api_key_env="MY_KEY", max_new_tokens=9)
    keys = {"objective": objective, "data": {"train": str(data_file), "held_out": 0}, "max_steps": 6, "save_steps": 2}
    run = make_run(**keys)
    stop_and_resume(run, monkeypatch, 34)
    assert len(asked) == 24  # not again when it was resumed
    path, key, content = asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer of-mine-alone-123")
    assert (content["model"], content["max_tokens"], content["temperature"]) == ("large", 9, 0)
    assert [message["role"] for message in content["messages"]] == ["system", "user"]
    assert all(b"of-mine-alone" not in p.read_bytes() for p in run.path.rglob("*") if p.is_file())
    rows = [json.loads(line) for line in (run.path / "taught.jsonl").read_text().splitlines()]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": "ITEM 0 IS RED"}
    assert "kind" not in rows[3]
    plan = run.summary().plan
    assert (plan["taught"]["rows"], plan["taught"]["left_out"], plan["train_rows"]) == (23, 1, 23)
    assert "ITEM 0 IS RED" in "".join(text for text, _ in plan["lens"][0]["spans"])
    assert "answered by the teacher: 23 rows, 1 left out without an answer (ITEM 0 IS RED" in run.card()["text/plain"]
    whole = make_run(**keys)
    from tune_magic.executors import local

    local.start(whole.path, "inline")
    assert_same(run, whole)
    assert len(asked) == 24  # nor by a run that learns the same answers
    fresh = make_run(**keys)
    about = json.loads((fresh.path / "run.json").read_text())
    (fresh.path / "run.json").write_text(json.dumps(about | {"launch": {"fresh": True}}))
    local.start(fresh.path, "inline")
    assert_same(fresh, whole)
    assert len(asked) == 48
    assert not (fresh.path / "taught.part.jsonl").exists()


def test_a_search_for_the_rate_asks_for_the_rows_of_its_steps_alone(address, make_run, data_file, monkeypatch):
    from tune_magic.executors import local

    url, asked = address
    monkeypatch.setattr("tune_magic.training.rate_search._STEPS", 7)
    objective = distill(url, level="sequence", teacher_model="large", max_new_tokens=9)
    data = {"train": str(data_file), "held_out": 0}
    run = make_run("find_lr", objective=objective, data=data, batch_size=2)
    local.start(run.path, "inline")
    assert run.status == "finished", run.summary().outcome
    assert len(asked) == 14


def test_a_run_learns_the_answers_that_are_written_down(address, make_run, monkeypatch, write):
    """An answer with a password in it is kept without, and learned so from the first step on."""
    url, _ = address
    rows = [{"prompt": f"item {i} at db://me:mine{i}@x", "completion": "red"} for i in range(12)]
    path = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    objective = distill(url, level="sequence", teacher_model="large", max_new_tokens=9)
    run = make_run(objective=objective, data={"train": str(path), "held_out": 0}, max_steps=1)
    trained = []
    real = Rows._taught
    monkeypatch.setattr(Rows, "_taught", lambda rows, *given: trained.append(real(rows, *given)) or trained[-1])
    for _ in range(2):
        with EventLog(run.path / "events.jsonl", attempt=1) as log:
            prepare(build_recipe(run.info["recipe"]), run.path, log, Control(run.path, attempt=1))
    first, resumed = ([row.trunk.tokens.tolist() for row in table] for table in trained)
    assert trained[0][0].reference == "ITEM 0 AT DB://[hidden]@X"
    assert first == resumed


def test_a_student_learns_the_answers_of_a_run(train, make_run, tiny, data_file, monkeypatch):

    data = {"train": str(data_file), "held_out": str(data_file)}
    teacher = train(
        data=data, method={"name": "full"}, learning_rate=1e-2, max_steps=60, eval={"steps": 30, "samples": 0}
    )
    objective = distill(f"run:{teacher.id}", level="sequence", max_new_tokens=8)
    student = train(data=data, objective=objective, max_steps=12)
    student.raise_for_state()
    rows = [json.loads(line) for line in (student.path / "taught.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    said = {row["row"]: row["messages"][-1]["content"] for row in rows if "kind" in row}
    chats = [json.loads(line)["messages"][:2] for line in data_file.read_text().splitlines()]
    assert said == {
        number: answer.rstrip()
        for number, answer in enumerate(teacher.generate(chats, max_new_tokens=8), start=1)
        if answer.strip()
    }
    assert losses(student)[0][12] < losses(student)[0][1]
    assert "divergence" not in student.summary().evaluations[12]
    with pytest.raises(RunFailed, match="`augment` makes rows with the answers of the file"):
        train(objective=objective, data={"train": str(data_file), "augment": "noise"}).raise_for_state()


def test_plain_texts_have_no_prompt_to_answer(train, write, tiny):
    path = write("texts.txt", "one two three\n" * 30)
    with pytest.raises(RunFailed, match="has no prompt that a teacher could answer"):
        train(data=str(path), objective=distill(tiny, level="sequence")).raise_for_state()


def test_a_dry_run_asks_nobody(make_run, address):
    from tune_magic.executors import local

    url, asked = address
    run = make_run("plan", objective=distill(url, level="sequence", teacher_model="large"))
    local.start(run.path, "inline")
    assert run.status == "finished", run.summary().outcome
    assert not asked
    assert run.summary().plan["teacher"]["name"] == url


def test_a_distilled_model_is_evaluated_and_exported_as_any_other(train, big, monkeypatch):
    from tune_magic.executors import local

    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))
    run = train(objective=distill(big), max_steps=8)
    report = run.evaluate(limit=3, max_new_tokens=4)
    assert report.comparisons["loss"].tuned < report.comparisons["loss"].base
    assert run.export("merged", rows=3).ok is True
