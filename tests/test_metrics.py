"""The metric file and the step timer."""

import pytest

from deepasmr_jax import metrics


def test_metrics_of_lost_steps_are_dropped_on_resume(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in range(1, 5):
        writer.write(step, {"train/loss": step, "train/odd": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')
    metrics.Writer(tmp_path, 2)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines] == [1, 2] and lines[0]["train/odd"] == "nan"


def test_step_time_leaves_out_the_first_two_steps_and_pauses():
    now = iter([0.0, 10.0, 15.0, 16.0, 100.0, 102.0])
    timer = metrics.StepTimer(clock=lambda: next(now))
    for _ in range(3):
        timer.tick()
    timer.pause()
    timer.tick()
    assert timer.compile_s == 10.0 and timer.take() == pytest.approx(1.5) and timer.take() is None
