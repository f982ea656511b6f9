"""The training program: exact resume, accumulation, averaging, stops, start weights, every config."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import fixture_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import test_recognizer
import test_vocoder
import test_vocoder_istft
import tiny_model
from fill import fill
from flax import nnx
from jax.sharding import NamedSharding

from deepasmr_jax import (
    checkpoint,
    config,
    flow_cosyvoice2,
    input_pipeline,
    metrics,
    recognizer,
    sharding,
    shards,
    text,
    train,
    vocoder,
)

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.py")


# a model of this file: the loop knows a model only through its Config, init and loss


@dataclasses.dataclass(frozen=True)
class Config:
    """One gain that is fitted to the waveform's loudness; `break_at` makes the loss infinite at that step."""

    break_at: int = -1


class Model(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones(3))
        self.bias = nnx.Param(jnp.ones(()))


def init(cfg, key):
    return Model()


def loss(model, cfg, batch, key):
    wav = batch["wav"]
    active = jnp.abs(wav) > 0.05  # about half of the samples: counts differ between rows
    error = jnp.where(active, wav - model.bias[...], 0.0) ** 2 + 1e-3 * jnp.sum(model.kernel[...] ** 2)
    total = jnp.sum(error)
    if cfg.break_at >= 0:
        total = jnp.where(model.bias[...] <= 1.0 - 0.01 * cfg.break_at + 1e-4, jnp.inf, total)
    return total, jnp.sum(active, dtype=jnp.float32), {"rows": (jnp.float32(wav.shape[0]), jnp.float32(1.0))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fixture_data.write(tmp_path_factory.mktemp("data"))


def tiny(folder, stage, **changes):
    cfg = config.load(f"{TINY}:{stage}")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, data_dirs=(folder,)))
    return dataclasses.replace(cfg, **changes)


def fake(folder, model=Config(), **changes):
    data = input_pipeline.Config("vocoder", 8, (folder,), num_samples=8000, num_threads=1)
    base = dict(steps=6, log_every=1, save_every=2, eval_every=100, eval_batches=1)
    optim = train.Optim(lr=0.01, schedule="constant", warmup_steps=1, clip_norm=None)
    return train.TrainConfig("vocoder", model, data, optim, **(base | changes))


def run_until(monkeypatch, step, cfg, workdir):
    with monkeypatch.context() as patch:
        patch.setattr(train._Stop, "due", lambda self, now, *_: now >= step)
        return train.train(cfg, workdir)


def same(a, b):
    def host(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(host(x), host(y)) for x, y in pairs)


def batches(cfg, count):
    return [train._split(b, cfg.accumulation) for b in input_pipeline.first_batches(cfg.data, count)]


RUN = ("lm", "flow", "vocoder_adversarial", "speech_tokenizer", "speaker")


@pytest.mark.parametrize("stage", RUN)
def test_four_steps_equal_two_and_restore_and_two_bit_for_bit(folder, tmp_path, monkeypatch, stage):
    cfg, steps, make_step = tiny(folder, stage), [], train.make_step
    monkeypatch.setattr(train, "make_step", lambda cfg: steps.append(make_step(cfg)) or steps[-1])
    whole = train.train(cfg, tmp_path / "whole")
    half = run_until(monkeypatch, 2, cfg, tmp_path / "parts")
    assert int(half.step) == 2 and not same(half.model, whole.model)
    parts = train.train(cfg, tmp_path / "parts")
    assert int(parts.step) == 4 and same(parts, whole)
    assert [step._cache_size() for step in steps[:2]] == [1, 1]  # each compiled once
    lines = [
        [{k: v for k, v in line.items() if k.startswith(("train/", "step"))} for line in metrics.read(p)]
        for p in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    training = [[x for x in run if "train/loss" in x] for run in lines]
    assert len(training[0]) == 4 and training[0] == training[1]


def test_a_damaged_newest_checkpoint_repeats_the_lost_steps_exactly(folder, tmp_path):
    cfg = tiny(folder, "lm")
    first = train.train(cfg, tmp_path)
    os.remove(tmp_path / "checkpoints" / "4" / "commit_success.txt")
    again = train.train(cfg, tmp_path)
    assert same(first, again)


def test_sums_over_parts_of_a_batch_equal_one_big_batch(folder):
    results = {}
    for parts in (1, 4):
        cfg = fake(folder, accumulation=parts)
        state = train.init(cfg, jax.random.key(0))
        step = train.make_step(cfg)
        for batch in batches(cfg, 3):
            state, out = step(state, batch)
        results[parts] = (np.asarray(state.model.bias[...]), float(out["loss"]), float(out["grad_norm"]))
    for a, b in zip(results[1], results[4], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # float32 sums in another order
    counts = [
        int((np.abs(x["wav"]) > 0.05).sum()) for x in input_pipeline.first_batches(fake(folder).data, 1)
    ]
    halves = [
        np.abs(b["wav"][i::4]) > 0.05
        for b in input_pipeline.first_batches(fake(folder).data, 1)
        for i in range(4)
    ]
    assert len({int(h.sum()) for h in halves}) > 1 and sum(int(h.sum()) for h in halves) == counts[0]


def test_accumulation_of_a_real_model_equals_one_big_batch(folder):
    losses = {}
    for parts in (1, 2):
        cfg = tiny(folder, "lm", accumulation=parts)
        state = train.init(cfg, jax.random.key(0))
        _, out = train.make_step(cfg)(state, batches(cfg, 1)[0])
        losses[parts] = (float(out["loss"]), float(out["grad_norm"]), float(out["nll_nats"]))
    np.testing.assert_allclose(losses[1], losses[2], rtol=2e-5)


def test_ten_steps_need_one_compilation(folder):
    cfg = tiny(folder, "lm")
    state = jax.jit(functools.partial(train.init, cfg))(jax.random.key(0))
    step = train.make_step(cfg)
    for batch in batches(cfg, 10):
        state, out = step(state, batch)
        jax.block_until_ready(out)
    assert step._cache_size() == 1


# loss and gradient of the flow on each mesh: test_flow.py. Rows that a mesh does not divide get empty ones
@pytest.mark.parametrize(
    "stage, sizes, rows",
    [("lm", (1, 8, 1), 5), ("lm", (2, 4, 1), 8), ("lm", (2, 2, 2), 7), ("flow", (2, 2, 2), 5)],
)
def test_another_mesh_gives_the_same_losses(folder, stage, sizes, rows):
    cfg = config.override(tiny(folder, stage), f"data.batch_size={rows}")
    losses = []
    for shape in ((1, 1, 1), sizes):
        sharding.make_mesh(*shape)
        cfg = dataclasses.replace(cfg, mesh=train.Mesh(*shape))
        host = input_pipeline.first_batches(cfg.data, 2, multiple=train.row_shares(cfg))
        state = jax.jit(functools.partial(train.init, cfg))(jax.random.key(0))
        step, found = train.make_step(cfg), []
        for batch in host:
            state, out = step(state, train._split(batch, 1))
            jax.block_until_ready((state, out))
            found.append(float(out["loss"]))
        losses.append(found)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)  # products are summed in another order


SOURCE_GAN = dataclasses.replace(
    test_vocoder_istft.TINY_GAN, subframes=2, frame_size=512, source=True, spoil_probability=0.7
)
# trainable parts at toy size: stage of configs/tiny.py, another model, and settings of the data
PARTS = {
    "speech_tokenizer": ("speech_tokenizer", None, {"batch_size": 7}),
    "speech_tokenizer_text": ("speech_tokenizer_text", None, {"batch_size": 7, "num_samples": 32000}),
    "recognizer": ("speech_tokenizer", test_recognizer.TINY, {"batch_size": 7}),
    "speaker": ("speaker", None, {"batch_size": 7}),
    "vocoder_istft": ("vocoder", SOURCE_GAN, {"batch_size": 7, "num_samples": 1600}),
    "hifigan": (
        "vocoder",
        test_vocoder.TINY,
        {"batch_size": 7, "mel_profile": "hifigan", "num_samples": 2048},
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_step_has_loss_and_gradients_of_one_device_on_every_mesh(folder, fourier_by_products, part):
    stage, model, sizes = PARTS[part]
    cfg = tiny(folder, stage)
    cfg = dataclasses.replace(
        cfg,
        model=model or cfg.model,
        data=dataclasses.replace(cfg.data, **sizes),
        # without momentum its state is the gradients
        optim=train.Optim("sgd", warmup_steps=1, betas=(0.0, 0.0), clip_norm=None),
        ema_decay=None,
    )
    results = []
    for shape in ((1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)):
        sharding.make_mesh(*shape)
        cfg = dataclasses.replace(cfg, mesh=train.Mesh(*shape))
        # 7 rows are followed by an empty one where the mesh does not divide them
        [batch] = input_pipeline.first_batches(cfg.data, 1, multiple=train.row_shares(cfg))
        if part == "recognizer":  # the noise is called Mandarin, six labels a phone
            phones = np.repeat(batch["phones"][:, ::6], 6, axis=1)[:, : batch["phones"].shape[1]]
            batch["phones"] = np.where(batch["phones"] < 0, -1, phones + recognizer.FIRST)
        like = checkpoint.abstract(functools.partial(train.init, cfg), jax.random.key(0))
        zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        own = dict(model=fill(like.model, 1), opt_state=jax.tree.map(zeros, like.opt_state))
        state = dataclasses.replace(like, step=zeros(like.step), key=jax.random.key(1), **own)
        new, out = jax.block_until_ready(train.make_step(cfg)(state, train._split(batch, 1)))
        values = {name: float(x) for name, x in out.items()}
        results.append((len(batch["wav"]), values, jax.device_get(jax.tree.leaves(new.opt_state))))
    (rows, values, grads), *others = results
    norms = [value for name, value in values.items() if name.endswith("grad_norm")]  # of each player
    floats = [g for g in grads if np.issubdtype(g.dtype, np.floating)]  # not the count of steps
    assert np.hypot.reduce(norms) == pytest.approx(np.sqrt(sum(np.sum(g**2) for g in floats)), rel=1e-4)
    assert rows == cfg.data.batch_size and values["loss"] > 0 and values.get("rows_used", 1) > 0.5
    for rows, found, other in others:
        assert rows == 8 and found == pytest.approx(values, rel=1e-5)
        for a, b in zip(other, grads, strict=True):  # sums over rows in another order
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("devices", [1, 4, 12, 64, 256])
@pytest.mark.parametrize("name", ["lm_pretrain", "flow_pretrain", "speech_tokenizer", "speaker", "vocoder"])
def test_the_full_size_recipes_fit_any_number_of_chips_as_they_are(folder, name, devices):
    cfg = config.load(str(ROOT / "configs" / f"{name}.py"))
    fit = train.fitted(cfg, devices)
    assert fit.mesh.slice * fit.mesh.data * fit.mesh.model == devices and cfg.mesh.data % fit.mesh.data == 0
    assert fit.data == cfg.data  # the same rows in a step
    shares = train.row_shares(fit)
    rows = input_pipeline.padded(fit.data.batch_size, shares)
    assert rows % shares == 0 and rows - fit.data.batch_size < shares
    if devices == 12:  # and the loader makes so many, here shorter ones
        short = dict(num_tokens=128, num_samples=min(cfg.data.num_samples, 32000))
        data = dataclasses.replace(fit.data, data_dirs=(folder,), **short)
        [batch] = input_pipeline.first_batches(data, 1, multiple=shares)
        assert {len(x) for x in batch.values()} == {rows}
    if devices < 128:
        assert rows <= 264 and fit.accumulation == cfg.accumulation
    slices = train.fitted_mesh(cfg.mesh, 2 * devices, num_slices=2)
    assert slices.slice % 2 == 0 and slices.slice * slices.data == 2 * devices


def test_a_mesh_that_does_not_fit_names_the_setting_that_does(folder, tmp_path):
    with pytest.raises(ValueError, match=r"mesh 2x8x1 needs 16 devices, found 8; add --set=mesh.slice=-1"):
        train.train(tiny(folder, "lm", mesh=train.Mesh(2, 8)), tmp_path)
    with pytest.raises(ValueError, match=r"mesh.model 6 does not divide 8 devices; add --set=mesh.model=2"):
        train.train(tiny(folder, "lm", mesh=train.Mesh(-1, 8, 6)), tmp_path)
    assert train.fitted_mesh(train.Mesh(-1, 8, 2), 8) == train.Mesh(1, 4, 2)


def test_the_averaged_weights_follow_the_stated_rule_and_are_exported(folder, tmp_path):
    cfg = fake(folder, ema_decay=0.9)
    state = train.init(cfg, jax.random.key(0))
    step, expected = train.make_step(cfg), 1.0
    for number, batch in enumerate(batches(cfg, 4)):
        state, _ = step(state, batch)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * float(state.model.bias[...])
    assert float(state.ema.bias[...]) == pytest.approx(expected, rel=1e-5)
    assert float(state.ema.bias[...]) != float(state.model.bias[...])
    lm_cfg = tiny(folder, "lm")
    trained = train.train(lm_cfg, tmp_path / "run", tmp_path / "model")
    module, found = checkpoint.load_component(tmp_path / "model", "lm")
    assert found == lm_cfg.model and same(module, trained.ema) and not same(module, trained.model)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(folder, tmp_path):
    cfg = fake(folder, Config(break_at=3), steps=10, save_every=1)
    with pytest.raises(
        FloatingPointError, match=r"step 4: loss inf, learning rate 0.01, .*checkpoint of step 3"
    ):
        train.train(cfg, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 3
    assert [x["step"] for x in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_weights_that_are_not_finite_stop_the_run_in_the_step_that_made_them(folder, tmp_path, monkeypatch):
    data = dict(mel_profile="hifigan", num_samples=2048)
    cfg = tiny(folder, "vocoder", save_every=1, eval_batches=0, keep=9)
    cfg = dataclasses.replace(
        cfg, model=test_vocoder.TINY, data=dataclasses.replace(cfg.data, batch_size=2, **data)
    )
    make = train.make_optimizer

    def poisoned(*arguments):
        """Of finite gradients, at the third step no finite update of the generator: its loss does not tell."""
        tx = make(*arguments)

        def update(grads, state, params):
            updates, new = tx.update(grads, state, params)
            is_bad = (state[-1].count == 2) & isinstance(params, vocoder.Generator)
            return jax.tree.map(lambda x: jnp.where(is_bad, jnp.nan, x), updates), new

        return optax.GradientTransformation(tx.init, update)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_optimizer", poisoned)
        with pytest.raises(FloatingPointError, match=r"step 3: loss \d.*weight_norm nan.*of step 2 is kept"):
            train.train(cfg, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]
    state = train.train(cfg, tmp_path)  # the cause is gone
    assert int(state.step) == 4 and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.model))
    lines = [x for x in metrics.read(tmp_path / "metrics.jsonl") if "train/loss" in x]
    assert [x["step"] for x in lines] == [1, 2, 3, 4]


def test_sigterm_ends_a_run_with_a_checkpoint_that_the_next_run_continues(folder, tmp_path):
    sets = [f"data.data_dirs={folder}", "steps=100000", "save_every=100000", "eval_every=100000"]
    command = [sys.executable, "-m", "deepasmr_jax.train", f"--config={TINY}:lm", f"--workdir={tmp_path}"]
    command += [f"--set={s}" for s in sets]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    path = tmp_path / "metrics.jsonl"
    for _ in range(3000):  # up to five minutes for two lines on a busy machine
        if process.poll() is not None or (path.exists() and path.read_text().count("\n") >= 2):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "(SIGTERM)" in out
    [step] = checkpoint.steps(tmp_path / "checkpoints")
    assert step >= 2 and metrics.read(path)[-1]["step"] == step
    assert f"stopped at step {step} " in out
    # a checkpoint is all that there may be time for
    assert "held out" not in out and not (tmp_path / "export").exists()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sigterm_leaves_time_for_the_checkpoint_and_a_second_ctrl_c_does_not(first):
    stop = train._Stop(max_seconds=-1.0)
    assert stop.due(0) and not stop.is_signal  # the clock
    for number in (first, signal.SIGTERM):  # of the system, and of a launcher
        stop._handle(number, None)
    assert stop.due(1) and stop.is_signal
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)


@pytest.mark.parametrize(
    "number, more, code", [(signal.SIGTERM, ["--stopped-exit=75"], 75), (signal.SIGINT, [], 130)]
)
def test_a_signal_before_the_first_step_ends_the_run_in_a_sentence(
    folder, tmp_path, monkeypatch, capsys, number, more, code
):
    monkeypatch.setattr(train, "start", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    try:
        with pytest.raises(SystemExit) as e:
            train.main(
                [f"--config={TINY}:lm", f"--workdir={tmp_path}", f"--set=data.data_dirs={folder}", *more]
            )
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert e.value.code == code and signal.getsignal(signal.SIGTERM) is before
    assert "stopped at once; the same command goes on" in capsys.readouterr().out


def test_sigterm_ends_a_start_where_hosts_were_joined(folder, tmp_path):
    """JAX then has a handler of its own, which only notes the signal."""
    program = (
        "import os, signal, sys, time; from deepasmr_jax import train\n"
        "train.start = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))\n"
        "train.main(sys.argv[1:])"
    )
    arguments = [
        f"--config={TINY}:lm",
        f"--workdir={tmp_path}",
        f"--set=data.data_dirs={folder}",
        "--stopped-exit=75",
    ]
    joined = {"JAX_COORDINATOR_ADDRESS": runs.free_address(), "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | joined
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 75 and "stopped at once" in done.stdout, done.stderr


def test_a_checkpoint_is_saved_after_so_many_minutes(folder, tmp_path):
    cfg = fake(folder, steps=3, save_every=100, save_minutes=0.0, keep=9)
    train.train(cfg, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2, 3]


def test_the_exit_code_of_a_stopped_run_is_the_one_that_was_asked_for(folder, tmp_path):
    arguments = [f"--config={TINY}:lm", f"--workdir={tmp_path}", f"--set=data.data_dirs={folder}"]
    arguments += ["--set=max_seconds=0", "--set=eval_batches=0"]
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--stopped-exit=75"])
    assert stopped.value.code == 75
    train.main(arguments)
    for change in ("model.layers=2", "data.end_id=5"):  # what no second start would mend
        with pytest.raises(SystemExit) as stopped:
            train.main([*arguments, f"--set={change}", "--stopped-exit=75"])
        assert stopped.value.code == train.HOPELESS_EXIT


def test_the_progress_line_and_the_metrics_have_the_mfu_where_the_peak_is_known(
    folder, tmp_path, capsys, monkeypatch
):
    cfg = tiny(folder, "lm", peak_tflops=1e-3, eval_batches=0)
    with monkeypatch.context() as patch:  # a clock that is read before and after the wait for a batch
        ticks = (float(i * i) for i in itertools.count())
        clock = types.SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: next(ticks))
        patch.setattr(train, "time", clock)
        state = train.train(cfg, tmp_path)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["data/wait_s"]) for x in lines] == [(1, 1.0), (2, 5.0), (3, 9.0), (4, 13.0)]
    lines = [x for x in lines if "perf/step_s" in x]
    flops = train.step_flops(cfg, state, batches(cfg, 1)[0])
    assert lines and all(
        x["perf/mfu"] == pytest.approx(flops / x["perf/step_s"] / 1e9, rel=1e-4) for x in lines
    )
    assert " tokens/s, MFU " in capsys.readouterr().out
    double = dataclasses.replace(cfg, accumulation=2)
    assert train.step_flops(double, state, batches(double, 1)[0]) == flops  # the same rows in two parts
    gan = tiny(folder, "vocoder_adversarial")
    assert train.step_flops(gan, train.init(gan, jax.random.key(0)), batches(gan, 1)[0]) > 0


def test_a_bucket_that_is_not_mounted_is_refused(folder):
    with pytest.raises(ValueError, match="--workdir gs://bucket/run is no folder: mount the bucket"):
        train.train(tiny(folder, "lm"), "gs://bucket/run")


def test_max_seconds_stops_with_a_checkpoint(folder, tmp_path):
    cfg = fake(folder, steps=10**6, max_seconds=1.0, save_every=10**6, log_every=1000)
    state = train.train(cfg, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [int(state.step)]


def test_resuming_with_another_model_or_data_is_refused_with_the_fields(folder, tmp_path, monkeypatch):
    run_until(monkeypatch, 2, tiny(folder, "lm"), tmp_path)
    cfg = config.override(config.override(tiny(folder, "lm"), "model.mlp_width=32"), "data.num_tokens=256")
    with pytest.raises(ValueError, match=r"data.num_tokens: 128 -> 256; model.mlp_width: 64 -> 32"):
        train.train(cfg, tmp_path)


def test_resuming_with_another_learning_rate_is_allowed_and_reported(folder, tmp_path, monkeypatch, capsys):
    run_until(monkeypatch, 2, tiny(folder, "lm"), tmp_path)
    train.train(config.override(tiny(folder, "lm"), "optim.lr=0.5"), tmp_path)
    assert "optim.lr: 0.001 -> 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["vocoder_adversarial", "speech_tokenizer"])
def test_a_new_run_starts_from_the_weights_of_another_run_or_of_its_export(folder, tmp_path, stage):
    first = train.train(tiny(folder, stage, steps=1, eval_batches=0), tmp_path / "first")
    for source in ("export", ""):
        cfg = tiny(folder, stage, init_from=str(tmp_path / "first" / source), seed=5)
        checkpoints = checkpoint.Checkpoints(tmp_path / "second")
        step, state = train.start(cfg, checkpoints, iter(input_pipeline.make(cfg.data)))
        assert step == 0 and int(state.step) == 0
        public = checkpoint.public_part(state.model, cfg.model)[0]
        expected = checkpoint.public_part(train.with_averaged(first.model, first.ema), cfg.model)[0]
        assert same(public, expected) and same(state.ema, train.averaged_part(state.model))


def test_fine_tuned_weights_keep_source_and_licence_of_those_they_started_from(folder, tmp_path):
    public, source = tmp_path / "public", {"source": "e2.pt", "sha256": "ab" * 32, "licence": "CC BY-NC 4.0"}
    given = {"vocoder": source | {"converter": "1"}, "lm": {"licence": "MIT"}}
    checkpoint.export_component(public, "vocoder", Model(), Config(), provenance=given)
    cfg = fake(folder, steps=1, init_from=str(public), data_note="mine")

    def made(model, steps=1):
        values = checkpoint.read_config(model)
        assert values["licence"] == "CC BY-NC 4.0"
        assert values["provenance"]["vocoder"] == source | {"steps": steps, "data": "mine", "averaged": False}

    train.train(cfg, tmp_path / "first")
    made(tmp_path / "first" / "export")
    train.train(dataclasses.replace(cfg, init_from=str(tmp_path / "first")), tmp_path / "second", public)
    made(public)  # in place, from a run
    assert checkpoint.read_config(public)["provenance"]["lm"] == {"licence": "MIT"}
    shutil.rmtree(public)
    train.train(dataclasses.replace(cfg, steps=2), tmp_path / "first")
    made(tmp_path / "first" / "export", 2)  # continued when the start is gone
    train.train(fake(folder, steps=1), tmp_path / "third")
    assert "licence" not in checkpoint.read_config(tmp_path / "third" / "export")


def test_a_vocoder_starts_from_both_players_where_both_are_there(folder, tmp_path, capsys):
    cfg = tiny(folder, "vocoder_adversarial", init_from=str(tmp_path / "m"))
    file = train._file(cfg.model)
    make = lambda seed: jax.jit(file.init, static_argnums=0)(cfg.model, jax.random.key(seed))
    sharding.make_mesh()
    public, fresh = make(1), make(2)
    checkpoint.export_component(tmp_path / "m", "vocoder", public, cfg.model)
    model = train.initialized(fresh, cfg)
    assert same(model.generator, public.generator) and same(model.discriminators, fresh.discriminators)
    assert (
        capsys.readouterr().out == f"start: weights of {tmp_path / 'm'}; the discriminators start at random\n"
    )
    checkpoint.export_component(tmp_path / "m", "discriminators", public.discriminators, cfg.model)
    assert same(train.initialized(fresh, cfg), public)
    assert capsys.readouterr().out == f"start: weights of {tmp_path / 'm'}, both players\n"
    alone = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, adversarial=False))
    model = train.initialized(file.Gan(fresh.generator, None), alone)
    assert same(model.generator, public.generator) and model.discriminators is None
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    values["components"]["discriminators"]["module"] = "vocoder"  # of another vocoder: not for this one
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    assert same(train.initialized(fresh, cfg).discriminators, fresh.discriminators)


def test_discriminators_of_another_shape_are_refused(folder, tmp_path):
    cfg = tiny(folder, "vocoder_adversarial", init_from=str(tmp_path / "m"))
    file, wide = train._file(cfg.model), dataclasses.replace(cfg.model, period_channels=(4, 16))
    sharding.make_mesh()
    model, other = (jax.jit(file.init, static_argnums=0)(c, jax.random.key(0)) for c in (cfg.model, wide))
    checkpoint.export_component(tmp_path / "m", "vocoder", other, wide)
    checkpoint.export_component(tmp_path / "m", "discriminators", other.discriminators, wide)
    with pytest.raises(ValueError, match=r"does not fit the model: .* reshaped .*discriminators\.by_period"):
        train.initialized(model, cfg)


def test_start_weights_of_another_shape_are_refused(folder, tmp_path):
    train.train(tiny(folder, "lm", steps=2), tmp_path / "first")
    cfg = config.override(
        tiny(folder, "lm", init_from=str(tmp_path / "first" / "export")), "model.mlp_width=32"
    )
    with pytest.raises(ValueError, match="does not fit the model: .* reshaped"):
        train.train(cfg, tmp_path / "second")


def test_the_flow_of_cosyvoice2_is_neither_trained_nor_a_start(folder, tmp_path):
    cfg = tiny(folder, "flow", init_from=str(tmp_path))
    with pytest.raises(
        ValueError, match="gives flow_cosyvoice2 its speaker embedding; train the decoder of flow.py"
    ):
        dataclasses.replace(cfg, model=flow_cosyvoice2.cosyvoice2())
    entry = {
        "module": "flow_cosyvoice2",
        "config": {},
        "file": "flow.safetensors",
        "sha256": "",
        "dtype": "float32",
    }
    values = {"format": 1, "components": {"flow": entry | {"num_params": 1}}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is a flow_cosyvoice2, this run trains a flow: two networks"):
        train.initialized(None, cfg)  # before it looks at its own weights


def test_a_flow_does_not_start_on_features_of_another_mel_profile(tmp_path):
    features = fixture_data.write(tmp_path, {"train": 16})
    tools = fixture_data.script("data/add_features.py")
    tools._note_origin(Path(features), {"name": "mini", "vocab_size": 313, "mel_profile": "cv2"})
    with pytest.raises(
        ValueError, match="have mel profile 'cv2', data.mel_profile is 'mini'; make them again"
    ):
        train.train(tiny(features, "flow"), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"component": "vocodr"},
            "component 'vocodr' is unknown; use one of speech_tokenizer, speaker, lm, flow",
        ),
        ({"export_dtype": "fp16"}, "export_dtype 'fp16' is unknown; use one of float32, float16, bfloat16"),
    ],
)
def test_a_name_that_only_the_export_would_miss_is_refused_when_built(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config.load(f"{TINY}:flow"), **change)


def test_text_ids_of_another_tokenizer_are_refused_with_the_way_out(tmp_path):
    features = fixture_data.write(tmp_path, {"train": 4})
    small = config.override(tiny(features, "lm"), "model.text_vocab=8")  # the ids of the noise reach 59
    with pytest.raises(ValueError, match=r"text id \d+, model.text_vocab is 8.*--text-tokenizer"):
        train.check_text_ids(small)
    train.check_text_ids(tiny(features, "lm"))
    tools = fixture_data.script("data/add_features.py")
    tools._note_origin(Path(features), {"name": "mini", "vocab_size": 313})
    train.check_text_ids(tiny(features, "lm"))
    large = config.override(tiny(features, "lm"), "model.text_vocab=151936")
    with pytest.raises(ValueError, match=r"tokenizer 'mini' with 313 symbols, model.text_vocab is 151936"):
        train.train(large, tmp_path / "run")


def test_features_of_two_tokenizers_or_mel_profiles_do_not_share_a_folder(tmp_path):
    tools = fixture_data.script("data/add_features.py")
    made = {"name": "mini", "vocab_size": 313, "speech_tokenizer": "0a", "mel_profile": "mini"}
    faults = {"name": "qwen", "vocab_size": 151936, "speech_tokenizer": "0b", "mel_profile": "cv2"}
    for _ in range(2):
        tools._note_origin(tmp_path / "new", made)
        for key, value in faults.items():
            with pytest.raises(
                ValueError, match=f"begun with .* {made[key]}, not {value}; choose another --out"
            ):
                tools._note_origin(tmp_path / "new", made | {key: value})
    config.write_json(tmp_path / "old" / shards.OLD_MADE_WITH_FILE, {"name": "mini", "vocab_size": 313})
    tools._note_origin(tmp_path / "old", made)
    with pytest.raises(ValueError, match="begun with a text vocabulary of size 313, not 151936"):
        tools._note_origin(tmp_path / "old", made | {"vocab_size": 151936})
    assert not (tmp_path / "old" / shards.MADE_WITH_FILE).exists()
    features, out = fixture_data.write(tmp_path, {"train": 4}, has_features=False), tmp_path / "f" / "1.0.0"
    tools._note_origin(out, made | {"vocab_size": text.MiniTokenizer().vocab_size})
    with pytest.raises(ValueError, match="begun with the speech tokenizer of sha256 0a, not [0-9a-f]{64}"):
        tools.add_features(features, str(tiny_model.shared()), str(out))


def all_configs():
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = path.read_text()
        module, stages = {}, None
        if "STAGES" in text:
            exec(compile(text, str(path), "exec"), module | {"__file__": str(path)}, module)
            stages = module["STAGES"]
        found += [f"{path.name}:{s}" for s in stages] if stages else [path.name]
    return found


@pytest.mark.parametrize("name", all_configs())
def test_every_config_builds_abstractly_on_its_own_mesh(name):
    cfg = train.fitted(config.load(str(ROOT / "configs" / name)), jax.device_count())
    sharding.make_mesh(cfg.mesh.slice, cfg.mesh.data, cfg.mesh.model)
    state = checkpoint.abstract(functools.partial(train.init, cfg), jax.random.key(0))
    if cfg.component in ("lm", "flow") and cfg.mesh.data > 1:  # the others are copied to every chip
        sizes = {True: 0, False: 0}  # numbers in arrays that are split over the chips, and in others
        for x in jax.tree.leaves(state.model):
            sizes["data" in x.sharding.spec] += x.size
        assert sizes[True] > 0.95 * sum(sizes.values())
    json.dumps(config.to_dict(cfg))
    assert config.from_dict(type(cfg.model), config.to_dict(cfg.model)) == cfg.model
    lines = [
        line for line in (ROOT / "configs" / name.split(":")[0]).read_text().split('"""')[1].splitlines()
    ]
    for fact in ("What:", "Command", "Hardware and hours:", "Number"):
        assert any(line.startswith(fact) for line in lines), f"{name}: docstring lacks {fact}"


def abstract_batch(cfg):
    """Shapes, dtypes and shardings of one part of a batch, as input_pipeline.py makes it."""
    rows, mesh = cfg.data.batch_size // cfg.accumulation, sharding.ensure_mesh()

    def one(shape, dtype):
        spec = sharding.spec("batch", *[None] * len(shape))
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=NamedSharding(mesh, spec))

    return {name: one(*x) for name, x in input_pipeline.row_spec(cfg.data).items()}


# the step of a first stage is that of the second, on other data; toys are run above
STEPS = [n for n in all_configs() if not n.endswith("_normal") and not n.startswith("tiny.py")]
HIFIGAN = [f"vocoder.py with {name}" for name in ("v2", "v3")]


@pytest.mark.parametrize("name", STEPS + HIFIGAN)
def test_a_step_of_every_config_lowers_and_keeps_shapes_and_shardings(name):
    file, _, preset = name.partition(" with ")
    cfg = config.load(str(ROOT / "configs" / file))
    if preset:
        cfg = dataclasses.replace(cfg, model=getattr(vocoder, preset)())
    cfg = train.fitted(cfg, jax.device_count())
    sharding.make_mesh(cfg.mesh.slice, cfg.mesh.data, cfg.mesh.model)
    make = functools.partial(train.init, cfg)
    assert not any(x.weak_type for x in jax.tree.leaves(jax.eval_shape(make, jax.random.key(0))))
    state = checkpoint.abstract(make, jax.random.key(0))
    step, batch = train.make_step(cfg), (abstract_batch(cfg),) * cfg.accumulation
    new, out = jax.eval_shape(step, state, batch)
    # a state of another kind would make the second step compile anew
    facts = lambda state: [(x.shape, x.dtype, x.weak_type, x.sharding.spec) for x in jax.tree.leaves(state)]
    assert facts(new) == facts(state) and jax.tree.structure(new) == jax.tree.structure(state)
    assert "loss" in out and all(x.shape == () for x in out.values())
    step.lower(state, batch)


@pytest.mark.full  # 10 to 30 s of a processor each
@pytest.mark.parametrize("name", ["lm_pretrain", "flow_pretrain", "speech_tokenizer", "speaker", "vocoder"])
def test_a_step_of_full_size_compiles_for_one_device_and_gives_back_the_memory_of_its_state(name):
    cfg = train.fitted(config.load(str(ROOT / "configs" / f"{name}.py")), 1)
    state = checkpoint.abstract(functools.partial(train.init, cfg), jax.random.key(0))
    compiled = train.make_step(cfg).lower(state, (abstract_batch(cfg),) * cfg.accumulation).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.model, state.opt_state, state.ema)))
    assert size <= compiled.memory_analysis().alias_size_in_bytes < size + 1000  # with step and key


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", {0: 0.1, 9: 1.0, 500: 1.0, 999: 1.0}),
        ("noam", {0: 0.1, 9: 1.0, 39: 0.5, 999: 0.1}),
        ("cosine", {0: 0.1, 9: 1.0, 504: 0.5, 999: 0.0}),
        ("exponential", {0: 0.1, 9: 0.9772, 499: 0.3162, 999: 0.1}),
        ("wsd", {0: 0.1, 9: 1.0, 799: 1.0, 899: 0.5, 999: 0.0}),
    ],
)
def test_schedules_pass_through_their_stated_points(schedule, expected):
    final = 0.1 if schedule == "exponential" else 0.0
    optim = train.Optim(lr=1.0, schedule=schedule, warmup_steps=10, final_lr_ratio=final)
    rate = train.make_schedule(optim, 1000)
    for count, value in expected.items():
        assert float(rate(count)) == pytest.approx(value, abs=1e-3)


def test_weight_decay_is_decided_by_the_name_and_not_by_the_rank():
    assert train.is_decayed("layers.mlp.up.kernel")
    left = ("layers.attn.q.bias", "layers.attn_norm.scale", "norm.scale", "text_table", "layers.x.gain")
    for name in (*left, "layers.depthwise_bias", "bn1.mean", "bn1.var"):
        assert not train.is_decayed(name)
    tx = train.make_optimizer(train.Optim("adamw", 0.1, "constant", 1, weight_decay=0.5, clip_norm=None), 10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 2))}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_sgd_has_nesterovs_momentum_and_a_decay_that_joins_the_gradient():
    cfg = train.Optim("sgd", 0.1, "constant", 1, betas=(0.8, 0.0), weight_decay=0.5, clip_norm=None)
    tx, params = train.make_optimizer(cfg, 10), {"kernel": jnp.ones(()), "bias": jnp.ones(())}
    state, (x, memory) = tx.init(params), (1.0, 0.0)
    for gradient in (1.0, -2.0, 0.5):
        updates, state = tx.update(dict.fromkeys(params, jnp.float32(gradient)), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        decayed = gradient + 0.5 * x
        memory = 0.8 * memory + decayed
        x -= 0.1 * (decayed + 0.8 * memory)
    assert float(params["kernel"]) == pytest.approx(x, rel=1e-6)
    assert float(params["bias"]) != pytest.approx(x)


@pytest.mark.parametrize(
    "assignments, words",
    [
        (["data.end_id=5"], "5 is not the model's end id 6561"),
        (["optim.weight_decay=0.1"], "needs optim.name=adamw"),
        (["optim.warmup_steps=0"], "must be at least 1"),
        (["accumulation=0"], "accumulation 0 must be at least 1"),
        (["mesh.data=0"], "mesh.data 0 must be at least 1"),
        (["mesh.slice=0"], "mesh.slice 0 must be at least 1"),
        (["log_every=0"], "log_every 0 must be at least 1"),
        (["save_every=0"], "save_every 0 must be at least 1"),
        (["eval_every=0"], "eval_every 0 .*eval_batches=0"),
    ],
)
def test_a_run_that_cannot_work_is_refused_when_configured(assignments, words):
    cfg = config.load(f"{TINY}:lm")
    with pytest.raises(ValueError, match=words):
        config.override(cfg, *assignments)


@pytest.mark.parametrize("order", [1, -1])
def test_settings_that_depend_on_each_other_come_in_any_order(order):
    assignments = ["data.mel_profile=cv2", "model.mel_profile=cv2"][::order]
    cfg = config.override(config.load(f"{TINY}:vocoder"), *assignments)
    assert cfg.data.mel_profile == cfg.model.mel_profile == "cv2"


@pytest.mark.parametrize("field, value, known", [("name", "lion", "adamw"), ("schedule", "linear", "cosine")])
def test_an_unknown_optimizer_or_schedule_is_refused(field, value, known):
    with pytest.raises(ValueError, match=f"optim.{field} '{value}' is unknown; use .*{known}"):
        train.Optim(**{field: value})


def test_a_model_of_another_mel_profile_or_other_labels_than_its_data_is_refused():
    with pytest.raises(ValueError, match="data.mel_profile 'cv2' is not the model's 'mini'"):
        config.override(config.load(f"{TINY}:vocoder"), "data.mel_profile=cv2")
    with pytest.raises(ValueError, match="data.labels 'text' are not the model's 'frames'"):
        config.override(config.load(f"{TINY}:speech_tokenizer"), "data.labels=text")


def test_several_hosts_save_once_where_the_checkpoint_of_one_is_too_old(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "greatest", lambda wish: wish)
    stop, saved_at, saves = train._Stop(None), 0, []
    for step in range(12):  # a checkpoint is too old after five steps
        assert not stop.due(step, step - saved_at >= 5)
        if stop.saves:
            saved_at = step
            saves.append(step)
            stop.saved()
    assert saves == [6]
    stop._handle(signal.SIGTERM, None)
    assert [stop.due(step) for step in (12, 13)] == [False, True] and stop.is_signal
    monkeypatch.setattr(sharding, "greatest", lambda wish: 2)  # of a host whose time is over: all evaluate
    stop = train._Stop(None)
    assert stop.due(0) and stop.reason == "another host stopped" and not stop.is_signal


def test_checkpoints_leave_the_log_of_other_libraries_alone(tmp_path):
    log = logging.getLogger("absl")
    log.removeFilter(checkpoint._not_of_orbax)  # a run that failed in another test has left it
    before = log.level, list(log.filters)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    record = lambda path: logging.LogRecord("absl", logging.ERROR, path, 1, "text", None, None)
    assert log.filter(record("site-packages/grain/_src/x.py"))
    assert not log.filter(record("site-packages/orbax/checkpoint/x.py"))
    checkpoints.close()
    assert (log.level, log.filters) == before
