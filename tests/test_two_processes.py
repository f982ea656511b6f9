"""Two processes joined by `jax.distributed` (gloo) train as one process does; SIGTERM to one of them stops both."""

import importlib.util
import os
import signal
import time

import fixture_data
import numpy as np
import pytest
import runs
from test_metrics import events

from deepasmr_jax import checkpoint, metrics, sharding

ROOT = runs.ROOT


def start_two(run, config, *sets, **options):
    """Both processes, two devices each."""
    address = runs.free_address()
    return [
        runs.start(run, config, *sets, devices=2, place=(address, 2, i), log=f"{run}.{i}.log", **options)
        for i in range(2)
    ]


def losses(run):
    return {x["step"]: x["train/loss"] for x in metrics.read(run / "metrics.jsonl") if "train/loss" in x}


def logs(run):
    return "\n".join(p.read_text()[-3000:] for p in sorted(run.parent.glob(f"{run.name}.*log")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fixture_data.write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "stage, mesh", [("lm", ("mesh.data=2", "mesh.model=2")), ("flow", ("mesh.slice=2", "mesh.data=2"))]
)
def test_two_processes_end_with_the_weights_of_one(folder, tmp_path, stage, mesh):
    has_events = importlib.util.find_spec("tensorboardX") is not None
    sets = (f"data.data_dirs={folder}", "accumulation=2", "eval_every=2", f"tensorboard={has_events}", *mesh)
    # Adam divides by the size of a gradient, so that the rounding of one that is nearly nothing becomes a step of full
    # size; with a large eps it is plain momentum. Products in float32, as a rounding to bfloat16 flips at such a
    # difference too: so weights can be compared closely
    sets += ("optim.eps=1", "optim.lr=0.1", "model.dtype=float32")
    two = start_two(tmp_path / "two", f"tiny.py:{stage}", *sets)
    one = runs.start(tmp_path / "one", f"tiny.py:{stage}", *sets, devices=4)
    assert [runs.finish(p) for p in (*two, one)] == [0, 0, 0], logs(tmp_path / "two")
    lines = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 6  # four steps, two evaluations
    for a, b in zip(*lines, strict=True):
        assert sorted(a) == sorted(b)
        for name in a:
            if name.startswith(("train/", "eval/")):
                # sums over devices in another order; terms of a gradient cancel each other
                near = 1e-3 if name == "train/grad_norm" else 1e-5
                assert b[name] == pytest.approx(a[name], rel=near, abs=1e-6), name
    if has_events:  # one file, of process 0: a second writer would be another file, or each number twice
        tags = [
            sorted((e.step, v.tag) for e in events(tmp_path / name / "tensorboard") for v in e.summary.value)
            for name in ("one", "two")
        ]
        assert tags[0] == tags[1] and len(set(tags[1])) == len(tags[1])
        wanted = {(4, "train/loss"), (4, "eval/loss")} | (
            {(4, "picture/1/made")} if stage == "flow" else set()
        )
        assert wanted <= set(tags[1])
    one, two = (checkpoint.read_state(tmp_path / name / "checkpoints" / "4") for name in ("one", "two"))
    assert sorted(one) == sorted(two)
    for name in one:
        assert np.linalg.norm(two[name] - one[name]) <= 1e-4 * np.linalg.norm(one[name]) + 1e-7, name


def test_sigterm_to_one_of_two_processes_saves_on_both_and_the_next_start_goes_on(folder, tmp_path):
    run = tmp_path / "run"
    sets = (
        f"data.data_dirs={folder}",
        "eval_batches=0",
        "mesh.data=4",
        "save_every=1000",
        "optim.schedule=constant",
    )
    both = start_two(run, "tiny.py:lm", *sets, "steps=1000")
    path = run / "metrics.jsonl"
    for _ in range(3000):
        if any(p.exitcode is not None for p in both) or path.exists() and path.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    os.kill(both[1].pid, signal.SIGTERM)
    assert [runs.finish(p) for p in both] == [0, 0], logs(run)
    [step] = checkpoint.steps(run / "checkpoints")
    assert f"stopped at step {step} (another host stopped)" in logs(run)
    both = start_two(run, "tiny.py:lm", *sets, f"steps={step + 2}")
    assert [runs.finish(p) for p in both] == [0, 0], logs(run)
    assert f"start: checkpoint of step {step}" in logs(run)
    one = runs.start(tmp_path / "one", "tiny.py:lm", *sets, f"steps={step + 2}", devices=4)
    assert runs.finish(one) == 0
    a, b = losses(run), losses(tmp_path / "one")
    assert sorted(a) == sorted(b) == list(range(1, step + 3))
    assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-4)


@pytest.mark.parametrize(
    "values, words",
    [(("", "2", "0"), "JAX_NUM_PROCESSES='2'.*set all three"), (("a:1", "two", "0"), "'two'.*to numbers")],
)
def test_a_process_that_is_told_half_of_its_place_says_so(monkeypatch, values, words):
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), values, strict=True):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(ValueError, match=words):
        sharding.start_hosts()
