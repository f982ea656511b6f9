"""The results table of launch/table.py: what it refuses, and when a row is judged anew."""

import importlib.util
import json
import types
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "launch" / "table.py"


@pytest.fixture(scope="module")
def table():
    module_spec = importlib.util.spec_from_file_location("table", PATH)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rows", "nonsense"], "'nonsense'; the rows are truth normal"),
        (["--languages", "en,fr"], "language 'fr'; it has en"),
        ([], "works at 24000 Hz, the corpus is at 16000 Hz"),
    ],
)
def test_what_would_give_no_table_is_refused(table, monkeypatch, capsys, tmp_path, options, words):
    monkeypatch.setattr(table, "read_items", lambda *_: ({"en": []}, None))
    monkeypatch.setattr(table.synthesis, "load", lambda _: types.SimpleNamespace(sample_rate=24000))
    with pytest.raises(SystemExit):
        table.main(["--data", "x", "--out", str(tmp_path), *options])
    assert words in capsys.readouterr().err


def test_a_row_is_judged_anew_when_the_judges_differ(table, tmp_path):
    file = tmp_path / "evaluation.json"
    both = {"matrix": object(), "mandarin": object(), "speaker": None}
    assert not table.is_judged(file, both)
    file.write_text(json.dumps({"settings": {"judges": ["mandarin", "matrix"]}}))
    assert table.is_judged(file, both) and not table.is_judged(file, both | {"mandarin": None})
    file.write_text(json.dumps({"settings": {}}))
    assert not table.is_judged(file, both)
