"""What launch/bench.py computes from sizes and times, and what it refuses; nothing is compiled or timed here."""

import argparse
from pathlib import Path

import fixture_data
import numpy as np
import pytest

from deepasmr_jax import config, flow, lm, sharding, vocoder


@pytest.fixture(scope="module")
def bench():
    return fixture_data.script("launch/bench.py")


def test_a_ratio_is_taken_round_by_round_with_the_fastest_side_of_pytorch(bench):
    assert bench.summary([3.0, 1.0, 2.0]) == (2.0, "1 to 3")
    seconds = {"torch fp32": [8, 8, 8], "torch bf16": [2, 4, 3], "JAX fp32": [1, 1, 3], "JAX bf16": [4, 4, 4]}
    rows = bench.beside_best(seconds)
    assert rows[0] == ("torch fp32", 8.0, "8 to 8", "", "")
    assert rows[2] == ("JAX fp32", 1.0, "1 to 3", 2.0, "1 to 4")  # 2 / 1, 4 / 1, 3 / 3
    assert rows[3][3:] == (0.75, "0.5 to 1")
    assert bench.beside_best({"JAX fp32": [1.0]}) == [("JAX fp32", 1.0, "1 to 1", "", "")]


def test_the_work_of_a_row_follows_from_the_sizes(bench):
    cfg = lm.cosyvoice2(text_vocab=1024)
    first, one, eight = bench.phases("lm", cfg).values()
    values = first[0][1]  # weights of the layers and of the speech head, without norms and biases
    assert 0 <= 505_803_812 - 151_936 * 896 - 6564 * 896 - values < 1e6
    [flops, _, times], [step_flops, step_values, steps] = one
    assert (times, steps, step_values) == (1, bench.NUM_NEW - 1, values)
    assert 2 * values < step_flops < 2.1 * values
    assert [eight[i][0] / one[i][0] for i in (0, 1)] == [8, 8] and eight[1][1:] == one[1][1:]
    assert flops == first[0][0] and first[1][2] == 0

    [[flops, values, _]] = bench.phases("flow", flow.deepasmr())["flow, guided step, 500 frames"]
    assert 0.95 < values / 336_936_016 < 1 and flops > 2 * 2 * values * bench.FLOW_FRAMES
    [[flops, *_]] = bench.phases("hifigan", vocoder.v1())["HiFi-GAN, 5 s"]
    assert 250e9 < flops < 300e9  # docs/speed.md: 1.25 s at 211 GFLOP/s
    assert bench.phases("vocoder", None) == {}


def test_each_row_beside_pytorch_has_a_row_beside_the_ceilings(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ceilings", lambda: ({"fp32": 1e9, "bf16": 2e9}, 1e9))
    args = argparse.Namespace(size="tiny", out=str(tmp_path / "speed.md"), dtypes=list(bench.DTYPES))
    parts = ["lm", "hifigan", "vocoder", "speech_tokenizer", "flow"]
    rows = [
        (name, f"JAX {k}", 2.0, "", "")
        for names in bench.ROWS.values()
        for name in names
        for k in bench.DTYPES
    ]
    bench.beside_ceilings(bench.Bench(args), parts, rows)
    report = Path(args.out).read_text()  # written without being asked
    assert all(report.count(f"| {name} | JAX") == 2 for names in bench.ROWS.values() for name in names)
    for part in bench.ROWS:
        assert list(bench.phases(part, bench.model_config(part, "mini"))) == bench.ROWS[part]
    with pytest.raises(ValueError, match="no row 'LM prefill 150' of JAX fp32"):
        bench.beside_ceilings(bench.Bench(args), parts, rows[1:])


def test_a_batch_of_a_training_step_fills_its_rows(bench):
    for stage in ("lm", "flow"):
        cfg = config.load(f"{bench.ROOT}/configs/tiny.py:{stage}")
        batch, shape = bench.step_batch(cfg), (cfg.data.batch_size, cfg.data.num_tokens)
        assert all(len(x) == shape[0] and x.dtype in (np.int32, np.float16) for x in batch.values())
        if stage == "lm":
            kinds, targets = batch["kinds"], batch["targets"]
            assert [(kinds == k).any(1).all() for k in (lm.SOS, lm.TEXT, lm.TASK, lm.SPEECH)] == [True] * 4
            assert batch["tokens"][kinds == lm.TEXT].max() < cfg.model.text_vocab
            # from the task marker on each place is to give the code after it
            at = (kinds == lm.SPEECH)[:, 1:-1]
            np.testing.assert_array_equal(targets[:, 1:-1][at], batch["tokens"][:, 2:][at])
            assert ((targets >= 0) == np.isin(kinds, (lm.TASK, lm.SPEECH))).all()
        else:
            frames = flow.num_frames(cfg.model, shape[1])
            assert batch["mel"].shape == (shape[0], frames, cfg.model.mel_bins)
            assert (batch["num_tokens"] == shape[1]).all() and (batch["prompt_frames"] == frames // 4).all()


def test_tracing_belongs_to_the_next_compilation_and_counts_once(bench):
    spans = [(0.5, 1.0, False, ""), (0.0, 2.0, False, ""), (2.0, 5.0, True, "a"), (5.0, 6.0, False, "")]
    spans += [(6.0, 8.0, True, "b"), (8.0, 9.0, True, "a")]
    assert bench.by_program(spans) == {"a": [2.0, 4.0], "b": [1.0, 2.0]}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--stages", "flwo"], "invalid choice: 'flwo'"),
        (["--only", "step", "--stages", "vocoder"], "step at size mini has no stage vocoder"),
        (
            ["--only", "loader", "--size", "full", "--stages", "speaker"],
            "loader at size full has no stage speaker",
        ),
        (["--rows", "0"], "0 is below 1"),
        (["--rounds", "x"], "invalid int value: 'x'"),
    ],
)
def test_what_would_measure_nothing_is_refused(bench, capsys, options, words):
    with pytest.raises(SystemExit) as end:
        bench.main(options)
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_the_clip_of_the_built_in_demo_is_there(bench):
    clip, sentence = bench.built_in_clip()
    assert Path(clip).is_file() and sentence


def test_the_three_ways_of_a_product_are_one_product(bench, monkeypatch):
    """Each way is run on equal weights, whose product is known: side and layout change the time alone."""
    values = []

    def seconds(function, x, weights, times):
        ones = [np.full(w.shape, 1 / w.size, np.float32) for w in weights]
        values.append(float(function(np.ones(x.shape, np.float32), ones)))
        return float(len(values))

    monkeypatch.setattr(bench, "median_seconds", seconds)
    monkeypatch.setattr(bench, "ceilings", lambda: ({}, 1e9))
    sharding.ensure_mesh()
    made = bench.Bench(argparse.Namespace(size="tiny", out=None, dtypes=["fp32"]))
    bench.measure_products(made)
    cells = [line for line in made.lines if "| fp32 |" in line]
    assert len(cells) == 2 * len(bench.PRODUCT_ROWS) and len(values) == 3 * len(cells)
    cfg = bench.model_config("lm", "tiny")
    each = np.repeat([1 / (2 * cfg.mlp_width), 1 / cfg.width], 3 * len(bench.PRODUCT_ROWS))
    np.testing.assert_allclose(values, each, rtol=1e-5)  # `in` times 1 / (in out)
