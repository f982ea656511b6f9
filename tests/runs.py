"""Training runs in processes of their own, to be killed, stopped or joined; forked from one with the imports done."""

import hashlib
import multiprocessing
import os
import resource
import socket
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["runs", "deepasmr_jax.train", "grain", "tensorflow_datasets", "orbax.checkpoint"]
)


def start(workdir, config: str, *sets: str, **options) -> multiprocessing.Process:
    """Starts `python -m deepasmr_jax.train --config=... --workdir=... --set=...`; its output goes to WORKDIR.log.

    Args:
        workdir, config, sets: as on the command line.
        options: of `_run`.
    """
    arguments = [
        f"--config={ROOT / 'configs' / config}",
        f"--workdir={workdir}",
        *(f"--set={s}" for s in sets),
    ]
    log = options.pop("log", f"{workdir}.log")
    process = _processes.Process(target=_run, args=(arguments, str(log)), kwargs=options)
    process.start()
    return process


def finish(process, timeout_s: float = 300) -> int:
    """Waits for a run; its exit code."""
    process.join(timeout_s)
    assert process.exitcode is not None, f"process {process.pid} still runs after {timeout_s} s"
    return process.exitcode


def free_address() -> str:
    """An address for the first of several processes to listen at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def _run(
    arguments: list[str],
    log: str,
    devices: int = 1,
    place=None,
    record=None,
    limit=None,
    group=False,
) -> None:
    """Body of the process.

    Args:
        arguments: of the command line.
        log: file for standard output and error, appended to.
        devices: fake CPU devices of this process.
        place: (address, number of processes, this one), to join other processes.
        record: file to which "STEP DIGEST-OF-THE-BATCH" is appended before each update.
        group: be the first of a process group, to be signalled as a whole.
        limit: (step, bytes): from this step on no file can be written beyond so many bytes, as on a full disk.
    """
    if group:
        os.setpgrp()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), place or (), strict=False):
        os.environ[f"JAX_{name}"] = str(value)
    import jax

    from deepasmr_jax import train

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_default_matmul_precision", "float32")
    make = train.make_step

    def make_step(cfg):
        step = make(cfg)

        def watched(state, batches):
            number = int(state.step)
            if record is not None:
                arrays = (np.ascontiguousarray(b[k]) for b in batches for k in sorted(b))
                digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]
                with open(record, "a") as file:
                    file.write(f"{number} {digest}\n")
            if limit is not None and number >= limit[0]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
            return step(state, batches)

        return watched

    train.make_step = make_step
    try:
        train.main(arguments)
    finally:  # what JAX does at exit; a process of multiprocessing runs no such handlers before Python 3.13
        jax.distributed.shutdown()
