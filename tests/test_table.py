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
        (["--rows", "nonsense"], "'nonsense'; the rows are recordings, normal"),
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


def test_the_tables_hold_the_rows_and_columns_that_were_measured(table):
    def report(value, **more):
        interval = {"value": value, "low": value - 0.01, "high": value + 0.01}
        english = {"clips": 4, "unvoiced": interval, "matrix_wer": {"rate": 7.25, "low": 5.0, "high": 9.0}}
        return {"unvoiced": interval, "groups": {"en": english | more}}

    names = [
        "recordings, normal",
        "text to N2A",
        "text to N2N",
        f"text to N2A, {table.STATIC}",
        "text to N2A, 2 passes",
    ]
    cosine = {"speaker_cosine": {"value": 0.876, "low": 0.8, "high": 0.9}}
    text = table.markdown({name: report(0.9, **(cosine if "static" in name else {})) for name in names})
    main, pool_title, pool, refine_title, refine, notes = text.split("\n\n")
    rows = lambda part: [line.split(" | ")[0][2:] for line in part.splitlines()[2:]]
    assert (
        rows(main) == names[:3]
        and rows(pool) == [names[1], names[3]]
        and rows(refine) == [names[1], names[4]]
    )
    assert "Table III" in pool_title and "Table V" in refine_title and "4 en" in notes and "pYIN" in notes
    assert main.splitlines()[0] == "| row | English words | unvoiced, English | unvoiced, both |"
    assert main.splitlines()[2].endswith("| 7.2 [5.0, 9.0] | 90.0 [89.0, 91.0] | 90.0 [89.0, 91.0] |")
    assert pool.splitlines()[3].endswith("| 0.88 [0.80, 0.90] |")
    assert "Table" not in table.markdown({names[1]: report(0.9)})


def test_every_row_of_the_list_belongs_to_a_table(table):
    for name in table.row_table():
        assert sum(belongs(name) for belongs in table.PARTS.values()) >= 1
