"""Training that is killed, or whose disk is full, ends with the weights and the batches of an undisturbed run.

    python tests/test_kills.py --kills 20 --out FOLDER      the long form; a table of the kills and the verdict

About a third of the kills hit a checkpoint that is being written, one at least; the others come at random moments of a
run's life, from before its first step on.
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import fixture_data
import numpy as np
import pytest
import runs

from deepasmr_jax import checkpoint, metrics

CONFIG = "tiny.py:lm"
SAVE_S = 0.02  # a kill during a save comes at most so late after the save has begun


def settings(folder: str, steps: int) -> list[str]:
    return [f"data.data_dirs={folder}", f"steps={steps}", "save_every=2", "eval_batches=0", "keep=2"]


def is_saving(folder: Path, since: float) -> bool:
    """Whether the folder has a checkpoint that is not whole and was begun after `since` (seconds of the clock)."""
    try:
        begun = [p for p in folder.iterdir() if p.stat().st_mtime > since]
        return any(not p.name.isdigit() or checkpoint._problem(p) is not None for p in begun)
    except FileNotFoundError:  # no folder yet, or a part that has just been renamed
        return False


def wait_until(is_true, process, log: str, timeout_s: float, every_s: float = 0.02) -> None:
    """Waits until a function of no arguments is true or the process ends; fails with the log after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while process.exitcode is None and not is_true():
        if time.monotonic() > until:
            process.kill()
            pytest.fail(f"still waiting after {timeout_s} s\n{Path(log).read_text()[-2000:]}")
        time.sleep(every_s)


def differences(whole: Path, parts: Path, steps: int) -> list[str]:
    """What differs between an undisturbed run and a disturbed one: state, exported weights, batches, losses."""
    found, states = [], [checkpoint.read_state(run / "checkpoints" / str(steps)) for run in (whole, parts)]
    if sorted(states[0]) != sorted(states[1]):
        found.append("names in the state")
    found += [name for name, x in states[0].items() if not np.array_equal(x, states[1].get(name))]
    if len({(run / "export" / "lm.safetensors").read_bytes() for run in (whole, parts)}) > 1:
        found.append("exported weights")
    batches = [
        {tuple(x.split()) for x in Path(f"{run}.batches").read_text().splitlines()} for run in (whole, parts)
    ]
    if batches[0] != batches[1] or len(batches[0]) != steps:
        found.append(f"batches: {sorted(batches[0] ^ batches[1])}")
    losses = [
        [(x["step"], x["train/loss"]) for x in metrics.read(run / "metrics.jsonl") if "train/loss" in x]
        for run in (whole, parts)
    ]
    if losses[0] != losses[1]:
        found.append("losses in metrics.jsonl")
    return found


def kill_often(
    place: Path, kills: int, steps: int, seed: int = 0, tell=lambda kill: None, timeout_s: float = 300
) -> tuple[list[dict], list[str]]:
    """Runs a training undisturbed, then once more with SIGKILL so often.

    Args:
        place: a folder.
        kills: how often; more if none of them hit a save.
        steps: of the run; if it ends before the last kill, the disturbed run is made anew.
        seed: of the moments.
        tell: is called with the facts of each kill.
        timeout_s: of each run.

    Returns:
        (facts of each kill, what differs in the end: nothing if all is well). Fails with the log of the runs if a
        run goes wrong, or if twice as many and ten more do not give the kills.
    """
    data = fixture_data.write(place / "data")
    start = lambda run: runs.start(run, CONFIG, *settings(data, steps), record=f"{run}.batches")
    whole, parts, draw, told = place / "whole", place / "parts", random.Random(seed), []
    began = time.monotonic()
    process = start(whole)
    wait_until((whole / "metrics.jsonl").exists, process, f"{whole}.log", timeout_s)
    first_s = time.monotonic() - began
    assert runs.finish(process, timeout_s) == 0, Path(f"{whole}.log").read_text()[-2000:]
    life_s = first_s + 0.5 * (time.monotonic() - began - first_s)
    num_runs = num_saves = 0
    while len(told) < kills or not num_saves:
        num_runs += 1
        if num_runs > 2 * kills + 10:
            pytest.fail(f"{told} in {num_runs - 1} runs\n{Path(f'{parts}.log').read_text()[-2000:]}")
        clock, began = time.time(), time.monotonic()
        process = start(parts)
        if 3 * num_saves < len(told):
            saving = functools.partial(is_saving, parts / "checkpoints", clock)
            wait_until(saving, process, f"{parts}.log", timeout_s, every_s=0.0005)
            time.sleep(draw.uniform(0, SAVE_S))
        else:
            process.join(draw.uniform(0.1, life_s))
        process.kill()
        code = runs.finish(process)
        if code != -9:  # it came to its end first
            assert code == 0, Path(f"{parts}.log").read_text()[-2000:]
            assert not differences(whole, parts, steps)
            shutil.rmtree(parts)
            Path(f"{parts}.batches").unlink()
            life_s *= 0.7  # programs are compiled by now, so a run is shorter
            continue
        done = len(metrics.read(parts / "metrics.jsonl")) if (parts / "metrics.jsonl").exists() else 0
        told.append(
            {
                "after_s": round(time.monotonic() - began, 2),
                "steps_seen": done,
                "during_a_save": is_saving(parts / "checkpoints", clock),
                "checkpoints": checkpoint.steps(parts / "checkpoints"),
            }
        )
        num_saves += told[-1]["during_a_save"]
        tell(told[-1])
    assert runs.finish(start(parts), timeout_s) == 0, Path(f"{parts}.log").read_text()[-2000:]
    return told, differences(whole, parts, steps)


def test_a_run_that_is_killed_three_times_ends_bit_for_bit_as_if_it_had_not_been(tmp_path):
    kills, wrong = kill_often(tmp_path, 3, 6)
    assert not wrong and len(kills) >= 3
    assert any(kill["during_a_save"] for kill in kills)


def test_a_full_disk_ends_a_run_with_a_sentence_and_loses_nothing_older(tmp_path):
    data, run = fixture_data.write(tmp_path / "data", {"train": 16}), tmp_path / "parts"
    start = lambda run, **options: runs.start(
        run,
        CONFIG,
        *settings(data, 4),
        "keep=1",
        record=f"{run}.batches",
        **options,
    )
    broken = start(run, limit=(2, 20_000))  # checkpoints have files of 100 kB and more
    whole = start(tmp_path / "whole")
    assert runs.finish(broken) == 1 and runs.finish(whole) == 0
    last = Path(f"{run}.log").read_text().splitlines()[-1]
    assert (
        last.startswith("error: the checkpoint of step 4 could not be written to ")
        and "Traceback" not in last
    )
    assert "that of step 2 is kept; make room and run the same command again" in last
    assert checkpoint._problem(run / "checkpoints" / "2") is None
    assert runs.finish(start(run)) == 0
    assert "start: checkpoint of step 2" in Path(f"{run}.log").read_text()
    assert differences(tmp_path / "whole", run, 4) == []


def test_with_worker_processes_a_signal_to_the_whole_job_saves_and_no_worker_outlives_a_kill(tmp_path):
    data, run = fixture_data.write(tmp_path / "data", {"train": 16}), tmp_path / "run"
    sets = (
        f"data.data_dirs={data}",
        "steps=100000",
        "eval_batches=0",
        "data.worker_count=1",
        "save_every=100000",
    )
    for number, word in ((signal.SIGTERM, "stopped at step"), (signal.SIGKILL, "start: checkpoint of step")):
        process = runs.start(run, CONFIG, *sets, group=True)
        before = len(metrics.read(run / "metrics.jsonl")) if run.exists() else 0
        has_gone_on = lambda before=before: (
            (run / "metrics.jsonl").exists() and len(metrics.read(run / "metrics.jsonl")) > before
        )
        wait_until(has_gone_on, process, f"{run}.log", 300)
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
            assert runs.finish(process) == 0
        else:
            process.kill()
        assert word in Path(f"{run}.log").read_text()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                os.killpg(process.pid, 0)  # anyone left of the group?
            except ProcessLookupError:
                break
            process.join(0.1)
        else:
            pytest.fail("a worker is still there a minute after its run has ended")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    if Path(args.out).exists():
        parser.error(f"{args.out} is there already; name a folder that is not")
    Path(args.out).mkdir(parents=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(args.out).absolute() / "cache"))
    import conftest  # noqa: F401  for the other settings of the tests: the runs start from here

    tell = lambda kill: print(json.dumps(kill), flush=True)
    kills, wrong = kill_often(Path(args.out).absolute(), args.kills, args.steps, args.seed, tell, 3600)
    during = sum(k["during_a_save"] for k in kills)
    print(f"{len(kills)} kills, {during} during a save; differs in the end: {wrong or 'nothing'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
