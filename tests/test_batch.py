"""Many requests into a folder: failures beside results, and going on where a run was stopped."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from deepasmr_jax import audio, batch, pool, results, synthesis

TEXT = "Close your eyes."


@pytest.fixture
def maker(monkeypatch):
    """A synthesizer whose `batch` gives a constant at once and notes the requests in `asked`."""

    def speak(self, requests):
        self.asked += requests
        facts = {"task": "N2A", "language": "en", "prompt": "p", "prompt_similarity": 1.0, "notes": ()}
        wav, none = np.full(1600, 0.5, np.float32), np.zeros(0)
        return [results.Result(wav, 16000, none, none, request=r, timings={}, **facts) for r in requests]

    monkeypatch.setattr(synthesis.Synthesizer, "batch", speak)
    made = object.__new__(synthesis.Synthesizer)
    made.asked, made.folder, made.config = [], Path("tiny"), {"name": "tiny"}
    made.pool = pool.Pool((), "mini", "tiny")
    return made


def lines(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rows_that_cannot_be_used_are_recorded_and_arrays_are_not(tmp_path, maker):
    row = {"text": TEXT, "voice": tiny_model.buzz(0.5), "voice-rate": tiny_model.RATE}
    rows = [row | {"file": name} for name in ("a.mp3", "../a.wav", "in/a.flac")] + [row | {"speeker": "me"}]
    rows += [row | {"sed": 1}, {"text": TEXT}, row | {"file": "in/a.flac"}]
    said = []
    assert batch.to_folder(maker, rows, tmp_path, said.append, at_once=4) == (2, 5, 0)
    assert said == ["4 of 7 done: 2 made, 2 failed", "7 of 7 done: 2 made, 5 failed"]
    made, failed = lines(tmp_path, "results.jsonl"), lines(tmp_path, "failures.jsonl")
    assert [x["file"] for x in made] == ["in/a.flac", "00003_N2A.wav"] and "voice" not in made[0]
    assert made[1]["speeker"] == "me" and all((tmp_path / x["file"]).exists() for x in made)
    assert all("clip" not in x for x in made)  # an array has no place
    words = ("a.mp3", "leads out", "did you mean 'seed'", "no 'voice'", "'in/a.flac' is that of row 2")
    assert all(w in x["error"] for w, x in zip(words, failed, strict=True))


def test_a_stopped_run_goes_on_and_makes_only_what_is_missing_or_changed(tmp_path, maker):
    clip, out = tmp_path / "clip.wav", tmp_path / "out"
    audio.save(clip, tiny_model.buzz(0.5), tiny_model.RATE)
    os.utime(clip, (1, 1))
    rows = [{"text": f"Line {i}.", "voice": str(clip), "seed": str(i)} for i in range(5)] + [{"text": ""}]
    rows[0] |= {"notes": "mine", "language": None}  # names that the result has too
    rows[3] |= {"text": "把眼睛闭上。"}
    assert batch.to_folder(maker, rows, out) == (5, 1, 0)
    whole = (out / "results.jsonl").read_bytes()
    at = whole.index("睛".encode()) + 1  # stopped inside a character of the fourth line
    (out / "results.jsonl").write_bytes(whole[:at])
    (out / "00001_N2A.wav").unlink()
    rows[2] = rows[2] | {"text": "Another line.", "pool-strategy": "none"}
    maker.asked.clear()
    assert batch.to_folder(maker, rows, out) == (4, 1, 1)
    assert [r.text for r in maker.asked] == ["Line 1.", "Another line.", "把眼睛闭上。", "Line 4."]
    assert [r.pool_strategy for r in maker.asked] == ["nearest", "none", "nearest", "nearest"]
    assert sorted(x["row"] for x in lines(out, "results.jsonl")) == [0, 1, 2, 3, 4]
    assert {x["clip"] for x in lines(out, "results.jsonl")} == {str(clip)}
    assert batch.to_folder(maker, rows, out) == (0, 1, 5)
    maker.config = {"name": "tiny", "trained": "more"}
    assert batch.to_folder(maker, rows, out) == (5, 1, 0)
    os.utime(clip, (2e9, 2e9))  # recorded again
    assert batch.to_folder(maker, rows, out) == (5, 1, 0)
