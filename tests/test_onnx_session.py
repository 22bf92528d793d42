"""Devices and sessions of ONNX exports: what computes, why, and which settings were fastest here."""

import json

import pytest
from test_exports import classified, inline, wide  # noqa: F401 - fixtures

from tune_magic.errors import RunFailed, TuneError
from tune_magic.exporters import onnx_session
from tune_magic.exporters.onnx_session import SESSION, Settings, choose


@pytest.mark.parametrize(
    ("device", "offered", "provider", "why"),
    [
        (None, ["CPUExecutionProvider"], "CPUExecutionProvider", "every onnxruntime has this one"),
        (
            None,
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
            "CPUExecutionProvider",
            "`--device cuda` is here too",
        ),
        ("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider", "`cuda` was asked for"),
        ("npu", ["OpenVINOExecutionProvider", "CPUExecutionProvider"], "OpenVINOExecutionProvider", "was asked for"),
    ],
)
def test_the_provider_is_chosen_and_explained(device, offered, provider, why):
    found, reason = choose(device, offered)
    assert found == provider
    assert why in reason


@pytest.mark.parametrize(
    ("device", "package"), [("cuda", "pip install onnxruntime-gpu"), ("npu", "onnxruntime-openvino")]
)
def test_a_device_without_its_provider_is_refused_with_the_package(device, package):
    with pytest.raises(TuneError, match=rf"no provider for the device `{device}` here: CPUExecutionProvider") as caught:
        choose(device, ["CPUExecutionProvider"])
    assert package in caught.value.hint


def test_settings_are_tried_and_the_fastest_lies_beside_the_graph(classified, inline, monkeypatch):  # noqa: F811
    monkeypatch.setattr(onnx_session, "_LONGEST_S", 1000.0)
    exported = classified().export("onnx", device="cpu", rows=4)
    session = exported.receipt["session"]
    assert {(one["threads"], one["level"]) for one in session["tried"]} >= {(1, "all"), (1, "basic")}
    assert session["left_out"] == 0
    fastest = min(session["tried"], key=lambda one: one["seconds"])
    assert session["best"] == {"threads": fastest["threads"], "level": fastest["level"]}
    kept = json.loads((exported.path / SESSION).read_text())
    assert Settings.of(exported.path) == Settings("CPUExecutionProvider", kept["threads"], kept["level"])
    monkeypatch.chdir(exported.path)
    known = {"onnxruntime": __import__("onnxruntime")}
    exec(kept["how"], known)  # how to use it
    assert known["session"].get_providers() == ["CPUExecutionProvider"]
    assert known["session"].get_session_options().intra_op_num_threads == fastest["threads"]
    text = exported.card()["text/plain"]
    for part in ("runs on: CPUExecutionProvider: `cpu` was asked for (offered: ", "fastest of: ", "graph level"):
        assert part in text
    assert "ms</td>" in exported.card()["text/html"]


def test_out_of_time_some_settings_are_left_out_and_that_is_said(slow, classified, inline, monkeypatch):  # noqa: F811
    monkeypatch.setattr(onnx_session, "_LONGEST_S", 0.0)
    exported = classified().export("onnx", rows=2)
    session = exported.receipt["session"]
    assert len(session["tried"]) == 1
    assert session["left_out"] >= 1
    assert f"{session['left_out']} left out for time" in exported.card()["text/plain"]


def test_a_device_that_a_format_or_this_machine_has_not(train, inline, tmp_path):  # noqa: F811
    run = train(max_steps=1)
    with pytest.raises(RunFailed, match=r"`--to merged` is not written for the device 'cuda'.*says where"):
        run.export("merged", device="cuda")
    with pytest.raises(RunFailed, match=r"`--to genai` is not written for the device 'npu'.*It knows: cpu, cuda"):
        run.export("genai", device="npu")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(RunFailed, match=r"no provider for the device `cuda` here.*onnxruntime-gpu"):
            run.export("onnx", device="cuda")
        with pytest.raises(RunFailed, match=r"onnxruntime-genai has no CUDA here"):
            run.export("genai", device="cuda")
