"""The `deepasmr` command: what it makes, and how it refuses."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model

from deepasmr_jax import (
    audio,
    checkpoint,
    cli,
    demo,
    evaluate,
    pool,
    pool_building,
    recognizer,
    text,
    weight_files,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A good clip of 2 s."""
    path = tmp_path_factory.mktemp("clips") / "clip.wav"
    audio.save(path, tiny_model.buzz(), tiny_model.RATE)
    return path


def run(*arguments):
    """Exit code of `deepasmr` with these arguments."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as e:  # argparse
        return e.code


def say(tmp_path, clip, *options, text="Good night.", out="out.wav", model=None):
    """(exit code, path of the output) of `deepasmr say`."""
    path, model = tmp_path / out, model or tiny_model.shared()
    return run("say", text, "--voice", clip, "--out", path, "--model", model, *options), path


def check_refused(code, path, capsys, words):
    """Exit code 2, one sentence on stderr with these words, nothing on stdout, no file left."""
    out, err = capsys.readouterr()
    assert code == 2
    assert out == "" and err.startswith("deepasmr: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    assert not path.exists() and (not path.parent.is_dir() or not list(path.parent.glob(f"*{path.stem}*")))


@pytest.mark.parametrize(
    ("options", "text", "words"),
    [
        ([], "", ["empty"]),
        ([], "?!...", ["punctuation"]),
        ([], "x" * 20_000, ["20,000", "split"]),
        ([], "こんばんは", ["Japanese", "English"]),
        (["--style", "loud"], "Hi.", ["'loud'", "asmr"]),
        (["--voice-style", "loud"], "Hi.", ["'loud'"]),
        (["--language", "tlh"], "Hi.", ["'tlh'", "en or zh"]),
        (["--seed", "x1"], "Hi.", ["'x1'", "whole number"]),
        (["--refine", "4"], "Hi.", ["'4'", "3"]),
        (["--pool", "/nowhere/p.safetensors"], "Hi.", ["/nowhere/p.safetensors"]),
        (["--pool-strategy", "nobody"], "Hi.", ["'nobody'", "nearest", "none"]),
        (["--pool-strategy", "self"], "Hi.", ["the clip is normal and asmr is wanted"]),
        (["--colour", "red"], "Hi.", ["--colour", "--help"]),
    ],
)
def test_a_bad_option_gives_one_sentence_and_code_2(tmp_path, clip, capsys, options, text, words):
    code, path = say(tmp_path, clip, *options, text=text)
    check_refused(code, path, capsys, words)


def bad_clips(folder):
    """name -> (samples, words of the message)."""
    wav = tiny_model.buzz()
    with_nan = wav.copy()
    with_nan[100] = np.nan
    return {
        "short": (wav[:3200], ["0.2"]),
        "silent": (np.zeros(32000, np.float32), ["silent"]),
        "nan": (with_nan, ["NaN"]),
    }


@pytest.mark.parametrize("name", ["missing", "empty", "text", "folder", "short", "silent", "nan"])
def test_a_bad_clip_gives_one_sentence_and_code_2(tmp_path, capsys, name):
    import soundfile

    folder = tmp_path / "clips"
    folder.mkdir()
    path, words = folder / f"{name}.wav", [f"{name}.wav"]
    if name == "empty":
        path.touch()
    elif name == "text":
        path.write_text("this is not audio at all, only words")
    elif name == "folder":
        path.mkdir()
    elif name != "missing":
        samples, words = bad_clips(folder)[name]
        soundfile.write(path, samples, tiny_model.RATE, subtype="FLOAT")
    code, out = say(tmp_path, path)
    check_refused(code, out, capsys, words)


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, clip, capsys):
    (tmp_path / "file").write_text("")
    code, path = say(tmp_path, clip, out="file/out.wav", model=tmp_path / "no_model")
    out, err = capsys.readouterr()
    assert code == 2 and "cannot write in the folder" in err and err.count("\n") == 1 and out == ""


def test_an_unknown_model_is_named(tmp_path, clip, capsys):
    code, path = say(tmp_path, clip, model=tmp_path / "no_model")
    check_refused(code, path, capsys, ["no_model", "config.json"])


@pytest.mark.parametrize("name", ["config.json", "lm.safetensors", "pool.safetensors", "speaker.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_model_file_is_named(tmp_path, clip, capsys, name, damage):
    model = tmp_path / "model"
    shutil.copytree(tiny_model.shared(), model)
    if damage == "cut":
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: len(data) // 2])
    else:
        (model / name).unlink()
    code, path = say(tmp_path / "out", clip, model=model)
    words = ["no asmr entries", "pool"] if (name, damage) == ("pool.safetensors", "gone") else [name]
    check_refused(code, path, capsys, words)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_that_the_package_brings_along_is_named(tmp_path, clip, capsys, monkeypatch, damage):
    data = bytearray(text.LEXICON.read_bytes())
    data[len(data) // 2] ^= 16
    lexicon = tmp_path / "package" / text.LEXICON.name
    lexicon.parent.mkdir()
    if damage != "gone":
        lexicon.write_bytes(data if damage == "flipped" else data[:-9])
    monkeypatch.setattr(text, "LEXICON", lexicon)
    text.lexicon.cache_clear()
    code, path = say(tmp_path / "out", clip)
    check_refused(code, path, capsys, [str(lexicon), "missing" if damage == "gone" else "damaged", "again"])


@pytest.mark.parametrize(
    "content", ['{"voices": [{', "{}", '{"voices": [{"language": "en", "voice": "v", "clips": []}]}']
)
def test_a_damaged_list_of_demo_clips_is_named(tmp_path, capsys, content):
    shutil.copytree(tiny_model.shared(), tmp_path / "model")
    (tmp_path / "model" / "demo" / "demo.json").write_text(content)
    code = run("demo", "--out", tmp_path / "made", "--model", tmp_path / "model")
    check_refused(code, tmp_path / "made", capsys, ["demo.json is damaged", "again"])


def test_bad_arguments_are_refused_without_importing_jax(tmp_path, clip):
    code = (
        "import sys; from deepasmr_jax import cli; "
        f"code = cli.main(['say', 'Hi.', '--voice', {str(clip)!r}, "
        f"'--out', {str(tmp_path / 'o.wav')!r}, '--seed', 'x']); "
        "print(code, [m for m in ('jax', 'soundfile', 'librosa') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert out.stdout.strip() == "2 []" and "'x'" in out.stderr


ROW = {"text": "Good night.", "language": "en", "file": "one.wav"}
ENTRY = {"audio": "one.wav", "text": "Good night.", "style": "normal"}


@pytest.mark.parametrize(
    ("command", "content", "words"),
    [
        ("batch LIST --out OUT --model MODEL", None, ["no list", "list.jsonl"]),
        ("batch LIST --out OUT --model MODEL", "\n", ["list.jsonl is empty"]),
        ("batch LIST --out OUT --model MODEL", '{"text": "Hi."}\n{"text', ["line 2", "list.jsonl", "correct"]),
        ("batch LIST --out OUT --model MODEL", b"\xff\xfe{", ["list.jsonl", "UTF-8", "line 1, byte 0"]),
        ("batch LIST --out OUT --model MODEL", '["text"]', ["line 1", "not a JSON object (it is an array)"]),
        ("pool build LIST --out OUT.safetensors --model MODEL", b"\xff{", ["list.jsonl", "UTF-8"]),
        ("batch LIST --out OUT --model nowhere", '{"text": "Hi."}', ["nowhere", "config.json"]),
        ("demo --out OUT --seed x --model MODEL", None, ["'x'", "whole number"]),
        ("demo --out OUT --model BARE", None, ["brings no demo clips", "deepasmr say"]),
        ("evaluate OUT", None, ["no results.jsonl", "batch"]),
        ("evaluate FOLDER", "5\n", ["results.jsonl line 1", "not a JSON object", "batch"]),
        ("evaluate FOLDER", json.dumps(ROW) + '\n{"text": "Go', ["results.jsonl line 2", "Unterminated", "batch"]),
        ("evaluate FOLDER", json.dumps(ROW | {"text": 5}), ["results.jsonl line 1", "lacks text"]),
        ("evaluate FOLDER --speaker MODEL", json.dumps(ROW), ["no judge of speaker similarity, only", "wavlm"]),
        ("evaluate FOLDER --mandarin MODEL", json.dumps(ROW), ["no component 'recognizer'"]),
        ("evaluate FOLDER --speaker OUT", json.dumps(ROW), ["OUT is no model folder"]),
        ("pool build nowhere --out OUT.safetensors --model MODEL", None, ["nowhere", "does not exist"]),
        ("pool build LIST --out OUT.txt --model MODEL", json.dumps(ENTRY), ["OUT.txt", ".safetensors"]),
        ("pool build LIST", json.dumps(ENTRY), ["built-in model", "--out"]),
        ("pool build LIST --out OUT.safetensors --seed x --model MODEL", json.dumps(ENTRY), ["'x'"]),
        ("pool build LIST --out OUT.safetensors --model MODEL", json.dumps(ENTRY | {"text": 5}), ["line 1", "text 5"]),
        ("pool build LIST --out OUT.safetensors --model MODEL", json.dumps(ENTRY | {"name": [1]}), ["name [1]"]),
        ("pool add LIST --to OUT.safetensors --model MODEL", json.dumps(ENTRY), ["no pool file", "pool build SOURCE"]),
        ("pool list --pool LIST", "A text that is no pool.", ["list.jsonl is no pool file", "pool build"]),
        ("pool add LIST --to POOL --model MODEL", json.dumps(ENTRY), ["mel profile 'cv2'", "the model 'mini'"]),
        ("pool list --pool OUT.safetensors", None, ["no pool file", "OUT.safetensors"]),
        ("pool list --model nowhere", None, ["nowhere", "config.json"]),
        ("info --model nowhere", None, ["nowhere", "config.json"]),
    ],
)  # fmt: skip
def test_every_command_refuses_in_one_sentence_with_code_2_and_leaves_nothing(
    tmp_path, clip, capsys, monkeypatch, command, content, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluate.judges, "MatrixJudge", lambda: None
    )  # no note where pocketsphinx is not installed
    shutil.copy(clip, "one.wav")
    if content is not None:
        for name in ("list.jsonl", "results.jsonl"):
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "BARE" in command:
        shutil.copytree(tiny_model.shared(), "bare", ignore=shutil.ignore_patterns("demo"))
    if "POOL" in command:
        dataclasses.replace(tiny_model.make_pool(), mel_profile="cv2").save("pool.safetensors")
    before = sorted(tmp_path.rglob("*"))
    places = {"LIST": "list.jsonl", "OUT": "new/OUT", "MODEL": tiny_model.shared(), "BARE": "bare",
              "POOL": "pool.safetensors", "FOLDER": tmp_path}  # fmt: skip
    for name, place in places.items():
        command = command.replace(name, str(place), 1)
    code = run(*command.split())
    check_refused(code, tmp_path / "new" / "OUT", capsys, words)
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_prints_the_report_and_says_how_many_requests_are_not_in_it(tmp_path, clip, capsys):
    shutil.copy(clip, tmp_path / "one.wav")
    (tmp_path / "results.jsonl").write_text(json.dumps(ROW) + "\n")
    assert run("evaluate", tmp_path) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 0
    (tmp_path / "failures.jsonl").write_text('{"error": "a"}\n{"error": "b"}\n')
    assert run("evaluate", tmp_path) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["failed"] == 2 and report["groups"]["all"]["clips"] == 1
    assert json.loads((tmp_path / "evaluation.json").read_text("utf-8")) == report
    assert "note: 2 requests of the folder failed and are not counted: see failures.jsonl" in err
    (tmp_path / "failures.jsonl").write_text('{"error": "a"}\n')
    assert run("evaluate", tmp_path) == 0
    assert "note: 1 request of the folder failed and is not counted: see" in capsys.readouterr().err


def test_evaluate_hears_mandarin_with_the_judge_that_is_given(tmp_path, clip, capsys):
    pytest.importorskip("pypinyin")
    cfg = recognizer.Config(width=16, num_heads=2, num_layers=1, mlp_width=16, kernel=3)
    checkpoint.export_component(
        tmp_path / "judge", "recognizer", recognizer.init(cfg, jax.random.key(0)), cfg
    )
    shutil.copy(clip, tmp_path / "one.wav")
    row = ROW | {"text": "晚安。", "language": "zh"}
    (tmp_path / "results.jsonl").write_text(json.dumps(row))
    assert run("evaluate", tmp_path, "--mandarin", tmp_path / "judge") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["groups"]["all"]["mandarin_ser"]["rate"] > 0 and "mandarin" in report["settings"]["judges"]


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path, clip, capsys):
    (tmp_path / "out.png").mkdir()
    code, path = say(tmp_path, clip, "--plot", model=tmp_path / "no_model")
    assert code == 2 and "out.png is a folder" in capsys.readouterr().err and not path.exists()


def test_say_writes_the_wav_the_picture_and_the_facts(tmp_path, clip, capsys):
    code, path = say(tmp_path, clip, "--plot", "--json", "--show-text", "--seed", "5")
    out, err = capsys.readouterr()
    assert code == 0
    facts = json.loads(out.splitlines()[-1])
    wav = audio.load(path, tiny_model.RATE)
    assert facts["task"] == "N2A" and facts["seed"] == 5 and facts["duration_s"] == len(wav) / tiny_model.RATE
    assert "good night" in out.splitlines()[0].lower() and "AY" in out.splitlines()[1]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"out.wav", "out.png"}


def test_batch_speaks_a_list_and_keeps_what_failed_apart(tmp_path, clip, capsys):
    rows = [{"text": "Good night.", "voice": str(clip), "group": "first", "pool_strategy": "none"}]
    rows += [{"text": "", "voice": str(clip)}]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    out = tmp_path / "made"
    model = tiny_model.shared()
    assert run("batch", tmp_path / "list.jsonl", "--out", out, "--model", model) == 1
    made = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert (len(made), made[0]["group"], made[0]["prompt"]) == (1, "first", "none")
    assert (out / made[0]["file"]).exists()
    assert len(failed) == 1 and "empty" in failed[0]["error"]
    assert "1 made, 1 failed" in capsys.readouterr().out
    (tmp_path / "list.jsonl").write_text(json.dumps(rows[0]))
    assert run("batch", tmp_path / "list.jsonl", "--out", out, "--model", model) == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "say",
            [
                "in the paper stronger",
                "built-in model less likeness",
                "whole number",
                "built-in pool has none",
            ],
        ),
        ("demo", ["--seed SEED a whole number; another seed gives another reading"]),
        ("batch", ["exit code 1 if one failed"]),
        ("evaluate", ["folder the folder, with results.jsonl"]),
        ("pool build", ["--seed SEED a whole number; another seed gives another reading"]),
    ],
)
def test_the_help_of_a_command_says_what_its_options_do(capsys, command, words):
    assert run(*command.split(), "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [w for w in words if w not in text] == []


def test_the_demo_prints_a_note_in_its_table_and_shows_it_on_its_page(tmp_path, capsys, monkeypatch):
    sound = demo.Sound(
        "a", "voice", "N2A", "made", "Hi.", "en", tiny_model.hiss(0.5), False, notes=("was cut",)
    )
    monkeypatch.setattr(demo, "make", lambda *_: [dataclasses.replace(sound, notes=()), sound])
    assert run("demo", "--out", tmp_path / "d", "--model", tiny_model.shared(), "--no-judge") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("note") and table[1].endswith("–") and table[2].endswith("was cut")
    assert "Note: was cut" in (html := (tmp_path / "d" / "index.html").read_text("utf-8"))
    assert "road to full size" not in html
    monkeypatch.setattr(cli.request, "BUILT_IN", tiny_model.shared())  # of the built-in model it is said
    assert run("demo", "--out", tmp_path / "d", "--no-judge") == 0
    assert "The road to full size: README.md" in capsys.readouterr().out
    html = (tmp_path / "d" / "index.html").read_text("utf-8")
    assert '<a href="#road">' in html and "deepasmr convert cosyvoice2" in html


def test_demo_writes_a_page_wavs_and_pictures_for_all_four_tasks_in_both_languages(tmp_path, capsys):
    code = cli.main(["demo", "--out", str(tmp_path / "d"), "--model", str(tiny_model.shared()), "--no-judge"])
    out, _ = capsys.readouterr()
    assert code == 0
    names = {p.name for p in (tmp_path / "d").iterdir()}
    for language in ("en1", "zh2"):
        for task in ("n2a", "a2n", "n2n", "a2a"):
            assert {f"{language}_{task}_1.wav", f"{language}_{task}_1.png"} <= names
    html = (tmp_path / "d" / "index.html").read_text("utf-8")
    assert html.count("<audio") == 12
    for where in (html, out):  # what is said of the built-in model is not said of another
        assert "training data: none: random weights for tests." in where and "synthetic speech" not in where
    assert "index.html" in out and all(task in out for task in ("N2A", "A2N", "N2N", "A2A"))


def test_a_pool_is_built_extended_and_listed(tmp_path, capsys, monkeypatch):
    for name, wav in (("one", tiny_model.buzz()), ("two", tiny_model.buzz(f0_hz=210.0))):
        (tmp_path / "voices").mkdir(exist_ok=True)
        audio.save(tmp_path / "voices" / f"{name}.wav", wav, tiny_model.RATE)
        (tmp_path / "voices" / f"{name}.txt").write_text("Good night.")
    audio.save(tmp_path / "sample.wav", tiny_model.hiss(), tiny_model.RATE)
    (tmp_path / "sample.txt").write_text("Sleep well.")
    model, target = tmp_path / "model", tmp_path / "model" / "pool.safetensors"
    shutil.copytree(tiny_model.shared(), model)
    target.write_bytes(b"of another speaker encoder")  # is replaced, not read
    build = ("pool", "build", "--normal", tmp_path / "voices", "--model", model, "--licence", "CC BY 4.0")
    assert run(*build, "--asmr", tmp_path / "sample.wav") == 0 and str(target) in capsys.readouterr().out
    assert sorted(p.name for p in model.iterdir()) == sorted(p.name for p in tiny_model.shared().iterdir())
    made = pool.load(target)
    assert [(e.name, e.style) for e in made] == [
        ("one", "normal"),
        ("two", "normal"),
        ("one_asmr", "asmr"),
        ("two_asmr", "asmr"),
    ]
    first, _, third, _ = (e.provenance for e in made)
    assert (first["kind"], first["source"], first["licence"]) == ("recording", "one.wav", "CC BY 4.0")
    assert first["sha256"] == weight_files.sha256(tmp_path / "voices" / "one.wav")
    assert (third["task_prompt"], third["voice"], third["licence"]) == ("sample", "one", "CC BY 4.0")
    assert third["task_prompt_from"]["sha256"] == weight_files.sha256(tmp_path / "sample.wav")
    config = json.loads((model / "config.json").read_text())
    assert config["provenance"]["pool"] == {"entries": 4, "recordings": 2, "licence": "CC BY 4.0"}
    assert config["licence"] == "CC BY 4.0"
    (tmp_path / "more").mkdir()
    shutil.move(tmp_path / "sample.wav", tmp_path / "more")
    shutil.move(tmp_path / "sample.txt", tmp_path / "more")
    add = ("pool", "add", tmp_path / "more", "--to", target, "--style", "asmr", "--model", model)
    before = {p: p.read_bytes() for p in model.iterdir() if p.is_file()}
    with monkeypatch.context() as patch:

        def fail(path, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="No space left"):
            pool_building.keep(model, made)
    assert before == {p: p.read_bytes() for p in model.iterdir() if p.is_file()}
    assert run(*add) == 0
    capsys.readouterr()
    assert run("info", model) == 0
    out = capsys.readouterr().out
    assert "licence: CC BY 4.0 (the strictest of its parts: pool)" in out and '"licence_not_stated": 1' in out
    assert run("doctor", model) == 0 and "5 entries" in capsys.readouterr().out
    assert cli.main(["pool", "list", "--json", "--model", str(model)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["name"] for r in rows] == ["one", "two", "one_asmr", "two_asmr", "sample"]
    assert [r["kind"] for r in rows] == ["recording", "recording", "synthesis", "synthesis", "recording"]
    assert [r["licence"] for r in rows] == [*["CC BY 4.0"] * 4, "not stated"]


def test_info_lists_the_components(capsys):
    assert cli.main(["info", "--model", str(tiny_model.shared())]) == 0
    out = capsys.readouterr().out
    assert all(
        name in out for name in ("speech_tokenizer", "lm", "flow", "vocoder", "speaker", "random weights")
    )


def test_info_reads_a_folder_that_holds_one_component_only(tmp_path, capsys):
    entry = {"module": "lm", "config": {}, "file": "lm.safetensors", "sha256": "", "dtype": "float32"}
    config = {"format": 1, "name": "lonely", "components": {"lm": entry | {"num_params": 5}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["info", "--model", str(tmp_path)]) == 0
    assert f"lonely in {tmp_path}\n" in capsys.readouterr().out  # of no mel
    config["components"] = {"vocoder": entry | {"num_params": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["info", "--model", str(tmp_path)]) == 0
    assert f"lonely in {tmp_path}: ? Hz, mel profile ?" in (out := capsys.readouterr().out)
    assert "languages" not in out


def test_a_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m deepasmr_jax.cli pool list | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("name") and "pipe" not in done.stderr.lower(), done.stderr
