"""From a text and a wav to a wav, through the command's function and on more than one device."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model

import deepasmr_jax
from deepasmr_jax import audio, cli, sharding, synthesis


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


def test_the_six_lines_of_the_readme_work(tmp_path):
    speak = deepasmr_jax.load(tiny_model.shared())
    audio.save(tmp_path / "clip.wav", tiny_model.buzz(), tiny_model.RATE)
    result = speak("Good night.", tmp_path / "clip.wav", style="asmr")
    result.save(tmp_path / "out.wav")
    assert (tmp_path / "out.wav").exists() and result.sample_rate == 16000
    assert len(result.tokens) and result.timings and result.seed == 0


def test_a_mesh_of_two_devices_gives_the_same_speech_as_one():
    request = dict(text="Good night.", voice=tiny_model.buzz(), voice_rate=tiny_model.RATE, seed=2)
    sharding.make_mesh()
    one = tiny_model.synthesizer().batch([request, request | {"seed": 3}, request | {"seed": 4}])
    sharding.make_mesh(data=2)
    two = synthesis.load(tiny_model.shared()).batch([request, request | {"seed": 3}, request | {"seed": 4}])
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.audio, b.audio, atol=1e-4)
