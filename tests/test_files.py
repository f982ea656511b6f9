"""Files are whole or absent."""

import ast
from pathlib import Path

import pytest

from deepasmr_jax import audio, checkpoint, config, files, metrics, pool

ROOT = Path(__file__).parent.parent


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.wav"
    with files.atomic_path(path) as part:
        part.write_text("half")
        assert not path.exists() and part.parent == path.parent
        assert part.name.startswith(".") and part.name.endswith(".a.wav")
        with files.atomic_path(path) as other:  # a second writer at the same time has a file of its own
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="stopped"), files.atomic_path(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise RuntimeError("stopped")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def stop_before_the_name(monkeypatch):
    """A kill at the worst moment: the data are written, the name is not."""

    def stopped(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", stopped)


WRITERS = {
    "config.json": lambda path, i: config.write_json(path, {"number": i}),
    "metrics.jsonl": lambda path, i: metrics.Writer(path.parent, i),
    "pool.safetensors": lambda path, i: pool.Pool((), "mini", f"model {i}").save(path),
    "clip.wav": lambda path, i: audio.save(path, [0.1 * i, 0.2], 16000),
    "lm.safetensors": lambda path, i: checkpoint.write_arrays(path, {}, {"number": str(i)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_is_stopped_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / name
    if name == "metrics.jsonl":
        for step in (1, 2):
            metrics.Writer(tmp_path, step).write(step, {"train/loss": 1.0})
    else:
        WRITERS[name](path, 2)
    before = path.read_bytes()
    stop_before_the_name(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](path, 1)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    WRITERS[name](path, 1)
    assert path.read_bytes() != before


def test_only_one_file_of_the_package_renames_files():
    """Folders may be renamed where they are built (conversion, a corpus); a file has one way to its name.

    Files of a store that is no disk have Beam's way to theirs.
    """
    allowed = {"files.py", "convert.py", "synthetic.py", "asmr_db_beam.py"}
    for folder in ("deepasmr_jax", "data", "launch"):
        for path in (ROOT / folder).glob("*.py"):
            calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            names = {ast.unparse(f) for f in calls if isinstance(f, ast.Attribute)}
            renames = {n for n in names if n == "os.replace" or n.endswith(".rename")}
            assert not renames or path.name in allowed, f"{path.name} calls {renames}; use files.atomic_path"
