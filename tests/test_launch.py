"""The launch scripts: their dry runs, arguments kept whole, and runs with stand-ins for the tools of a platform."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
# the scripts run with nothing but a shell's tools: a command of a platform would not be found
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
ARGUMENTS = ["--config=configs/lm_asmr.py", '--set=data_note=two words, a "quote" and a \\ backslash']


def dry(script, *arguments, **environment):
    out = subprocess.run(
        ["bash", str(LAUNCH / script), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
    )
    return out.returncode, out.stdout, out.stderr


GKE = dict(
    IMAGE="place/deepasmr:1", BUCKET="bucket", ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="4x8", SLICES="2"
)


def test_a_gke_run_is_a_job_set_with_a_pod_for_each_host():
    code, out, err = dry("gke.sh", "run", "asmr", *ARGUMENTS, **GKE)
    assert code == 0, err
    job_set = yaml.safe_load(out.split("\n", 1)[1].rsplit("EOF", 1)[0])
    assert (job_set["kind"], job_set["metadata"]["name"]) == ("JobSet", "asmr")
    [job] = job_set["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    assert (job["replicas"], inner["parallelism"], inner["completions"]) == (2, 8, 8)  # 32 chips, 4 a host
    pod = inner["template"]["spec"]
    [container] = pod["containers"]
    assert container["args"] == ARGUMENTS and container["command"][-1] == "--stopped-exit=75"
    assert container["command"][:3] == ["bash", "launch/keep_log.sh", "/bucket/logs/asmr"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    values = {x["name"]: x["value"] for x in container["env"]}
    assert values["JAX_COMPILATION_CACHE_DIR"].startswith(container["volumeMounts"][0]["mountPath"])
    assert "{{" not in out
    # a config that is wrong (train.HOPELESS_EXIT) is not started again
    [rule] = inner["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"] and pod["restartPolicy"] == "Never"
    [rule] = job_set["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"IMAGE": ""}, "set IMAGE"),
        ({"BUCKET": ""}, "set BUCKET"),
        ({"TOPOLOGY": "1x3"}, "3 chips, no multiple of CHIPS=4"),
    ],
)
def test_a_gke_run_that_cannot_be_says_what_to_set(changes, words):
    code, out, err = dry("gke.sh", "run", "asmr", **(GKE | changes))
    assert code and words in err and "kubectl" not in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["image"], "docker push place/deepasmr:1"),
        (["list"], "kubectl get jobsets"),
        (["logs", "asmr"], "jobset-name=asmr"),
        (["collect", "asmr", "folder"], "folder/POD_OF_EVERY_HOST.log"),
        (["collect", "asmr", "folder"], "rsync --recursive gs://bucket/logs/asmr folder/attempts"),
        (["delete", "asmr"], "kubectl delete jobset asmr"),
    ],
)
def test_the_other_gke_commands_are_printed(arguments, words):
    code, out, err = dry("gke.sh", *arguments, **GKE)
    assert code == 0 and words in out, err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["create", "n"], ["--accelerator-type=t", "--spot"]),
        (["install", "n"], ["git archive", "--worker=all", "[tpu"]),
        (["mount", "n"], ["gcsfuse --implicit-dirs", "negative-ttl-secs=0 bucket /mnt/bucket"]),
        (["logs", "n"], ["--worker=0", "train.log"]),
        (
            ["collect", "n", "folder"],
            ["folder/worker-N.log", "rsync --recursive gs://bucket/logs/n folder/attempts"],
        ),
        (
            ["run", "n", "--config=c"],
            ["mountpoint -q /mnt/bucket ||", "keep_log.sh /mnt/bucket/logs/n .venv/bin/python -m"],
        ),
        (["stop", "n"], ["--worker=all", "TERM"]),
        (["delete", "n"], ["tpu-vm delete n --zone=z"]),
    ],
)
def test_tpu_vm_commands_are_printed(arguments, words):
    code, out, err = dry("tpu_vm.sh", *arguments, ZONE="z", TYPE="t", VERSION="v", SPOT="1", BUCKET="bucket")
    unquoted = " ".join(shlex.split(out)) if "$'" not in out else out
    assert code == 0 and all(word in unquoted for word in words), (unquoted, err)


def test_arguments_with_spaces_and_quotes_reach_the_program_whole_on_a_tpu_vm_and_under_slurm():
    code, out, _ = dry("tpu_vm.sh", "run", "n", *ARGUMENTS, ZONE="z")
    remote = next(x for x in shlex.split(out) if x.startswith("--command=")).removeprefix("--command=")
    assert code == 0 and ARGUMENTS[1] in shlex.split(remote) and "bucket" not in remote
    assert "JAX_COMPILATION_CACHE_DIR" in remote and "JAX_COORDINATOR_ADDRESS" in remote
    code, out, _ = dry("slurm.sbatch", *ARGUMENTS)
    assert code == 0 and shlex.split(out)[-2:] == ARGUMENTS and "srun" in out
    assert "JAX_COMPILATION_CACHE_DIR" in out and "nccl_termination_timeout" in out


@pytest.mark.parametrize("code, tries, queued", [(75, 2, "requeue 7"), (2, 1, ""), (0, 1, "")])
def test_a_run_is_started_again_where_that_can_help(tmp_path, code, tries, queued):
    """With stand-ins for the programs: srun and Python note their arguments; Python succeeds at the second try."""
    programs = {
        "srun": f'echo "$*" >>srun; exit {code}',
        "scontrol": 'echo "$*" >>scontrol',
        "sleep": "exit",
        "gcloud": 'for x in "$@"; do case "$x" in --command=*) cd "$HOME"; bash -c "${x#--command=} wait";; esac; done',
    }
    names = [tmp_path / "bin" / name for name in programs] + [
        tmp_path / "deepasmr" / ".venv" / "bin" / "python"
    ]
    programs["python"] = f'echo "$*" >>log; [ $(wc -l <log) = 2 ] || exit {code}'
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{programs[path.name]}\n")
        path.chmod(0o755)
    (tmp_path / "deepasmr" / "train.log").write_text("an earlier run's\n")
    own = ENVIRONMENT | {
        "PATH": f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}",
        "HOME": str(tmp_path),
        "ZONE": "z",
    }
    own |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *ARGUMENTS],
        env=own, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == code and "--stopped-exit=75 --config" in (tmp_path / "srun").read_text()
    assert ((tmp_path / "scontrol").read_text().strip() if queued else "") == queued
    subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "run", "n", *ARGUMENTS], env=own, cwd=tmp_path, check=True
    )
    lines = (tmp_path / "deepasmr" / "log").read_text().splitlines()
    assert len(lines) == tries and lines[0].endswith(" ".join(ARGUMENTS))
    begun = "attempt {} of this run began 20"
    kept = ["an earlier run's", *(begun.format(n + 1) for n in range(tries))]
    log = (tmp_path / "deepasmr" / "train.log").read_text().splitlines()
    assert len(log) == len(kept) and all(map(str.startswith, log, kept))
    assert "attempt 0 of this job began" in done.stdout


def test_the_log_of_each_attempt_is_kept_while_it_runs_and_after_a_signal(tmp_path):
    """With a stand-in for the training that ends at SIGTERM with a code of its own, and leaves a process behind."""
    training = tmp_path / "training"
    training.write_text(
        "trap 'echo saved; echo why >&2; kill $left; exit 75' TERM; sleep 60 & left=$!; echo \"$*\"; wait; wait"
    )
    folder, script = tmp_path / "bucket" / "logs", str(LAUNCH / "keep_log.sh")
    run = subprocess.Popen(
        ["bash", script, str(folder), "bash", str(training), *ARGUMENTS],
        env=ENVIRONMENT | {"KEEP_SECONDS": "0.1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    began, said = run.stdout.readline(), run.stdout.readline()
    assert began.startswith("attempt on ") and said == " ".join(ARGUMENTS) + "\n"
    while not any(said in p.read_text() for p in folder.glob("*.log")):  # kept before it ends: a host may die
        assert run.poll() is None
    run.terminate()
    rest = run.communicate(timeout=60)[0]
    [log] = folder.glob("*.log")
    assert run.returncode == 75 and log.read_text() == began + said + rest and "saved\nwhy" in rest
    log.rename(folder / "first.log")  # names have seconds
    for code in (0, 2):
        (tmp_path / f"logs{code}").touch()  # a place that cannot keep anything stops nothing
        for place in (folder, tmp_path / f"logs{code}"):
            command = ["bash", script, str(place), "bash", "-c", f"exit {code}"]
            done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
            assert done.returncode == code and ("could not be kept" in done.stderr) == (place != folder)
    assert (folder / "first.log").read_text() == began + said + rest


@pytest.mark.parametrize(
    "count, code, said", [("3", 1, "worker 1 gave no log"), ("", 1, "no worker of n could be asked")]
)
def test_the_logs_of_the_workers_that_answer_are_fetched(tmp_path, count, code, said):
    """With a stand-in for gcloud whose worker 1 does not answer."""
    (tmp_path / "gcloud").write_text(
        f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n'
        f'case "$*" in *describe*) echo {count};; *worker=1*) exit 1;; esac\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    own = ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "ZONE": "z", "BUCKET": "b"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "collect", "n", str(tmp_path / "logs")],
        env=own, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code and said in done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "gs://b/logs/n" in calls and all((f"worker={i}" in calls) == bool(count) for i in range(3))


@pytest.mark.skipif(not shutil.which("pkill"), reason="needs pkill (procps)")
def test_a_tpu_vm_is_stopped_by_one_signal_and_its_log_is_in_the_bucket(tmp_path):
    """With stand-ins for gcloud and the training; pkill sees the processes of this test alone."""
    place = tmp_path / "deepasmr"
    for folder in (tmp_path / "bin", place / ".venv" / "bin", place / "launch", place / "deepasmr_jax"):
        folder.mkdir(parents=True)
    (place / ".venv" / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(LAUNCH / "keep_log.sh", place / "launch")
    (place / "deepasmr_jax" / "train.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('told to stop', flush=True))\n"
        "print(sys.argv[1:], flush=True)\nsignal.pause()\ntime.sleep(1)\nsys.exit(75)\n"
    )
    programs = {
        "gcloud": """for x in "$@"; do case "$x" in --command=*)
            x="${x#--command=}"$'\\n'wait; cd "$HOME" && bash -c "${x//\\/mnt\\/bucket/$HOME/bucket}";; esac; done""",
        "pkill": f'{shutil.which("pgrep")} --list-full --session 0 "${{@:2}}" >"$HOME/told"\n'
        f'exec {shutil.which("pkill")} "$1" --session 0 "${{@:2}}"',
        "mountpoint": '[ "$2" = "$HOME/bucket" ]',
        "pgrep": f'exec {shutil.which("pgrep")} --session 0 "$@"',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    own = ENVIRONMENT | {"PATH": f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}", "HOME": str(tmp_path)}
    own |= {"ZONE": "z", "BUCKET": "b", "script": str(LAUNCH / "tpu_vm.sh")}
    both = """bash "$script" run n "$@" & until grep -qs two "$HOME/deepasmr/train.log"; do sleep 0.1; done
        bash "$script" stop n  # waits for the last copy of the log"""
    command = ["bash", "-c", both, "both", *ARGUMENTS]
    session = subprocess.Popen(command, env=own, cwd=tmp_path, start_new_session=True)
    try:
        assert session.wait(timeout=60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session.pid, signal.SIGKILL)
    lines = (place / "train.log").read_text().splitlines()
    assert lines[0].startswith("attempt 1 of this run") and lines[1].startswith("attempt on ")
    assert lines[2:] == [str(ARGUMENTS), "told to stop"]  # one attempt
    told = [line.split(" ", 1)[1] for line in (tmp_path / "told").read_text().splitlines()]
    begins = ("bash -c for try in", ".venv/bin/python -m deepasmr_jax.train")
    assert len(told) == 2 and all(
        map(str.startswith, told, begins)
    )  # neither keep_log.sh, nor the remote shell
    [log] = (tmp_path / "bucket" / "logs" / "n").glob("*.log")
    assert log.read_text().splitlines() == lines[1:]


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch")))
def test_every_script_is_a_shell_script_that_bash_can_read(script):
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)]).returncode == 0
    if script in ("gke.sh", "tpu_vm.sh"):
        code, _, err = dry(script, "nonsense", "n", ZONE="z")
        assert code == 2 and ("unknown command nonsense" if script == "tpu_vm.sh" else "delete NAME") in err
        code, _, err = dry(script)
        assert code == 2 and "delete NAME" in err and all(x.startswith("#") for x in err.splitlines())


def test_the_built_in_model_is_made_step_by_step_and_a_run_that_was_stopped_goes_on(tmp_path):
    """With a stand-in for Python that notes its arguments, and is stopped in one stage; the features lack a record."""
    python = tmp_path / "python"
    python.write_text(
        """#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
  *"mini.py:$STOPPED "*) echo stopped early; exit "$(sed 's/.*--stopped-exit=//' <<<"$*")" ;;
  *add_features.py*)
    [ "$STOPPED" = features ] || { mkdir -p "${@: -1}" && touch "${@: -1}/dataset_info.json"; }
    exit 1 ;;
esac
"""
    )
    python.chmod(0o755)
    work = tmp_path / "two words"
    names = {"PYTHON": str(python), "LOG": str(tmp_path / "log"), "EXTRA_SET": "--set=steps=1"}

    def lines(stopped=""):
        (tmp_path / "log").write_text("")
        command = ["bash", str(LAUNCH / "mini.sh"), str(work)]
        done = subprocess.run(command, env=ENVIRONMENT | names | {"STOPPED": stopped}, capture_output=True)
        return done.returncode, (tmp_path / "log").read_text().splitlines()

    code, begun = lines("features")
    assert code == 1 and "data/add_features.py" in begun[-1]  # no dataset: a failure, not records left out
    code, first = lines("flow_normal")
    assert first[0] == begun.pop()
    first = begun + first
    assert code == 75 and "mini.py:flow_normal" in first[-1] and not any("mini.py:flow " in x for x in first)
    assert (work / "runs" / "flow_normal.log").read_text() == "stopped early\n"
    code, second = lines()
    assert code == 0 and second[0] == first[-1]
    assert lines() == (0, [])  # what is done is not run again
    runs = [x for x in first[:-1] + second if "deepasmr_jax.train" in x]
    stages = [re.search(r"mini\.py:(\w+)", x)[1] for x in runs]
    assert stages == [
        "speech_tokenizer",
        "speaker",
        "lm_normal",
        "lm",
        "flow_normal",
        "flow",
        "vocoder",
        "recognizer",
    ]
    assert all(
        f"--workdir={work}/runs/{s}" in x and "--set=steps=1 " in x for s, x in zip(stages, runs, strict=True)
    )
    assert f"init_from={work}/runs/lm_normal/export" in runs[3]


def test_an_environment_is_installed_once_for_each_folder_set_of_extras_and_setup(tmp_path):
    """With a stand-in for the Python of the environment."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    python, setup = tmp_path / "venv/bin/python", tmp_path / "setup.py"
    python.write_text('#!/usr/bin/env bash\necho "$*"\nexit "${CODE:-0}"\n')
    python.chmod(0o755)
    setup.touch()
    os.utime(setup, (1e9, 1e9))

    def installs(spec, **environment):
        command = f"set -e; source {shlex.quote(str(LAUNCH / 'environment.sh'))}; make_environment {spec}"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path,
            env=ENVIRONMENT | {"DEEPASMR_VENV": "venv"} | environment,
        )  # fmt: skip
        return "pip install" in done.stdout

    assert installs(".[zh]", CODE="1") and installs(".[zh]")  # one that failed is not taken for done
    assert not installs(".[zh]") and installs(".[dev]") and not installs(".[dev]")
    os.utime(setup, (4e9, 4e9))
    assert installs(".[dev]")


def test_the_runs_of_stage_two_differ_in_styles_alone_and_the_tables_of_the_mixture_are_joined(tmp_path):
    """With a stand-in for Python that notes its arguments and writes a table with one row."""
    python = tmp_path / "python"
    python.write_text(
        """#!/usr/bin/env bash
echo "$*" >>"$LOG"
while [ $# -gt 1 ]; do if [ "$1" = --out ]; then out="$2"; fi; shift; done
if [ -z "${out:-}" ]; then exit; fi
touch "$out/factors.json"
printf '%s\\n' '| row | words |' '|---|---|' '| text to N2A | 5 |' '' note >"$out/table.md"
"""
    )
    python.chmod(0o755)
    (tmp_path / "model").mkdir()
    names = dict(PYTHON=python, LOG=tmp_path / "log", MODEL=tmp_path / "model", EXTRA_SET="--set=steps=1")
    command = ["bash", str(LAUNCH / "mixture.sh"), "CORPUS", str(tmp_path / "out"), "FEATURES"]
    for _ in range(2):  # what is finished is not run again
        subprocess.run(command, env=ENVIRONMENT | {k: str(v) for k, v in names.items()}, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    runs = [x for x in lines if "deepasmr_jax.train" in x]
    assert len(lines) == 9 and len(runs) == 6
    value = lambda option, line: re.search(rf"--{option}=(\S+)", line)[1]
    for network in ("flow", "lm"):
        own = {
            value("export", x).split("/")[-1]: x for x in runs if value("config", x).endswith(f":{network}")
        }
        styles = {name: value("set=data.styles", x) for name, x in own.items()}
        assert styles == {"stage_one": "normal", "asmr_only": "asmr", "mixture": "normal,asmr"}
        starts = [re.findall(r"init_from=(\S+)", x) for x in own.values()]
        assert starts == [[], *[[str(tmp_path / "out/models/stage_one")]] * 2]
        same = lambda x: re.sub(r"--(workdir|export|set=(init_from|data\.style(s|_weights)))=\S+", "", x)
        assert same(own["asmr_only"]) == same(own["mixture"]) and "--set=steps=1 " in own["mixture"]
    rows = [x.split(" | ")[0] for x in (tmp_path / "out" / "table.md").read_text().splitlines()]
    models = ("stage one", "asmr only", "mixture")
    assert rows == ["| row", "|---|---|", *(f"| {name}, N2A" for name in models), "", "note"]
