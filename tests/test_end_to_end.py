"""From a text and a wav to a wav, through the command's function and on more than one device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from deepasmr_jax import audio, cli, evaluate, sharding, synthesis

ROOT = Path(__file__).parent.parent


def test_a_text_and_a_wav_become_a_wav_of_the_expected_length_finite_and_not_silent(tmp_path, capsys):
    audio.save(tmp_path / "clip.wav", tiny_model.buzz(), tiny_model.RATE)
    out = tmp_path / "out.wav"
    arguments = [
        "--voice",
        str(tmp_path / "clip.wav"),
        "--out",
        str(out),
        "--model",
        str(tiny_model.shared()),
    ]
    assert cli.main(["say", "Good night. 晚安。", *arguments, "--language", "en", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    wav = audio.load(out, tiny_model.RATE)  # refuses silence and numbers that are not finite
    assert len(wav) == facts["duration_s"] * tiny_model.RATE and len(wav) % 640 == 0


def test_the_installed_command_starts():
    command = Path(sys.executable).with_name("deepasmr")
    if not command.exists():
        pytest.skip(f"the package is not installed beside {sys.executable}")
    found = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "usage: deepasmr" in found.stdout and "evaluate" in found.stdout


def test_the_six_lines_of_the_readme_work(tmp_path, monkeypatch):
    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL).group(1)
    assert len([line for line in source.splitlines() if line]) <= 6
    monkeypatch.setattr("deepasmr_jax.request.BUILT_IN", tiny_model.shared())
    monkeypatch.chdir(tmp_path)
    audio.save("clip.wav", tiny_model.buzz(), tiny_model.RATE)
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    result = names["result"]
    assert len(audio.load("out.wav", tiny_model.RATE)) == len(result.audio)
    # what the comments promise: fields, and a player and a picture in a notebook
    promised = re.search(r"also: (.*)", source).group(1).replace("result", "").split(", ")
    assert ".timings" in promised and all(getattr(result, p[1:]) is not None for p in promised)
    shown = result._repr_html_()
    assert result.request.style == "asmr" and "<audio" in shown and "<img" in shown


def test_the_built_in_model_as_users_compile_it_says_the_words_in_the_wanted_style(tmp_path):
    """In a process without the flags that make compilation short in the other tests."""
    pytest.importorskip("pocketsphinx")
    text = "Lucy wants seven green chairs."
    program = (
        "import sys; from jax import monitoring; from deepasmr_jax import programs, request, synthesis\n"
        "read = []\n"
        "note = lambda event, *_, **__: read.append(event) if event == programs.READ_EVENT else None\n"
        "monitoring.register_event_duration_secs_listener(note)\n"
        "voice = request.BUILT_IN / 'demo' / 'en_normal.wav'\n"
        "same = dict(text=sys.argv[1], voice=voice, voice_style='normal')\n"
        "for result in synthesis.load().batch([same | {'style': x} for x in ('asmr', 'normal')]):\n"
        "    result.save(result.task + '.wav')\n"
        "print(len(read))\n"
    )
    environment = {k: x for k, x in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"PYTHONPATH": str(ROOT), "DEEPASMR_CACHE": str(tmp_path / "cache")}
    sounds, counts = [], []
    for _ in range(2):  # the second process reads all programs that the first one has made, and says the same
        done = subprocess.run(
            [sys.executable, "-c", program, text],
            cwd=tmp_path,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        counts.append(int(done.stdout))
        sounds.append([(tmp_path / f"{task}.wav").read_bytes() for task in ("N2A", "N2N")])
    assert counts == [0, len(list((tmp_path / "cache" / "programs").glob("*/*")))] and counts[1] > 5
    assert sounds[0] == sounds[1]
    found = {}
    for task in ("N2A", "N2N"):
        wav = audio.load(tmp_path / f"{task}.wav", tiny_model.RATE)
        unvoiced, found[task] = evaluate.judge_one(wav, tiny_model.RATE, text, "en")
        assert unvoiced >= 0.9 if task == "N2A" else unvoiced < 0.5
    assert max(found.values()) <= 0.4, found  # two words of five; guessing gets 4.5 wrong


def test_a_mesh_of_two_devices_gives_the_same_speech_as_one():
    request = dict(text="Good night.", voice=tiny_model.buzz(), voice_rate=tiny_model.RATE, seed=2)
    sharding.make_mesh()
    one = tiny_model.synthesizer().batch([request, request | {"seed": 3}, request | {"seed": 4}])
    sharding.make_mesh(data=2)
    two = synthesis.load(tiny_model.shared()).batch([request, request | {"seed": 3}, request | {"seed": 4}])
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.audio, b.audio, atol=1e-4)
