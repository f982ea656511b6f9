"""The demonstration: what it needs, and that a fault names its sound."""

import dataclasses

import numpy as np
import pytest
import tiny_model

from deepasmr_jax import demo, results, synthesis


@pytest.fixture
def maker(monkeypatch):
    """A synthesizer of the tiny folder whose `batch` gives noise at once, and whose clips all sound alike."""
    made = object.__new__(synthesis.Synthesizer)
    made.folder, made.sample_rate = tiny_model.shared(), tiny_model.RATE

    def speak(self, requests, progress=None):
        facts = {"task": "N2A", "language": "en", "prompt": "p", "prompt_similarity": 1.0, "notes": ()}
        wav, none = tiny_model.hiss(0.6), np.zeros(0)
        return [
            results.Result(wav, tiny_model.RATE, none, none, request=r, timings={}, **facts) for r in requests
        ]

    def hear(self, voice, voice_rate=None, **_):
        return synthesis.Clip(np.zeros(0), np.zeros((0, 80)), np.ones(3), "normal")

    monkeypatch.setattr(synthesis.Synthesizer, "batch", speak)
    monkeypatch.setattr(synthesis.Synthesizer, "read_clip", hear)
    return made


def test_each_voice_gives_its_two_clips_and_all_four_tasks(maker):
    sounds = demo.make(maker, seed=3)
    assert [s.name for s in sounds if s.is_clip] == [
        "en1_clip_normal", "en1_clip_asmr", "zh2_clip_normal", "zh2_clip_asmr",
    ]  # fmt: skip
    made = [s for s in sounds if not s.is_clip]
    assert [s.name for s in made if s.voice == "test voice en"] == [
        "en1_n2a_1", "en1_a2n_1", "en1_n2n_1", "en1_a2a_1",
    ]  # fmt: skip
    assert len(made) == 8 and all(s.similarity == pytest.approx(1) for s in made)
    assert made[0].caption == "from the normal clip to whispered speech"


def test_the_notes_of_a_request_stay_with_its_sound(maker, monkeypatch):
    speak = synthesis.Synthesizer.batch

    def note_second(self, requests, progress=None):
        spoken = speak(self, requests)
        spoken[1] = dataclasses.replace(spoken[1], notes=("the clip was cut",))
        return spoken

    monkeypatch.setattr(synthesis.Synthesizer, "batch", note_second)
    assert {s.name: s.notes for s in demo.make(maker) if s.notes} == {"en1_a2n_1": ("the clip was cut",)}


def test_a_model_without_demo_clips_is_refused_with_the_way_out(maker, tmp_path):
    maker.folder = tmp_path
    with pytest.raises(ValueError, match="brings no demo clips .*demo.json is missing.*use `deepasmr say`"):
        demo.make(maker)


def test_a_request_that_fails_and_a_sound_that_cannot_be_compared_are_named(maker, monkeypatch):
    speak = synthesis.Synthesizer.batch

    def fail_third(self, requests, progress=None):
        spoken = speak(self, requests)
        spoken[2] = results.Failure(requests[2], "the language model gave no speech; try another seed")
        return spoken

    def too_short(self, voice, voice_rate=None, **_):
        raise ValueError("the clip lasts 0.2 s")

    with monkeypatch.context() as m, pytest.raises(ValueError, match="^en1_n2n_1: the language model gave"):
        m.setattr(synthesis.Synthesizer, "batch", fail_third)
        demo.make(maker)
    monkeypatch.setattr(synthesis.Synthesizer, "read_clip", too_short)
    with pytest.raises(ValueError, match="^en1_n2a_1: the clip lasts 0.2 s$"):
        demo.make(maker)
