"""Builders of corpora: each layout gives the records it holds, whatever is broken, and goes on after a kill."""

import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import sounds

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

import build  # noqa: E402
import emilia  # noqa: E402
import manifest  # noqa: E402
import measure  # noqa: E402
import tfds_files  # noqa: E402

from deepasmr_jax import audio, checkpoint, config, data_check, input_pipeline, metrics, shards, train  # noqa: E402

ROOT = Path(__file__).parent.parent

RATE = 16000


def wave(seed: int, seconds: float = 0.3, rate: int = RATE, kind: str = "WAV") -> bytes:
    """The bytes of a file with noise of its own."""
    out = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))
    soundfile.write(out, noise, rate, format=kind)
    return out.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def records(folder: Path) -> dict[str, dict]:
    """Split and record by id, as the loader reads them."""
    found = {}
    for split in build.SPLITS:
        if list(folder.glob(f"*-{split}.array*")):
            cfg = input_pipeline.Config("vocoder", 1, (str(folder),), split)
            rows, index = shards.Records(cfg), index_without_reading(cfg)
            for i in range(len(rows)):
                row = {k: v.decode() if isinstance(v, bytes) else v for k, v in rows[i].items()}
                assert row["id"] not in found
                assert (row["speaker"], shards.num_samples(row)) == (
                    index.speakers[index.voice[i]], index.num_samples[i]
                )  # fmt: skip
                found[row["id"]] = row | {"split": split}
    return found


def index_without_reading(cfg: input_pipeline.Config) -> shards.Index:
    """The index that is joined of what the build kept of each shard."""
    shards._index.cache_clear()
    for path in Path(cfg.data_dirs[0]).glob(f"index_{cfg.split}_*"):
        path.unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "_Source", None)
        return shards.read_index(cfg)


def report(folder: Path) -> dict[str, str]:
    """Kind of problem by id (or place) in the report."""
    rows = [json.loads(line) for line in (folder / data_check.BUILD_REPORT).read_text("utf-8").splitlines()]
    return {row["id"] or row["where"]: row["problem"] for row in rows}


def made(tmp_path: Path, layout: str, source: Path, **options):
    out = tmp_path / "out" / layout / "1.0.0"
    counts = build.build(layout, source, out, build.Options(**options))
    assert not (out / tfds_files.PARTS).exists() and not list(out.glob(".*"))
    return counts, records(out), report(out)


# ---------------------------------------------------------------- layouts


def test_a_manifest_with_parts_of_a_recording_splits_and_all_that_may_be_wrong(tmp_path):
    source = tmp_path / "mine"
    put(source / "a.wav", wave(1, 2.0))
    put(source / "b.mp3", wave(2, 1.0, 24000, "MP3"))
    put(source / "same.wav", wave(1, 2.0))
    put(source / "slow.wav", wave(3, 1.0, 8000))
    put(source / "broken.wav", b"RIFF and then nothing of use")
    put(source / "quiet.wav", b"")
    audio.save(source / "breath.wav", 0.01 * sounds.hiss(1.0), RATE)  # 40 dB below full scale and more
    audio.save(source / "silence.wav", np.zeros(RATE), RATE)
    audio.save(source / "loud.wav", np.clip(20 * sounds.hiss(1.0), -1, 1), RATE)
    said = {"text": "Good night.", "speaker": "s", "style": "asmr"}
    put(
        source / "train.jsonl",
        lines(
            {"audio": "a.wav", "id": "whole", **said},
            {"audio": "a.wav", "id": "part", "from_s": 0.5, "to_s": 1.0, **said, "split": "valid"},
            {"audio": "b.mp3", "id": "mp3", **said, "attributes": {"speaker": "t"}, "pair_id": "p"},
            {"audio": "same.wav", "id": "again", **said},
            {"audio": "slow.wav", "id": "slow", **said},
            {"audio": "broken.wav", "id": "broken", **said},
            {"audio": "nowhere.wav", "id": "nowhere", **said},
            {"audio": "quiet.wav", "id": "empty", **said},
            {"audio": "breath.wav", "id": "breath", **said, "text": "[breath]"},
            {"audio": "silence.wav", "id": "silence", **said},
            {"audio": "loud.wav", "id": "loud", **said},
            {"audio": "a.wav", "id": "textless", **said, "text": " ", "to_s": 0.4},
            {"audio": "a.wav", "id": "german", **said, "language": "de", "to_s": 0.5},
            {"audio": "a.wav", "id": "nobody", **said, "speaker": None, "to_s": 0.6},
            {"audio": "a.wav", "id": "beyond", **said, "from_s": 1.0, "to_s": 2.5},
            {"audio": "a.wav", "id": "rounded", **said, "from_s": 0.2, "to_s": 2.009},
            {"audio": "a.wav", "id": "blink", **said, "to_s": 0.05},
            {"audio": "a.wav", "id": "half", **said, "to_s": 0.7, "text": "HALF"},
            {"text": "no audio", "id": "mute"},
            {"audio": "a.wav", "id": "chinese", **said, "text": "晚安。", "from_s": 1.5},
        ).replace("HALF", "\\ud800")
        + "{broken line\n"
        + "[" * 200_000
        + "\n",
    )
    counts, found, why = made(tmp_path, "manifest", source, valid_share=0.0)
    assert set(found) == {"whole", "part", "mp3", "breath", "loud", "chinese", "rounded"}
    assert why == {
        "again": "duplicate", "slow": "wrong_rate", "broken": "unreadable", "nowhere": "unreadable",
        "empty": "unreadable", "silence": "silent", "loud": "clipped", "textless": "no_text", "german": "bad_label",
        "nobody": "bad_label", "beyond": "unreadable", "blink": "too_short", "mute": "unreadable",
        "half": "bad_label", f"line 21 of {source / 'train.jsonl'}": "unreadable",
        f"line 22 of {source / 'train.jsonl'}": "unreadable",
    }  # fmt: skip
    assert counts["left_out"] == 15 and counts["records"] == {"train": 6, "valid": 1}
    assert found["part"]["split"] == "valid" and found["chinese"]["language"] == "zh"
    whole, _ = soundfile.read(source / "a.wav", dtype="int16")
    np.testing.assert_array_equal(found["whole"]["audio"], whole)  # 16 bits at 16 kHz stay what they are
    np.testing.assert_array_equal(
        found["rounded"]["audio"], whole[RATE // 5 :]
    )  # to_s is beyond the end by 9 ms
    np.testing.assert_array_equal(found["part"]["audio"], whole[RATE // 2 : RATE])
    assert len(found["mp3"]["audio"]) == RATE and found["mp3"]["pair_id"] == "p"
    assert found["whole"]["pair_id"] == "whole" and found["whole"]["language"] == "en"


def test_kept_kinds_stay_and_are_reported(tmp_path):
    source = tmp_path / "mine"
    put(source / "a.wav", wave(1, 0.5))
    put(source / "slow.wav", wave(2, 0.5, 8000))
    said = {"speaker": "s", "style": "normal", "language": "en"}
    rows = [{"audio": "a.wav", "id": i, "text": "Hi.", **said} for i in ("a", "b")]
    rows.append({"audio": "slow.wav", "id": "c", **said})
    put(source / "m.jsonl", lines(*rows))
    rules = data_check.Rules(keep=("duplicate", "wrong_rate", "no_text"), max_seconds=1.0)
    counts, found, _ = made(tmp_path, "manifest", source, rules=rules)
    assert set(found) == {"a", "b", "c"} and counts["left_out"] == 0
    assert counts["duplicate"] == counts["wrong_rate"] == counts["no_text"] == 1
    assert len(found["c"]["audio"]) == RATE // 2
    with pytest.raises(ValueError, match="'unreadable' cannot be kept; choose of wrong_rate"):
        data_check.Rules(keep=("unreadable",))


def test_records_of_24_khz_keep_what_lies_above_8_khz_and_are_the_same_below(tmp_path, capsys):
    t = np.arange(12000) / 24000
    for i in range(4):
        wav = 0.3 * np.sin(2 * np.pi * (300 + 100 * i) * t) + 0.1 * np.sin(2 * np.pi * 10000 * t)
        audio.save(tmp_path / f"{i}.wav", wav, 24000)
    audio.save(tmp_path / "same.wav", wav, 24000)
    audio.save(tmp_path / "old.wav", wav[:9000], 16000)
    said = {"text": "Good night.", "style": "normal"}
    names = ["0", "1", "2", "3", "old", "same"]
    rows = [{"audio": f"{n}.wav", "id": n, "speaker": f"s{i % 2}", **said} for i, n in enumerate(names)]
    source = str(put(tmp_path / "m.jsonl", lines(*rows)))
    out = {rate: tmp_path / f"of_{rate}" / "1.0.0" for rate in (16000, 24000)}

    def run(rate, *more):
        arguments = ["build", "manifest", source, "--out", str(out[rate]), "--valid-share", "0.001", *more]
        return build.main(arguments)

    assert run(24000, "--record-rate", "23000") == 2  # the smallest share: a speaker is moved
    assert "records cannot have 23000 Hz; give one of 16000, 22050" in capsys.readouterr().err
    assert run(24000, "--record-rate", "24000", "--rate", "22050") == 2
    assert "rate 22050 Hz is below that of records, 24000" in capsys.readouterr().err
    assert run(24000, "--record-rate", "24000", "--process", "0/2") == 0
    assert run(24000) == 2
    err = capsys.readouterr().err
    assert "was begun with records of 24000 Hz, not 16000; go on with those" in err and err.count("\n") == 1
    assert run(24000, "--record-rate", "24000") == 1
    told = capsys.readouterr().out
    assert "hours: {'train': 0.0003, 'valid': 0.0003}" in told and "wrong_rate: 1" in told
    assert run(16000, "--process", "0/2") == 0
    plan = out[16000] / tfds_files.PARTS / "plan.json"
    began = json.loads(plan.read_text())
    assert began.pop("record_rate") == 16000
    plan.write_text(json.dumps(began))  # by an older version
    assert run(16000, "--keep", "duplicate") == 2 and run(16000) == 1
    assert "hours: {'train': 0.0004, 'valid': 0.0003}" in capsys.readouterr().out

    found, old = records(out[24000]), records(out[16000])
    assert set(found) == {"0", "1", "2", "3"} and set(old) == {*found, "old"}
    assert report(out[24000]) == {"same": "duplicate", "old": "wrong_rate"}
    for name, row in found.items():
        pcm, _ = soundfile.read(tmp_path / f"{name}.wav", dtype="int16")
        np.testing.assert_array_equal(row["audio"], pcm)
        assert row["sample_rate"] == 24000
        assert "sample_rate" not in old[name] and len(old[name]["audio"]) == 8000
    assert {row["split"] for row in found.values()} == {"train", "valid"}
    for folder, hours in ((out[24000], 0.0006), (out[16000], 0.0007)):
        counts = data_check.check(data_check.find(folder), tmp_path / "r.jsonl", data_check.Rules())
        assert counts["hours"] == hours and counts["left_out"] == 0
    rules = data_check.Rules(rate=24000)
    assert data_check.check(data_check.find(out[24000]), tmp_path / "r.jsonl", rules)["left_out"] == 0
    assert data_check.check(data_check.find(out[16000]), tmp_path / "r.jsonl", rules)["wrong_rate"] == 5

    def rows_of(stage, *rates, **sizes):
        folders = tuple(str(out[rate]) for rate in rates)
        cfg = input_pipeline.Config(stage, 8, folders, style_weights=(1.0, 0.0), **sizes)
        return np.concatenate([b["wav"] for b in input_pipeline.first_batches(cfg, 2)])

    def high_share(wavs):  # of the energy at 10 kHz, of tones of 0.3 and 0.1: a tenth
        power = np.abs(np.fft.rfft(wavs * np.hanning(wavs.shape[1]))) ** 2
        hz = np.fft.rfftfreq(wavs.shape[1], 1 / 24000)
        return power[:, hz > 9000].sum(1) / power.sum(1)

    sizes = dict(num_samples=4800, mel_profile="f5")
    np.testing.assert_allclose(high_share(rows_of("vocoder", 24000, **sizes)), 0.1, atol=0.01)
    assert np.all(high_share(rows_of("vocoder", 16000, **sizes)) < 1e-3)
    shares = high_share(rows_of("vocoder", 16000, 24000, **sizes))
    assert np.all((abs(shares - 0.1) < 0.01) | (shares < 1e-3)) and {*np.round(shares, 1)} == {0.0, 0.1}
    cfg = input_pipeline.Config("speaker", 1, (str(out[24000]),), num_samples=9600)
    heard = input_pipeline._Waves(dataclasses.replace(cfg, style_weights=(1.0, 0.0)), shards.read_index(cfg))
    record = shards.Records(cfg)[int(heard.mixture.order(0)[0])]
    row = heard.row(0, np.random.default_rng(0))
    assert row["lengths"] == len(row["wav"]) == 8000
    expected = old[shards.decoded(record["id"])]["audio"] / 32768
    np.testing.assert_allclose(row["wav"], expected, atol=2 / 32768)


def parquet(path: Path, columns: dict, **options) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def test_asmr_parquet_with_embedded_audio_by_row_group(tmp_path):
    audios = [{"bytes": wave(i, kind="FLAC"), "path": f"{i}.flac"} for i in range(5)]
    audios[3] = {"bytes": b"no audio", "path": "3.flac"}
    columns = {"audio_id": [f"u{i}" for i in range(5)], "audio": audios,
               "caption": ["Close your eyes."] * 4 + [None], "creator_id": list(range(5))}  # fmt: skip
    parquet(tmp_path / "db" / "a.parquet", columns, row_group_size=2)
    put(tmp_path / "db" / "torn.parquet", (tmp_path / "db" / "a.parquet").read_bytes()[:300])
    counts, found, why = made(tmp_path, "asmr", tmp_path / "db")
    torn = str(tmp_path / "db" / "torn.parquet")
    assert set(found) == {"u0", "u1", "u2"} and why == {
        "u3": "unreadable",
        "u4": "no_text",
        torn: "unreadable",
    }
    assert {r["style"] for r in found.values()} == {"asmr"} and found["u2"]["speaker"] == "2"


def test_the_speaker_of_a_parquet_file_may_be_among_the_attributes(tmp_path):
    columns = {
        "id": ["u"],
        "audio": [wave(1)],
        "text": ["Hush."],
        "attributes": [{"speaker": "ann", "age": 3}],
    }
    parquet(tmp_path / "a.parquet", columns)
    _, found, why = made(tmp_path, "asmr", tmp_path / "a.parquet")
    assert found["u"]["speaker"] == "ann" and not why


def test_asmr_folder_with_lines_and_cosyvoice_rows(tmp_path):
    put(tmp_path / "db" / "x" / "1.wav", wave(1))
    put(tmp_path / "db" / "list.jsonl", lines({"path": "x/1.wav", "words": "Hush.", "speaker": "s"}))
    _, found, _ = made(tmp_path, "asmr", tmp_path / "db", fields={"text": "words"})
    assert found["x_1"]["text"] == "Hush." and found["x_1"]["style"] == "asmr"
    columns = {"utt": ["u"], "audio_data": [wave(2)], "wav": ["/nowhere.wav"], "text": ["Hi."], "spk": ["s"]}
    parquet(tmp_path / "cosy.parquet", columns)
    out = tmp_path / "cosy" / "1.0.0"
    build.build("asmr", tmp_path / "cosy.parquet", out, build.Options(labels={"style": "normal"}))
    assert records(out)["u"]["style"] == "normal"


def test_a_column_that_is_named_and_not_there_is_told_and_no_other_is_read_for_it(tmp_path, capsys):
    said = {"text": "Hush.", "speaker": "s", "pair": None}
    put(tmp_path / "m.jsonl", lines(*({"audio": f"{i}.wav", "id": f"{i}", **said} for i in range(2))))
    for i in range(2):
        put(tmp_path / f"{i}.wav", wave(i))
    arguments = ["manifest", str(tmp_path / "m.jsonl"), "--style", "asmr", "--out"]
    for field, problem in (
        ("text=foo", "no_text"),
        ("pair_id=foo", "bad_label"),
        ("audio=foo", "unreadable"),
    ):
        assert build.main(["check", *arguments, str(tmp_path / "r.jsonl"), "--field", field]) == 1
        rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
        assert [(r["id"], r["problem"]) for r in rows if r["id"] in "01"] == [("0", problem), ("1", problem)]
        assert f"there is no 'foo', named for {field.split('=')[0]}, among audio, id, text" in rows[0]["why"]
    assert build.main(["check", *arguments, str(tmp_path / "r.jsonl"), "--field", "pair_id=pair"]) == 0
    capsys.readouterr()
    arguments[0] = "folders"
    assert build.main(["check", *arguments, str(tmp_path / "r.jsonl"), "--field", "text=foo"]) == 2
    assert "layout folders has no columns to name; --field is for manifest" in capsys.readouterr().err


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_emilia_as_tar_files_and_as_lines_with_mp3(tmp_path):
    def about(i, **more):
        row = {
            "id": f"EN_{i}",
            "wav": f"EN/{i}.mp3",
            "text": "Good night.",
            "speaker": f"EN_S{i}",
            "language": "en",
        }
        return json.dumps(row | {"duration": 0.5, "dnsmos": 3.2} | more).encode()

    mp3 = [wave(i, 0.5, 24000, "MP3") for i in range(5)]
    members = {
        "EN_0.json": about(0),
        "EN_0.mp3": mp3[0],
        "EN_1.mp3": mp3[1],
        "EN_1.json": about(1, language="fr"),
    }
    members |= {"EN_2.mp3": mp3[2], "EN_3.mp3": mp3[3], "EN_3.json": b"{", "EN_4.json": about(4)}
    tar(tmp_path / "tars" / "EN" / "EN-B000000.tar", members)
    whole = (tmp_path / "tars" / "EN" / "EN-B000000.tar").read_bytes()
    other = {"Z_0.mp3": wave(9, 0.5, 24000, "MP3"), "Z_0.json": about(9)}
    tar(tmp_path / "tars" / "EN" / "EN-B000001.tar", other | members)
    torn = tmp_path / "tars" / "EN" / "EN-B000001.tar"
    torn.write_bytes(torn.read_bytes()[: len(whole) // 2])
    _, found, why = made(tmp_path, "emilia", tmp_path / "tars")
    assert set(found) == {"EN_0", "EN_9"}
    assert (
        why["EN_1"] == "bad_label" and why["EN_2"] in ("no_text", "bad_label") and why["EN_3"] == "unreadable"
    )
    assert why["EN_4"] == "unreadable" and why[str(torn)] == "unreadable"
    rows = [json.loads(about(i)) for i in range(2)]
    put(tmp_path / "lines" / "EN_B0.jsonl", lines(*rows))
    for i in range(2):
        put(tmp_path / "lines" / "EN" / f"{i}.mp3", mp3[i])
    out = tmp_path / "lines_out" / "1.0.0"
    build.build("emilia", tmp_path / "lines", out, build.Options())
    assert set(records(out)) == {"EN_0", "EN_1"} and records(out)["EN_0"]["style"] == "normal"


def test_of_an_emilia_sample_with_a_member_too_big_one_problem_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(emilia, "MAX_BYTES", 20_000)
    about = json.dumps({"text": "Hi.", "speaker": "s", "language": "en"}).encode()
    big = {"a.json": about, "a.mp3": bytes(30_000), "a.txt": b"Hi.", "b.mp3": bytes(30_000), "b.json": about}
    tar(tmp_path / "x.tar", big | {"c.mp3": wave(1, 0.5, 24000, "MP3"), "c.json": about})
    counts, found, why = made(tmp_path, "emilia", tmp_path / "x.tar")
    assert set(found) == {"c"} and why == {"a": "too_long", "b": "too_long"} and counts["left_out"] == 2


@pytest.mark.parametrize("layout", ["manifest", "emilia", "asmr"])
def test_reports_and_hidden_files_beside_a_manifest_are_none(tmp_path, layout):
    source = many(tmp_path / "mine")
    for name in (data_check.REPORT, data_check.BUILD_REPORT, "._m.jsonl", ".parts/x.jsonl"):
        put(source / name, b"\x00 no manifest")
    _, found, why = made(tmp_path, layout, source)
    assert len(found) == 39 and [*why.values()] == ["duplicate"]
    assert sum(1 for _ in data_check.find(source)) == 40


def test_of_two_layouts_in_one_folder_the_one_that_is_not_read_is_told_by_check_and_build(tmp_path):
    mp3, said = wave(1, 0.5, 24000, "MP3"), {"text": "Hi.", "speaker": "s", "language": "en"}
    tar(tmp_path / "emilia" / "EN" / "x.tar", {"a.mp3": mp3, "a.json": json.dumps(said).encode()})
    parquet(
        tmp_path / "asmr" / "x.parquet", {"id": ["a"], "audio": [mp3]} | {k: [v] for k, v in said.items()}
    )
    put(tmp_path / "manifest" / "top.jsonl", lines(said | {"audio": "a.mp3", "id": "a", "style": "asmr"}))
    put(tmp_path / "manifest" / "a.mp3", mp3)
    put(tmp_path / "folders" / "s" / "a.mp3", mp3)
    put(tmp_path / "folders" / "s" / "a.txt", "Hi.")
    others = {"b.m4a", "c.aiff", "f.zip", "sub/more.jsonl", "sub/d.opus"}
    why = {}
    for layout in ("emilia", "asmr", "manifest", "folders"):
        source = tmp_path / layout
        put(source / "sub" / "more.jsonl", lines({"audio": "d.opus"} | said))
        expected = others if layout != "folders" else others - {"sub/d.opus"}
        for name in expected - {"sub/more.jsonl"}:
            put(source / name, b"x")
        for command, out in (("check", "r.jsonl"), ("build", f"{layout}_out/1.0.0")):
            assert build.main([command, layout, str(source), "--out", str(tmp_path / out)]) == 1
            report = tmp_path / out if command == "check" else tmp_path / out / data_check.BUILD_REPORT
            rows = [json.loads(line) for line in report.read_text().splitlines()]
            assert {row["where"] for row in rows} == {str(source / name) for name in expected}, (
                layout,
                command,
            )
            assert {(row["problem"], row["kept"]) for row in rows} == {("not_listed", False)}
        assert set(records(tmp_path / out)) == {"a" if layout != "folders" else "s_a"}
        why[layout] = {Path(row["where"]).name: row["why"] for row in rows}
    assert why["emilia"]["d.opus"] == "of this folder x.tar is read; give one of both"
    assert why["asmr"]["more.jsonl"].startswith("a list; ")
    assert why["manifest"]["d.opus"] == "no line of top.jsonl names it"


def test_chains_and_whisper40_are_pairs_by_speaker_and_text(tmp_path):
    for n, style in enumerate(("solo", "whsp", "fast")):
        for k, name in enumerate(("s01", "s02")):
            put(
                tmp_path / "chains" / "data" / style / "frf01" / f"frf01_{name}_{style}.wav", wave(10 * n + k)
            )
    texts = {"s01": "If it doesn't matter.", "s02": "Some people."}
    _, found, why = made(tmp_path, "chains", tmp_path / "chains", texts=texts)
    assert set(found) == {f"frf01_s0{i}_{style}" for i in (1, 2) for style in ("solo", "whsp")}
    assert why == {f"frf01_s0{i}_fast": "not_listed" for i in (1, 2)}
    one = found["frf01_s01_whsp"]
    assert (one["style"], one["pair_id"], one["speaker"], one["language"]) == (
        "asmr",
        "frf01_s01",
        "frf01",
        "en",
    )
    for n, style in enumerate(("nature", "whsp")):
        put(tmp_path / "w40" / style / "test" / "abc01" / f"abc01_04_{style}.wav", wave(50 + n))
    _, found, why = made(tmp_path, "whisper40", tmp_path / "w40", texts={"abc01_04": "晚安。"})
    assert {r["style"] for r in found.values()} == {"normal", "asmr"} and not why
    assert {r["pair_id"] for r in found.values()} == {"abc01_04"}


def test_folders_like_libritts_and_librispeech(tmp_path):
    base = tmp_path / "libri" / "dev-clean" / "84" / "121123"
    for i in range(2):
        put(base / f"84_121123_00000{i}.wav", wave(i, 0.3, 24000))
    put(base / "84_121123_000000.normalized.txt", "go.\n")
    put(base / "84_121123_000000.original.txt", "Go!")
    other = tmp_path / "libri" / "test" / "61" / "70968"
    put(other / "61-70968-0000.flac", wave(3, kind="FLAC"))
    put(other / "61-70968.trans.txt", "61-70968-0000 HE BEGAN\n")
    _, found, why = made(tmp_path, "folders", tmp_path / "libri")
    read = {r["speaker"]: r["text"] for r in found.values()}
    assert read == {"84": "go.", "61": "HE BEGAN"}
    assert [*why.values()].count("no_text") == 1


def test_kaldi_lists_in_any_order(tmp_path):
    folder = tmp_path / "kaldi"
    for i in range(3):
        put(folder / "wav" / f"{i}.wav", wave(i))
    put(folder / "wav.scp", "u0 wav/0.wav\nu1\twav/1.wav\nu2 sox x.wav -t wav - |\nu3 wav/2.wav\n")
    put(folder / "text", "u3 three words here\nu1 晚安\nu0 good night\n")
    put(folder / "utt2spk", "u1 b\nu0 a\nu2 a\n")
    _, found, why = made(tmp_path, "kaldi", folder)
    assert {k: (r["text"], r["speaker"], r["language"]) for k, r in found.items()} == {
        "u0": ("good night", "a", "en"), "u1": ("晚安", "b", "zh")}  # fmt: skip
    assert why == {"u2": "unreadable", "u3": "bad_label"}


# ---------------------------------------------------------------- the build


def many(folder: Path, count: int = 40, speakers: int = 10) -> Path:
    """A manifest of parts of one recording; two of them are the same."""
    put(folder / "long.wav", wave(0, 8.0))
    rows = [
        {"audio": "long.wav", "id": f"u{i}", "from_s": i / 10, "to_s": i / 10 + 0.2, "text": "Hi there.",
         "speaker": f"s{i % speakers}", "style": "normal"}
        for i in range(count)
    ]  # fmt: skip
    rows[-1]["from_s"], rows[-1]["to_s"] = rows[0]["from_s"], rows[0]["to_s"]
    put(folder / "m.jsonl", lines(*rows))
    return folder


@pytest.fixture
def small_units(monkeypatch):
    """Units of some lines."""
    monkeypatch.setattr(manifest, "RANGE_BYTES", 700)


def content(folder: Path) -> dict[str, list[tuple]]:
    """The records of each file, in order."""
    found = {}
    for path in sorted(folder.glob("*array_record*")):
        rows = [build._features().deserialize_example_np(data) for data in tfds_files.read_shard(path)]
        found[path.name] = [(row["id"], row["audio"].tobytes()) for row in rows]
    return found


def test_the_split_is_by_speaker_and_never_changes(tmp_path):
    options = build.Options(valid_share=0.3)
    splits = {
        name: build.split_of(data_check.Item(f"u{i}", b"", "", speaker=name), options)
        for i in range(3)
        for name in map(str, range(1000))
    }
    assert 250 < sum(s == "valid" for s in splits.values()) < 350
    assert [k for k in map(str, range(12)) if splits[k] == "valid"] == ["2", "6"]
    named = build.Options(valid_speakers=("7",))
    assert build.split_of(data_check.Item("u", b"", "", speaker="7"), named) == "valid"
    by_pair = build.Options(valid_share=0.5, split_by="sentence")
    pairs = [
        data_check.Item(f"{p}{s}", b"", "", speaker="one", pair_id=f"{p}") for p in range(20) for s in "ab"
    ]
    found = [build.split_of(item, by_pair) for item in pairs]
    assert found[::2] == found[1::2] and len(set(found)) == 2


@pytest.mark.parametrize("share, taker", [(0.01, "valid"), (0.99, "train")])
def test_no_split_is_empty_where_there_are_two_speakers(tmp_path, monkeypatch, share, taker, capsys):
    sounds = {f"{i}.wav": wave(i) for i in range(6)} | {"6.wav": wave(0)}  # the last is a duplicate
    for name, data in sounds.items():
        put(tmp_path / name, data)
    rows = [
        {"audio": name, "id": name, "text": "Hi there.", "speaker": f"s{i % 3}", "style": "normal"}
        for i, name in enumerate(sounds)
    ]
    put(tmp_path / "m.jsonl", lines(*rows))
    out, options = tmp_path / "few" / "1.0.0", build.Options(valid_share=share)
    with monkeypatch.context() as patched:  # stopped at its end, after the files were changed
        patched.setattr(tfds_files, "write_metadata", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build.build("manifest", tmp_path / "m.jsonl", out, options)
    counts = build.build("manifest", tmp_path / "m.jsonl", out, options)
    assert counts["records"][taker] == 2 and sum(counts["records"].values()) == 6 and counts["duplicate"] == 1
    found = records(out)
    split = {name: row["split"] for name, row in found.items()}
    assert len(found) == 6 and {split[n] == taker for n in split} == {True, False}
    [speaker] = {found[n]["speaker"] for n in split if split[n] == taker}
    assert {split[n] for n in split if found[n]["speaker"] == speaker} == {taker}
    told = f"speaker {speaker} is put into the split {taker}, which would be empty; with few speakers, --split-by"
    assert told in capsys.readouterr().out
    monkeypatch.setattr(build, "_move", None)  # and none is moved where that is not wanted
    counts = build.build(
        "manifest", tmp_path / "m.jsonl", tmp_path / "b" / "1.0.0", build.Options(valid_share=0)
    )
    assert counts["records"] == {"train": 6}


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_killed_build_goes_on_and_ends_like_one_that_was_not(tmp_path, monkeypatch, small_units):
    source = many(tmp_path / "mine")
    whole, halted = tmp_path / "a" / "many" / "1.0.0", tmp_path / "b" / "many" / "1.0.0"
    options = build.Options(valid_share=0.3)
    counts = build.build("manifest", source, whole, options)
    assert counts["left_out"] == counts["duplicate"] == 1 and sum(counts["records"].values()) == 39
    real, examined = data_check.examine, []

    def examine(item, rules):
        examined.append(item.id)
        if len(examined) == 25:
            raise KeyboardInterrupt
        return real(item, rules)

    with monkeypatch.context() as patched:
        patched.setattr(build.data_check, "examine", examine)
        with pytest.raises(KeyboardInterrupt):
            build.build("manifest", source, halted, options)
        assert not (halted / "dataset_info.json").exists()
        with pytest.raises(ValueError, match="begun with another source or other options"):
            build.build("manifest", source, halted, build.Options(valid_share=0.2))
        first = len(examined)
        put(halted / ".0123abcd.part.many-train.array_record-00000-of-00001", b"left by a kill")
        # and once more at the end, after the duplicate was taken out
        patched.setattr(tfds_files, "write_metadata", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build.build("manifest", source, halted, options)
        assert first < len(examined) < 40 + first  # shards that were whole are not read again
    assert build.build("manifest", source, halted, options) == counts
    assert not list(halted.glob(".*"))
    assert content(halted) == content(whole) and len(content(whole)) > 4
    assert (halted / data_check.BUILD_REPORT).read_text() == (whole / data_check.BUILD_REPORT).read_text()
    with pytest.raises(ValueError, match="is complete already"):
        build.build("manifest", source, halted, options)


def test_processes_and_workers_share_a_build(tmp_path, small_units):
    source = many(tmp_path / "mine")
    options = build.Options(valid_share=0.3)
    alone, shared = tmp_path / "a" / "many" / "1.0.0", tmp_path / "b" / "many" / "1.0.0"
    counts = build.build("manifest", source, alone, options)
    assert build.build("manifest", source, shared, options, "1/2") is None
    assert build.build("manifest", source, shared, options, "0/2", workers=2) is None
    assert build.build("manifest", source, shared, options) == counts
    assert content(shared) == content(alone)


def test_a_recording_that_was_replaced_while_a_build_was_stopped_is_read_again(tmp_path, small_units, capsys):
    source, out = tmp_path / "m.jsonl", tmp_path / "many" / "1.0.0"
    names = [f"{i}.wav" for i in range(24)]
    for i, name in enumerate(names):
        put(tmp_path / name, wave(i))
    put(
        source,
        lines(*({"audio": n, "id": n, "text": "Hi there.", "speaker": n, "style": "normal"} for n in names)),
    )
    assert build.build("manifest", source, out, build.Options(), "1/2") is None
    parts = [json.loads(path.read_text()) for path in (out / tfds_files.PARTS).glob("0*.json")]
    done = [path for part in parts for path in part["files"] if path.endswith(".wav")]
    assert 4 < len(done) < 20
    put(Path(done[0]), wave(1000))  # of the same length
    Path(done[1]).unlink()  # not needed any more
    capsys.readouterr()
    build.build("manifest", source, out, build.Options())
    assert capsys.readouterr().out.count(f"is made again: {done[0]} has changed") == 1
    found, expected = records(out), soundfile.read(io.BytesIO(wave(1000)), dtype="int16")[0]
    assert np.array_equal(found[Path(done[0]).name]["audio"], expected)


def test_a_source_of_another_layout_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for layout in build.LAYOUTS:
        assert (
            build.main(["build", layout, str(tmp_path / "empty"), "--out", str(tmp_path / "o" / "1.0.0")])
            == 2
        )
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path / "empty") in err
        assert not (tmp_path / "o").exists()
    put(
        tmp_path / "one" / "m.jsonl",
        lines({"audio": "x.wav", "text": "a", "speaker": "b", "style": "normal"}),
    )
    arguments = ["manifest", str(tmp_path / "one"), "--out"]
    assert build.main(["build", *arguments, str(tmp_path / "o" / "1.0.0")]) == 2
    assert "no utterance is fit" in capsys.readouterr().err
    assert build.main(["check", *arguments, str(tmp_path / "report.jsonl")]) == 1
    assert json.loads((tmp_path / "report.jsonl").read_text())["problem"] == "unreadable"
    for words in (
        ["--keep", "x"],
        ["--field", "text"],
        ["--field", "x=y"],
        ["--process", "2/2"],
        ["--rate", "8000"],
    ):
        assert build.main(["build", *arguments, str(tmp_path / "p" / "1.0.0"), *words]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_source_without_any_utterance_is_refused_in_one_sentence(tmp_path, capsys):
    put(tmp_path / "m.jsonl", "")
    for name in ("wav.scp", "text", "utt2spk"):
        put(tmp_path / "kaldi" / name, "")
    for layout, source in (("manifest", "m.jsonl"), ("kaldi", "kaldi")):
        for command, out in (("build", "o/1.0.0"), ("check", "r.jsonl")):
            assert build.main([command, layout, str(tmp_path / source), "--out", str(tmp_path / out)]) == 2
            err = capsys.readouterr().err
            assert "holds no utterance" in err and err.count("\n") == 1 and not (tmp_path / out).exists()


def test_the_loader_makes_batches_of_a_corpus_that_was_built(tmp_path):
    out = tmp_path / "many" / "1.0.0"
    build.build("manifest", many(tmp_path / "mine"), out, build.Options(valid_speakers=("s3",)))
    cfg = input_pipeline.Config("speaker", 4, (str(out),), num_samples=3200, style_weights=(1.0, 0.0))
    [batch] = input_pipeline.first_batches(cfg, 1)
    assert batch["wav"].shape == (4, 3200) and np.all(batch["lengths"] == 3200)
    assert "s3" not in input_pipeline.speakers(cfg)


def test_the_speech_tokenizer_trains_from_a_corpus_that_was_built_with_nothing_but_text(tmp_path):
    rows = [
        {"audio": f"{i}.wav", "id": f"u{i}", "text": text, "speaker": f"s{i}", "style": style}
        for i, (text, style) in enumerate([("Hi there.", "normal"), ("Sleep.", "asmr")] * 8)
    ]
    for i in range(len(rows)):
        put(tmp_path / "mine" / f"{i}.wav", wave(i, 0.5 + 0.02 * i))
    put(tmp_path / "mine" / "m.jsonl", lines(*rows))
    out = tmp_path / "corpus" / "1.0.0"
    build.build("manifest", tmp_path / "mine", out, build.Options(valid_speakers=("s3", "s4")))
    cfg = config.load(str(ROOT / "configs" / "tiny.py:speech_tokenizer_text"))
    data = dataclasses.replace(cfg.data, data_dirs=(str(out),))
    state = train.train(dataclasses.replace(cfg, data=data, steps=2, eval_batches=0), tmp_path / "run")
    assert int(state.step) == 2
    found = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [x["train/rows_used"] for x in found] == [1.0, 1.0]
    model, model_cfg = checkpoint.load_component(tmp_path / "run" / "export", "speech_tokenizer")
    assert model.head is None and not model_cfg.has_head


def test_the_measured_manifest_is_built_and_read(tmp_path, capsys):
    measure.make(tmp_path / "m", 250)
    out = tmp_path / "measured" / "1.0.0"
    counts = build.build("manifest", tmp_path / "m" / "all.jsonl", out, build.Options())
    assert counts["left_out"] == 0 and sum(counts["records"].values()) == 250  # every piece is another sound
    capsys.readouterr()
    measure.read(str(out))
    told, count = capsys.readouterr().out, counts["records"]["train"]
    assert f"records ({count} of {count})" in told and "rows of batches (" in told
    for stage in ("lm", "flow"):
        folder = tmp_path / stage / "1.0.0"
        measure.features(folder, stage, 200, shard=100)
        measure.read(str(folder))
        told = capsys.readouterr().out
        assert "reading records" not in told and "plan of an epoch" in told and "rows of batches (" in told
    with pytest.raises(ValueError, match="give 1 to 1198000"):
        measure.make(tmp_path / "m", 2_000_000)
