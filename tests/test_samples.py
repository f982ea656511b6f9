"""Sounds and pictures of evaluations: which models make what, and that they reach TensorBoard."""

import dataclasses
import functools
from pathlib import Path

import fixture_data
import jax
import pytest
import tiny_model
from test_metrics import events

from deepasmr_jax import config, input_pipeline, samples, sharding, train

TINY = Path(__file__).parent.parent / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fixture_data.write(tmp_path_factory.mktemp("data"), {"train": 24, "valid": 12})


def tiny(folder, stage, **changes):
    cfg = config.load(f"{TINY}:{stage}")
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, data_dirs=(folder,)), **changes)


def made(cfg, listen_with=None):
    [batch] = input_pipeline.first_batches(cfg.data, 1)
    sampler = samples.Sampler(cfg.model, cfg.data, batch, listen_with, 0)
    model = jax.jit(functools.partial(train.init, cfg))(jax.random.key(0)).model
    return sampler(model), sampler(model)


@pytest.mark.parametrize(
    "stage, has_parts", [("vocoder", False), ("flow", False), ("flow", True), ("lm", True)]
)
def test_what_is_made_stands_beside_what_was_recorded_which_is_given_once(folder, stage, has_parts):
    first, second = made(tiny(folder, stage), str(tiny_model.shared()) if has_parts else None)
    assert sorted(s.name for s in first) == ["0/made", "0/recorded", "1/made", "1/recorded"]
    assert sorted(s.name for s in second) == ["0/made", "1/made"]
    for sample in first:
        assert sample.png[:4] == b"\x89PNG"
        assert (sample.wav is not None) == (has_parts or stage == "vocoder")
        assert sample.wav is None or sample.wav[:4] == b"RIFF" and sample.duration_s > 0
    again = {s.name: s for s in first}
    assert all(s == again[s.name] for s in second)  # the same draws every time


@pytest.mark.parametrize("stage", ["lm", "speaker"])
def test_a_model_that_cannot_be_heard_makes_nothing(folder, stage):
    assert made(tiny(folder, stage)) == ([], [])


def test_a_split_model_makes_samples_too(folder):
    sharding.make_mesh(1, 4, 2)
    first, _ = made(tiny(folder, "lm"), str(tiny_model.shared()))
    assert len(first) == 4


def test_a_run_writes_its_samples_and_numbers_for_tensorboard(folder, tmp_path):
    pytest.importorskip("tensorboardX")
    cfg = tiny(folder, "flow", steps=2, eval_every=1, tensorboard=True, listen_with=str(tiny_model.shared()))
    train.train(cfg, tmp_path)
    found = [(v.tag, e.step) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    assert {("sound/0/made", 1), ("sound/0/made", 2), ("picture/1/recorded", 1), ("eval/loss", 2)} <= set(
        found
    )
    assert ("picture/1/recorded", 2) not in found


def test_a_folder_that_cannot_make_it_heard_is_refused(folder):
    with pytest.raises(ValueError, match="nowhere is no model folder"):
        made(tiny(folder, "flow"), "nowhere")
    cfg = config.override(tiny(folder, "flow"), "data.mel_profile=cv2")
    with pytest.raises(ValueError, match="has the mel profile 'mini', not 'cv2'"):
        samples.Sampler(cfg.model, cfg.data, {"x": []}, str(tiny_model.shared()), 0)
