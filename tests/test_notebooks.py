"""The notebooks: valid, without outputs or logic of their own, and every cell runs, each notebook in a fresh process.

Jupyter is not needed: run as a script, this file executes the code cells of one notebook and shows what a
notebook would show. DEEPASMR_TEST_MODEL names a model folder to be used in place of the built-in one.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODEL = Path(os.environ.get("DEEPASMR_TEST_MODEL") or ROOT / "deepasmr_jax" / "mini").absolute()
needs_model = pytest.mark.skipif(
    bool(os.environ.get("DEEPASMR_TEST_MODEL")) and not (MODEL / "config.json").is_file(),
    reason=f"DEEPASMR_TEST_MODEL is {MODEL}, which has no config.json",
)


def code_cells(path: Path) -> list[str]:
    """Source of each code cell."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cells(path: Path) -> None:
    """Executes the cells in order and prints, at last, how many players were shown."""
    players = 0

    def display(*values, raw: bool = False) -> None:
        nonlocal players
        for value in values:
            page = value["text/html"] if raw else value._repr_html_() if hasattr(value, "_repr_html_") else ""
            players += page.count("<audio")
            print(repr(value)[:300] if not page else f"[{len(page)} characters of HTML]")

    names = {"__name__": "__main__", "display": display}
    for number, source in enumerate(code_cells(path), 1):
        tree = ast.parse(source, f"{path.name} cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name} cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"{path.name} cell {number}", "eval"), names)
            if value is not None:
                display(value)
    print(f"players: {players}")


def run_notebook(name: str, folder: Path, **variables: str) -> str:
    """Output of a notebook run in a fresh process in an empty folder, which must be empty at the end."""
    cwd, temporary = folder / "cwd", folder / "tmp"
    cwd.mkdir()
    temporary.mkdir()
    unset = ("DEEPASMR_DATA", "DEEPASMR_FEATURES")
    env = {k: v for k, v in os.environ.items() if k not in unset} | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "DEEPASMR_CACHE": "off",
        "DEEPASMR_TEST_MODEL": str(MODEL),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTHONIOENCODING": "utf-8",
        "TMPDIR": str(temporary),
    }
    command = [sys.executable, __file__, str(ROOT / "notebooks" / f"{name}.ipynb")]
    done = subprocess.run(
        command, cwd=cwd, env=env | variables, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert not list(cwd.iterdir()), f"{name} leaves files where it runs"
    return done.stdout


def test_the_built_in_model_is_there():
    assert (ROOT / "deepasmr_jax" / "mini" / "config.json").is_file()


def test_the_three_notebooks_are_there():
    assert [p.stem for p in NOTEBOOKS] == ["finetune", "inspect_data", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_format_4_for_python_3_with_unique_cell_ids(path):
    book = json.loads(path.read_text("utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert {cell["cell_type"] for cell in book["cells"]} == {"code", "markdown"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_without_outputs(path):
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert "outputs" not in cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_imports_the_package_and_defines_neither_functions_nor_classes(path):
    nodes = [node for source in code_cells(path) for node in ast.walk(ast.parse(source))]
    made = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not any(isinstance(node, made) for node in nodes)
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    assert "deepasmr_jax" in modules


@needs_model
def test_quickstart_runs_and_shows_players(tmp_path):
    out = run_notebook("quickstart", tmp_path)
    assert "2 made, 1 failed" in out
    assert "players: 5" in out or "pypinyin is not installed" in out


def test_finetune_runs_resumes_and_exports(tmp_path):
    out = run_notebook("finetune", tmp_path)
    assert out.count("start: random weights") == 1
    assert "start: weights of" in out and "start: checkpoint of step 4" in out
    assert "changed since the run began: steps: 4 -> 8" in out and "stopped at step 8" in out


@needs_model
def test_inspect_data_shows_the_bundled_clips(tmp_path):
    assert "players: 4" in run_notebook("inspect_data", tmp_path)


def test_inspect_data_shows_the_labels_of_a_corpus(tmp_path):
    import fixture_data

    folder = fixture_data.write(tmp_path / "corpus", has_features=False)
    out = run_notebook("inspect_data", tmp_path, DEEPASMR_DATA=folder)
    assert "players: 4" in out and "valid en asmr: 6 records, 3 speakers" in out
    assert "   pitch " in out


if __name__ == "__main__":
    from deepasmr_jax import request

    request.BUILT_IN = Path(os.environ["DEEPASMR_TEST_MODEL"])
    run_cells(Path(sys.argv[1]))
