"""The rules of the house: layers, purposes, one of each, packaging, generated tables."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tune_magic"
# Lower layers first; a module imports its own layer and those before it.
LAYERS = [
    {"errors", "files", "commands", "secrets", "collector"}, {"plugins"}, {"storage"}, {"diagnosis", "cell_code"}, {"recipe"}, {"data"}, {"models"}, {"augmenters"}, {"methods"}, {"objectives"},
    {"training"}, {"evaluation"}, {"exporters"}, {"serving"}, {"handover"}, {"worker"}, {"executors"}, {"view"}, {"display", "handles"}, {"checkup", "comparing", "holding", "follow", "tables", "inspecting", "explaining", "trying", "launching", "chatting", "servers", "registering", "pushing", "rating", "ballot", "stacking", "decorators", "exported"},
    {"api", "deploying"}, {"testing"}, {"magics", "widgets"}, {"cli"},
]  # fmt: skip
CORE = set().union(*LAYERS[: LAYERS.index({"view"})])


def modules():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "widgets").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, parts[1] if parts[0] == "tune_magic" and len(parts) > 1 else parts[0]


def imports(path, *, top_level):
    """Yield what a file imports; type-checking blocks and, if asked, function bodies are left out."""
    tree = ast.parse(path.read_text())
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    for node in (n for statement in body for n in (ast.walk(statement) if not top_level else [statement])):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_layers_import_downwards_only():
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for path, own in modules():
        if own == "__init__":
            continue
        for name in imports(path, top_level=True):
            parts = name.split(".")
            if parts[0] == "tune_magic" and len(parts) > 1 and parts[1] in height and height[parts[1]] > height[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_every_module_has_a_layer():
    known = set().union(*LAYERS) | {"__init__"}
    assert {own for _, own in modules()} <= known


def test_the_core_knows_neither_notebook_nor_view():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, own in modules()
        if own in CORE
        for name in imports(path, top_level=False)
        if name.split(".")[0] in ("IPython", "ipywidgets", "ipykernel") or name.startswith("tune_magic.view")
    ]
    assert wrong == []


def test_nothing_imports_widgets_bare():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "widgets").glob("*.py")]:
        assert "widgets" not in [name.split(".")[0] for name in imports(path, top_level=False)], path


def test_every_file_has_its_purpose_in_the_architecture():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    listed = dict(re.findall(r"^\| `((?:tune_magic|widgets)/\S+\.py)` \| (.+?) \|$", text, re.MULTILINE))
    there = {str(p.relative_to(ROOT)) for p, _ in modules() if p.name != "__init__.py"} | {"tune_magic/__init__.py"}
    assert set(listed) == there
    assert {name: words for name, words in listed.items() if len(words.split()) > 7} == {}


def test_every_fault_of_the_matrix_has_its_tests():
    table = (ROOT / "docs" / "RELIABILITY.md").read_text()
    said = {
        int(n): set(re.findall(r"`(test_\w+\.py)`", rest))
        for n, rest in re.findall(r"^\| F(\d+) (.*)$", table, re.MULTILINE)
    }
    there = {number: set() for number in range(1, 35)}
    for path in (ROOT / "tests").glob("test_*.py"):
        for names in re.findall(r"^def test_((?:f\d+_)+)", path.read_text(), re.MULTILINE):
            for number in re.findall(r"\d+", names):
                there[int(number)].add(path.name)
    assert said == there


def test_every_module_and_public_function_says_what_it_is():
    for path, _ in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_packages_are_all_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        "tune_magic",
        *(f"tune_magic.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py")),
        *(f"tune_magic.{p.parent.parent.name}.{p.parent.name}" for p in PACKAGE.glob("*/*/__init__.py")),
        "tune_magic.widgets",
    }
    assert listed == folders


def test_no_subpackage_hides_a_public_name():
    import tune_magic

    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} | {p.stem for p in PACKAGE.glob("*.py")}
    assert not folders & set(tune_magic.__all__)


def test_every_built_in_comes_through_the_registry():
    from tune_magic import plugins

    rows = plugins.listing()
    assert [row for row in rows if row.problem] == []
    assert {(row.kind, row.name) for row in rows} >= {
        ("method", "lora"), ("method", "full"), ("objective", "sft"), ("exporter", "merged"), ("metric", "rouge_l"),
    }  # fmt: skip


def test_a_name_clash_names_both_and_breaks_nothing():
    from tune_magic import plugins
    from tune_magic.errors import TuneError

    with pytest.raises(TuneError, match=r"exists twice: tune_magic\.methods\.lora:Lora and .*Mine"):

        @plugins.register("method", "lora")
        class Mine:
            pass

    assert plugins.get("method", "lora").__name__ == "Lora"


def test_only_one_module_makes_html():
    wrong = []
    for path, _ in modules():
        if path.name == "html.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            texts = (
                [v.value for v in node.values if isinstance(v, ast.Constant)] if isinstance(node, ast.JoinedStr) else []
            )
            wrong += [
                f"{path.name}:{node.lineno}" for text in texts if re.search(r"</?(div|span|b|p|td|img|table)\b", text)
            ]
    assert wrong == []


def test_no_pickle_no_pyplot_no_unsafe_loading():
    for path, _ in modules():
        code = ast.unparse(ast.parse(path.read_text()))
        for word in (
            "import pickle",
            "matplotlib.pyplot",
            "import pyplot",
            "torch.load(",
            "torch.save(",
            "yaml.load(",
            "trust_remote_code=True",
        ):
            assert word not in code, f"{path}: {word}"


def test_the_tables_of_the_readme_are_current():
    done = subprocess.run([sys.executable, "docs/tables.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "python docs/tables.py"


def test_constraints_pin_torch_without_a_local_tag():
    pinned = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in pinned
    assert "+" not in pinned
    assert "torch==2.13.0" in (ROOT / "Makefile").read_text()


def test_the_repo_names_no_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        if not name.endswith((".png", ".ipynb")):
            text = (ROOT / name).read_text(errors="replace")
            assert not re.search(r"/(home|Users|root|work)/\w", text.replace("/(home|Users|root|work)/", "")), name


def test_the_tickets_share_no_product_and_no_phrasing():
    sys.path.insert(0, str(ROOT / "example_notebooks"))
    try:
        from make_tickets import PRODUCTS, REQUESTS, URGENCIES, make
    finally:
        sys.path.pop(0)
    for train, held_out in [*REQUESTS.values(), *URGENCIES.values(), PRODUCTS]:
        assert not {text for text in train if text} & {text for text in held_out if text}
    train, held_out = make("train", 720, 0), make("held_out", 60, 0)
    assert make("train", 720, 0) == train
    messages = {row["messages"][1]["content"] for row in train}
    assert not messages & {row["messages"][1]["content"] for row in held_out}
