"""`deepasmr data check`: what it says of records, manifests and folders of audio."""

import json
import os
import tracemalloc

import fixture_data
import numpy as np
import pytest
import sounds

from deepasmr_jax import audio, cli, data_check

RATE = 16000


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as e:  # argparse
        return e.code


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def folder_of_faults(folder):
    """A file per kind of problem, and whispers that have none."""
    audio.save(folder / "good.wav", sounds.tone(), RATE)
    audio.save(folder / "breath.wav", 0.001 * sounds.hiss(0.6, 1), RATE)  # peak near -70 dB of full scale
    audio.save(folder / "silent.wav", np.zeros(RATE), RATE)
    audio.save(folder / "clipped.wav", np.clip(30 * sounds.hiss(0.6, 2), -1, 1), RATE)
    audio.save(folder / "slow.wav", sounds.hiss(0.6, 3), 8000)
    audio.save(folder / "long.wav", sounds.hiss(3.0, 4), RATE)
    audio.save(folder / "same.wav", sounds.tone(), RATE)
    audio.save(folder / "untold.wav", sounds.hiss(0.6, 5), RATE)
    (folder / "torn.wav").write_bytes((folder / "good.wav").read_bytes()[:20])
    for path in folder.glob("*.wav"):
        if path.stem != "untold":
            path.with_suffix(".txt").write_text("Good night.")
    return folder


def test_audio_that_no_line_of_a_manifest_names_is_told(tmp_path, capsys):
    for name in ("a.wav", "inner/b.wav", "inner/c.wav", ".hidden/d.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        audio.save(tmp_path / name, sounds.hiss(0.6, ord(name[-5])), RATE)
    rows = [{"audio": name, "text": "Good night."} for name in ("a.wav", "./inner/../inner/b.wav")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("data", "check", tmp_path) == 1
    assert "3 files, 1 unfit" in capsys.readouterr().out
    [row] = lines(tmp_path / data_check.REPORT)
    assert (row["problem"], row["id"], row["why"]) == ("not_listed", "c", "no line of m.jsonl names it")


def test_files_of_speech_that_no_reader_looks_for_are_told_and_what_is_no_data_is_not(
    tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "in"
    for name in ("a.wav", "d.wav", "locked/x.wav"):
        audio.save(folder / name, sounds.hiss(0.6, ord(name[0])), RATE)
        (folder / name).with_suffix(".txt").write_text("Good night.")
    other = "b.m4a c.AIFF e.tar e.tar.gz f.parquet sub/list.jsonl g.tfrecord-00000-of-00002".split()
    none = "b.txt README.md LICENSE e.tar.md5 meta.json speakers.tsv .hidden.m4a .git/h.mp4".split()
    for name in other + none:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "empty.jsonl.txt").touch()
    (folder / "sub" / "empty.jsonl").touch()
    (folder / "linked").symlink_to(tmp_path)
    (tmp_path / "c.wav").write_text("x")

    def scan(path, real=os.scandir):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    for report in (
        folder / "sub" / "r.jsonl",
        tmp_path / "r.jsonl",
    ):  # the first is no list of the second check
        assert run("data", "check", folder, "--out", report) == 1
        assert f"{2 + len(other) + 2} files, {len(other) + 2} unfit" in capsys.readouterr().out
    found = {row["where"]: (row["problem"], row["why"]) for row in lines(tmp_path / "r.jsonl")}
    assert set(found) == {str(folder / name) for name in (*other, "linked", "locked")}
    assert found.pop(str(folder / "locked")) == ("unreadable", "no folder to look into (Permission denied)")
    assert {kind for kind, _ in found.values()} == {"not_listed"}
    assert (
        "make one of .wav" in found[str(folder / "b.m4a")][1] and "unpack" in found[str(folder / "e.tar")][1]
    )
    # beside lists the same, and a name that no file can have stops nothing
    (folder / "top.jsonl").write_text(
        '{"audio": "d.wav", "text": "Hi."}\n{"audio": "\\u0000", "text": "Hi."}\n'
    )
    run("data", "check", folder, "--out", tmp_path / "r.jsonl")
    found = {
        row["where"]: row["why"] for row in lines(tmp_path / "r.jsonl") if row["problem"] == "not_listed"
    }
    assert set(found) == {str(folder / name) for name in (*other, "a.wav")}
    assert found[str(folder / "a.wav")] == "no line of top.jsonl names it"


def test_every_fault_of_a_folder_is_named_and_a_breath_is_none(tmp_path, capsys):
    folder = folder_of_faults(tmp_path / "in")
    assert run("data", "check", folder, "--max-seconds", "2") == 1
    out, _ = capsys.readouterr()
    found = {row["id"]: row for row in lines(folder / data_check.REPORT)}
    assert {k: row["problem"] for k, row in found.items()} == {
        "clipped": "clipped", "long": "too_long", "same": "duplicate", "silent": "silent", "slow": "wrong_rate",
        "torn": "unreadable", "untold": "no_text",
    }  # fmt: skip
    assert [k for k, row in found.items() if row["kept"]] == ["clipped"]
    assert str(folder / "good.wav") in found["same"]["why"] and "8000 Hz" in found["slow"]["why"]
    assert "9 files, 6 unfit" in out and "clipped" in out
    keep = [
        word
        for kind in ("too_long", "duplicate", "silent", "wrong_rate", "no_text")
        for word in ("--keep", kind)
    ]
    (folder / "torn.wav").unlink()
    assert run("data", "check", folder, "--max-seconds", "2", "--out", tmp_path / "r.jsonl", *keep) == 0
    assert len(lines(tmp_path / "r.jsonl")) == 6 and all(row["kept"] for row in lines(tmp_path / "r.jsonl"))
    assert run("data", "check", folder / "good.wav") == 2
    assert run("data", "check", folder, "--rate", "48000") == 1
    wrong = [row["id"] for row in lines(folder / data_check.REPORT) if row["problem"] == "wrong_rate"]
    assert wrong == ["breath", "clipped", "good", "long", "same", "silent", "slow", "untold"]


def test_a_manifest_and_records_are_checked_too(tmp_path, capsys):
    audio.save(tmp_path / "m" / "a.wav", sounds.tone(), RATE)
    rows = [
        {"audio": "a.wav", "text": "Hi."},
        {"audio": "b.wav", "text": "Hi."},
        {"audio": "a.wav", "text": 5},
        {"audio": "a.wav", "text": "Hi.", "to_s": "x"},
        {"audio": "a.wav", "text": "Hi.", "style": "loud"},
        {"audio": "a.wav", "text": "Hi.", "split": "test"},
    ]
    text = "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows) + "[]\n\n"
    (tmp_path / "m" / "list.jsonl").write_text(text, "utf-8")
    for _ in range(2):  # the report of the first is no manifest of the second
        assert run("data", "check", tmp_path / "m") == 1
        found = {row["where"].split()[1]: row["problem"] for row in lines(tmp_path / "m" / data_check.REPORT)}
        assert found == {"2": "unreadable", "3": "no_text", "4": "unreadable", "5": "bad_label", "6": "bad_label",
                         "7": "unreadable"}  # fmt: skip
    records = fixture_data.write(tmp_path, {"train": 6, "valid": 2}, has_features=False)
    assert run("data", "check", records, "--out", tmp_path / "r.jsonl") == 1
    assert "8 files, 2 unfit" in capsys.readouterr().out
    found = lines(tmp_path / "r.jsonl")  # the noise of train and valid is the same
    assert [(row["id"], row["problem"]) for row in found] == [
        ("valid_0", "duplicate"),
        ("valid_1", "duplicate"),
    ]
    assert found[0]["why"] == f"the same sound as {records} train record 0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], ["no folder nowhere"]),
        (["EMPTY"], ["holds no records"]),
        (["PACKED"], ["data/build.py check LAYOUT PACKED --out"]),
        (["LISTS"], ["data/build.py check kaldi LISTS --out"]),
        (["GOOD", "--keep", "unreadable"], ["'unreadable' cannot be kept"]),
        (["GOOD", "--max-seconds", "0"], ["0 s are no limit"]),
        (["GOOD", "--rate", "8000"], ["8000 Hz", "16000"]),
        (["GOOD", "--out", "report.txt"], ["report.txt", ".jsonl"]),
    ],
)
def test_bad_input_is_one_sentence_and_code_2_and_leaves_nothing(
    tmp_path, capsys, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "PACKED").mkdir()
    (tmp_path / "PACKED" / "a.tar").write_bytes(b"x")
    (tmp_path / "LISTS").mkdir()
    (tmp_path / "LISTS" / "wav.scp").write_text("a /nowhere/a.wav\n")
    audio.save("GOOD/a.wav", sounds.tone(), RATE)
    before = sorted(tmp_path.rglob("*"))
    assert run("data", "check", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("deepasmr: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert sorted(tmp_path.rglob("*")) == before


def test_sounds_are_remembered_in_bounded_memory():
    seen = data_check.Seen()
    tracemalloc.start()
    try:
        for i in range(20_000):
            assert seen.add(data_check.digest(np.array([i], np.int32)), f"u{i}") is None
        assert seen.add(data_check.digest(np.array([7], np.int32)), "again") == "u7"
        assert tracemalloc.get_traced_memory()[1] < 1e6  # a set of them would take more than 2 MB
    finally:
        tracemalloc.stop()
