"""The results table of launch/table.py: what it refuses, and when a row is judged anew."""

import json
import re
import types

import fixture_data
import numpy as np
import pytest

from deepasmr_jax import audio


@pytest.fixture(scope="module")
def table():
    return fixture_data.script("launch/table.py")


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
        "text to A2N, 3 passes",
        f"text to N2N, {table.UNKNOWN}",
    ]
    cosine = {"speaker_cosine": {"value": 0.876, "low": 0.8, "high": 0.9}}
    proxy = {"style_proxy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    reports = {name: report(0.9, **proxy, **(cosine if "static" in name else {})) for name in names}
    parts = ["main", "pool", "passes", "transcript"]
    text = table.markdown(reports, parts, ("Measured.",))
    main, pool_title, pool, refine_title, refine, clip_title, clip, notes = text.split("\n\n")
    rows = lambda part: [line.split(" | ")[0][2:] for line in part.splitlines()[2:]]
    assert (
        rows(main) == names[:3]
        and rows(pool) == [names[1], names[3]]
        and rows(refine) == [names[1], names[4], names[5]]
        and rows(clip) == [names[2], names[6]]
    )
    assert (
        "Table III" in pool_title
        and "Table V" in refine_title
        and "transcript" in clip_title
        and "4 en" in notes
        and "pYIN" in notes
    )
    assert main.splitlines()[0] == "| row | English words | unvoiced, English |"
    assert main.splitlines()[2].endswith("| 7.2 [5.0, 9.0] | 90.0 [89.0, 91.0] |")
    assert pool.splitlines()[3].endswith("| 0.88 [0.80, 0.90] | 0.50 [0.40, 0.60] |")
    assert refine.splitlines()[0].endswith("| style (proxy) |") and notes.endswith("\nMeasured.\n")
    assert "Table" not in table.markdown({names[1]: report(0.9)}, parts)
    assert table.markdown(reports, ["pool"]).split("\n\n")[:2] == [pool_title, pool]
    both = report(0.9)
    both["groups"]["zh"] = both["groups"]["en"]
    assert "unvoiced, both" in table.markdown({names[0]: both}, ["main"])


def test_under_the_tables_stand_date_revision_model_and_command(table, monkeypatch):
    now = table.stamp()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, revision \S.*", now)
    argv = ["--data", "a b", "--out", "x"]
    line = table.describe_run({"one": now}, "mini 1234abcd", argv)
    assert line == f"Measured {now}, model mini 1234abcd: `python launch/table.py --data 'a b' --out x`."
    line = table.describe_run({"one": now, "two": "2026-01-02, revision old"}, "mini", argv)
    assert line.endswith(" Sounds made 2026-01-02, revision old: *two*.")
    monkeypatch.setenv("PATH", "")  # no git
    assert table.stamp.__wrapped__().endswith(f"revision of version {table.__version__}")


def test_the_style_proxy_stands_between_recordings_that_are_no_targets(table, tmp_path):
    rng = np.random.default_rng(0)
    hiss = rng.normal(0, 0.1, 8000).astype(np.float32)
    buzz = sum(np.sin(2 * np.pi * 120 * k * np.arange(8000) / 16000) / k**2 for k in range(1, 20)) / 4
    own = {"normal": [(buzz.astype(np.float32), "hello")] * 2, "asmr": [(hiss, "hello")] * 2}
    known = table.Known({}, {style: {"one": clips} for style, clips in own.items()})
    heard = table.style_references(known, tmp_path / "style.json", 1)
    assert heard == table.style_references(None, tmp_path / "style.json", 1)  # kept
    assert heard["normal"][0].unvoiced < 0.1 < 0.6 < heard["asmr"][0].unvoiced
    line = table.describe_style((heard["normal"][:1], heard["asmr"][:1]), heard)
    assert "mean of 1 normal" in line and "-0.80 (normal) and 0.80 (whispered)" in line  # of equal pace


def test_every_row_of_the_list_belongs_to_a_table(table):
    for name in table.row_table():
        assert any(belongs(name) for belongs in table.PARTS.values())


def test_within_a_style_the_clip_has_its_transcript_except_in_the_rows_without(table):
    asked = []
    synthesizer = types.SimpleNamespace(
        sample_rate=16000, batch=lambda requests: asked.extend(requests) or []
    )
    clip = {style: np.zeros(3, np.float32) for style in table.STYLES.values()}
    item = table.Item("en", "one", "Say this.", "Words of the clip.", clip, clip)
    rows = {name: x for name, x in table.row_table().items() if name.startswith("text to")}
    for method, args, options, _ in rows.values():
        getattr(table.Rows(synthesizer), method)([item], *args, **options)
    given = {name for name, request in zip(rows, asked, strict=True) if request.voice_text}
    assert given == {"text to A2A", "text to N2N"}


def records(matrix: int, others: int, languages: str = "en en zh") -> list[dict]:
    """Pairs of every speaker; the samples of a recording name it."""
    made = []
    for s, language in enumerate(languages.split()):
        for i in range(matrix + others):
            for style in (0, 1):
                wav = np.full(3, len(made) + 1, np.int16)
                made.append(
                    {"pair_id": f"{s}_{i:02d}", "audio": wav, "text": f"text {i}", "language": language}
                    | {"speaker": f"{language}{s}", "style": ("normal", "asmr")[style]}
                    | {"kind": "matrix" if i < matrix else "open"}
                )
    return made


@pytest.mark.parametrize("others", [0, 3, 9])
def test_no_english_target_is_known_to_the_judges_and_none_is_its_own_clip(table, monkeypatch, others):
    monkeypatch.setattr(table.shards, "Records", lambda *_: records(14, others))
    items, known = table.read_items("x", "test", 1000)
    names = lambda wavs: {float(w[0]) for w in wavs}
    targets = names(i.target[style] for i in items["en"] for style in i.target)
    assert not targets & names(w for clips in known.gallery.values() for _, w in clips)
    heard = (w for own in known.enrolment.values() for clips in own.values() for w, _ in clips)
    assert not targets & names(heard)
    assert {s for s, _ in known.gallery["asmr"]} == {"en0", "en1"} and len(items["zh"]) >= 14
    for item in items["en"] + items["zh"]:
        for style in ("normal", "asmr"):
            assert item.clip[style][0] != item.target[style][0]
    few = table.read_items("x", "test", 4)[0]["en"]
    assert [i.speaker for i in few] == ["en0", "en1", "en0", "en1"]


def test_voices_are_lent_by_other_speakers_and_one_speaker_is_not_enough(table):
    item = lambda speaker: table.Item("en", speaker, "a", "b", {}, {})
    lent = table.voices_of_others([item("one"), item("one"), item("two")])
    assert [i.speaker for i in lent] == ["two", "two", "one"]
    with pytest.raises(ValueError, match="only the speaker 'one'"):
        table.voices_of_others([item("one"), item("one")])


def test_a_row_is_written_whole_and_what_failed_is_silence(table, tmp_path):
    class Rows:
        synthesizer = types.SimpleNamespace(sample_rate=16000)

        def speak(self, items, task, refine):
            assert (task, refine) == ("N2A", 2)
            return [np.full(16000, 0.5, np.float32), None]

    items = [table.Item("en", s, f"text of {s}", "", {}, {}) for s in ("one", "two")]
    table.make_row(Rows(), ("speak", ("N2A",), {"refine": 2}, "asmr"), {"en": items}, tmp_path / "row")
    lines = [json.loads(line) for line in (tmp_path / "row" / "results.jsonl").read_text().splitlines()]
    assert [(x["speaker"], x["text"]) for x in lines] == [("one", "text of one"), ("two", "text of two")]
    wavs = [audio.load(tmp_path / "row" / x["file"], 16000, allow_silence=True) for x in lines]
    assert wavs[0].std() < 1e-3 < wavs[0].mean() and audio.is_silent(wavs[1])
    table.make_row(None, ("speak", (), {}, "asmr"), {"en": items}, tmp_path / "row")  # is there: left alone


def test_a_folder_of_rows_with_other_settings_is_refused(table, tmp_path):
    refused = []
    for per_row in (208, 208, 104):
        table.check_settings(
            tmp_path / "settings.json", {"split": "test", "per_row": per_row}, refused.append
        )
    assert len(refused) == 1 and "per_row 208, not 104; name another --out" in refused[0]
