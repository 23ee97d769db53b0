"""The launch scripts: what they would do, what they refuse, and what they do when the cloud misbehaves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TPU = ["--name=run1", "--project=p", "--zone=us-east5-b", "--bucket=gs://my-bucket/", "--poll=0"]
GKE = ["--name=run1", "--image=gcr.io/p/m3ae:1", "--bucket=my-bucket"]
MAIN = ["--", "--config=configs/large.py", '--config.duration=5 "epochs"', "--config.data.train.path=a&b\\c"]
DRY_RUNS = {
    "tpu_vm_run": ["tpu_vm.sh", "run", *TPU, *MAIN],
    "tpu_vm_queued_spot": ["tpu_vm.sh", "up", *TPU, "--queued", "--spot", "--type=v6e-64"],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *TPU],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *TPU],
    "tpu_vm_delete": ["tpu_vm.sh", "delete", *TPU, "--queued"],
    "gke_start": ["gke.sh", "start", *GKE, "--slices=2", "--topology=2x2x4", *MAIN],
    "gke_one_host": ["gke.sh", "start", *GKE, "--topology=2x2", *MAIN],
    "gke_delete": ["gke.sh", "delete", *GKE],
    "slurm": ["slurm.sh", "--nodes=2", "--gpus=8", "--workdir=/shared/run 1", "--partition=gpu", *MAIN],
    "local": ["local.sh", "--processes=2", "--devices=4", *MAIN],
}


def launch(script, *arguments, path=None, **environment):
    environment = {**os.environ, "TMPDIR": "/tmp", **environment}
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_exactly_what_would_be_done(name, golden):
    script, *arguments = DRY_RUNS[name]
    place = arguments.index("--") if "--" in arguments else len(arguments)
    done = launch(script, *arguments[:place], "--dry_run", *arguments[place:], PYTHON="python")
    assert done.returncode == 0, done.stderr
    golden(f"launch/{name}.json", {"stdout": done.stdout.splitlines(), "stderr": done.stderr.splitlines()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu_vm.sh"], "no action"),
        (["tpu_vm.sh", "strat", *TPU], "unknown action 'strat'"),
        (["tpu_vm.sh", "up", "--name=a", "--zone=z"], "the project is missing: give --project=ID"),
        (["tpu_vm.sh", "up", "--name=a", "--project=p"], "the zone is missing: give --zone=ZONE"),
        (["tpu_vm.sh", "start", "--name=a", "--project=p", "--zone=z", *MAIN], "the bucket is missing"),
        (["tpu_vm.sh", "start", *TPU], "no arguments for m3ae_jax.main"),
        (["tpu_vm.sh", "up", *TPU, "--type=a100"], "--type=a100"),
        (["tpu_vm.sh", "up", *TPU, "--sopt"], "unknown option --sopt"),
        (["gke.sh", "start", "--name=a", "--image=i", *MAIN], "the bucket is missing"),
        (["gke.sh", "start", *GKE, "--name=Run_1", *MAIN], "--name=Run_1"),
        (["gke.sh", "start", *GKE, "--topology=4", *MAIN], "--topology=4"),
        (["slurm.sh", "--gpus=8", "--workdir=/x", *MAIN], "the number of nodes is missing"),
        (["local.sh", "--processes=0", *MAIN], "--processes=0"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(arguments, message):
    done = launch(arguments[0], *arguments[1:], path="/nonexistent")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and message in done.stderr


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs shellcheck, of the extra dev")
    scripts = [str(path.relative_to(ROOT)) for path in sorted(LAUNCH.glob("*.sh"))]
    done = subprocess.run([program, "-x", *scripts, ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


GCLOUD = r"""#!/usr/bin/env bash
# A cloud of one TPU: its state and label are files of $CLOUD; $CLOUD/script, if there, is asked first.
echo "$*" >> "$CLOUD/calls"
echo "Using ssh batch size of 1. Attempting to SSH into 1 nodes." >&2 # as the real one talks
[[ ! -f $CLOUD/script ]] || source "$CLOUD/script"
state() { cat "$CLOUD/state" 2>/dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }; }
case "$*" in
  *"tpu-vm describe"*labels*) state > /dev/null; cat "$CLOUD/label" ;;
  *"tpu-vm describe"*) state ;;
  *"queued-resources describe"*labels*) cat "$CLOUD/label" ;;
  *"queued-resources describe"*) cat "$CLOUD/queue" 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
  *"queued-resources create"*)
    echo m3ae-jax-launch > "$CLOUD/label"; echo ACTIVE > "$CLOUD/queue"; echo READY > "$CLOUD/state" ;;
  *"queued-resources delete"*) rm "$CLOUD/queue" ;;
  *"tpu-vm create"*) echo READY > "$CLOUD/state"; echo m3ae-jax-launch > "$CLOUD/label" ;;
  *"tpu-vm delete"*) rm "$CLOUD/state" ;;
  *"cat run.exit"*) cat "$CLOUD/exit" 2>/dev/null || true ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder with a fake `gcloud` and its state."""
    program = tmp_path / "gcloud"
    program.write_text(GCLOUD)
    program.chmod(0o755)
    return tmp_path


def tpu_vm(cloud, action, *arguments):
    done = launch("tpu_vm.sh", action, *TPU, *arguments, path=cloud, CLOUD=str(cloud))
    calls = (cloud / "calls").read_text().splitlines() if (cloud / "calls").exists() else []
    return done, [call for call in calls if " describe " not in call]


def verbs(calls):
    return [call.split()[3] for call in calls]


def test_a_slice_is_created_used_again_and_deleted(cloud):
    done, calls = tpu_vm(cloud, "up")
    assert done.returncode == 0 and verbs(calls) == ["create"], done.stderr
    done, calls = tpu_vm(cloud, "up")
    assert done.returncode == 0 and verbs(calls) == ["create"] and "is there already" in done.stderr
    done, calls = tpu_vm(cloud, "delete")
    assert done.returncode == 0 and verbs(calls) == ["create", "delete"]
    done, calls = tpu_vm(cloud, "delete")
    assert done.returncode == 0 and verbs(calls) == ["create", "delete"]


def test_what_others_made_is_never_deleted(cloud):
    (cloud / "label").write_text("somebody\n")
    for state in ("READY", "PREEMPTED"):
        (cloud / "state").write_text(state)
        done, calls = tpu_vm(cloud, "delete")
        assert done.returncode == 2 and "was not created by these scripts" in done.stderr and not calls
    done, calls = tpu_vm(cloud, "up")  # a preempted one of somebody else's is not replaced either
    assert done.returncode == 2 and not calls


def test_a_preempted_slice_is_created_anew(cloud):
    (cloud / "label").write_text("m3ae-jax-launch\n")
    (cloud / "state").write_text("PREEMPTED")
    done, calls = tpu_vm(cloud, "up")
    assert done.returncode == 0 and verbs(calls) == ["delete", "create"]


def test_a_cloud_that_fails_is_told_and_nothing_is_done(cloud):
    (cloud / "script").write_text('echo "ERROR: PERMISSION_DENIED: no rights on project p" >&2; exit 1\n')
    done, calls = tpu_vm(cloud, "up")
    assert done.returncode == 2 and not calls
    assert "gcloud failed with exit code 1: ERROR: PERMISSION_DENIED" in done.stderr


def test_a_create_that_fails_ends_the_script(cloud):
    (cloud / "script").write_text('case "$*" in *" create "*) echo "ERROR: no capacity" >&2; exit 1 ;; esac\n')
    done, calls = tpu_vm(cloud, "run", *MAIN)
    assert done.returncode != 0 and verbs(calls) == ["create"] and "no capacity" in done.stderr


def test_an_install_that_fails_starts_nothing(cloud):
    (cloud / "script").write_text('case "$*" in *" scp "*) echo "ERROR: worker 3: broken pipe" >&2; exit 1 ;; esac\n')
    done, calls = tpu_vm(cloud, "run", *MAIN)
    assert done.returncode != 0 and verbs(calls) == ["create", "scp"]


def test_a_slice_that_vanishes_while_it_is_waited_for_is_told(cloud):
    (cloud / "script").write_text('case "$*" in *"tpu-vm create"*) exit 0 ;; esac\n')
    done, _ = tpu_vm(cloud, "up")
    assert done.returncode == 2 and "is gone" in done.stderr


def test_a_queued_resource_is_waited_for_and_its_failure_told(cloud):
    done, calls = tpu_vm(cloud, "up", "--queued")
    assert done.returncode == 0 and "queued-resources create" in calls[0]
    (cloud / "state").unlink()
    (cloud / "queue").write_text("SUSPENDED")  # its spot capacity was taken back
    done, calls = tpu_vm(cloud, "up", "--queued")
    assert done.returncode == 0 and "asked for anew" in done.stderr
    assert [call.split()[2:4] for call in calls[1:]] == [["queued-resources", "delete"], ["queued-resources", "create"]]
    (cloud / "state").unlink()
    (cloud / "script").write_text(
        'case "$*" in *"queued-resources create"*) echo FAILED > "$CLOUD/queue"; exit ;; esac\n'
    )
    (cloud / "queue").unlink()
    done, _ = tpu_vm(cloud, "up", "--queued")
    assert done.returncode == 2 and "is FAILED" in done.stderr


def test_a_queued_resource_of_others_is_not_touched(cloud):
    (cloud / "label").write_text("somebody\n")
    for action in ("delete", "up"):
        for state in ("WAITING_FOR_RESOURCES", "SUSPENDED"):
            (cloud / "queue").write_text(state)
            done, calls = tpu_vm(cloud, action, "--queued")
            assert done.returncode == 2 and "was not created by these scripts" in done.stderr and not calls


def test_a_queue_that_cannot_be_asked_ends_the_script(cloud):
    (cloud / "script").write_text(
        'case "$*" in *"queued-resources describe"*) echo "ERROR: UNAVAILABLE" >&2; exit 1 ;; esac\n'
    )
    for action in ("up", "delete"):
        done, calls = tpu_vm(cloud, action, "--queued")
        assert done.returncode == 2 and "UNAVAILABLE" in done.stderr and not calls


def test_a_run_begins_again_after_a_preemption_and_ends_with_the_runs_code(cloud):
    (cloud / "script").write_text(
        """case "$*" in
  *"cat run.exit"*)
    if [[ ! -f $CLOUD/taken ]]; then touch "$CLOUD/taken"; echo PREEMPTED > "$CLOUD/state"
    else echo 0 > "$CLOUD/exit"; fi ;;
esac
"""
    )
    done, calls = tpu_vm(cloud, "run", *MAIN)
    assert done.returncode == 0, done.stderr
    assert "begins again" in done.stderr and "the run is done" in done.stderr
    starts = [call for call in calls if "m3ae_jax.main" in call]
    assert verbs(calls).count("create") == 2 and verbs(calls).count("delete") == 1 and len(starts) == 2
    (cloud / "script").unlink()
    (cloud / "exit").write_text("3")
    done, _ = tpu_vm(cloud, "run", *MAIN)
    assert done.returncode == 2 and "exit code 3" in done.stderr


@pytest.mark.parametrize("code", ["75", "137"])
def test_a_run_that_asks_for_it_is_started_again_unless_it_was_stopped(cloud, code):
    (cloud / "exit").write_text(code)
    done, calls = tpu_vm(cloud, "run", "--restarts=2", *MAIN)
    assert done.returncode == 2 and f"exit code {code} once more" in done.stderr
    assert sum("-m m3ae_jax.main" in call for call in calls) == 3
    (cloud / "script").write_text('[[ "$*" != *"ls run.stop"* ]] || echo run.stop\n')
    before = len(calls)
    done, calls = tpu_vm(cloud, "run", *MAIN)
    assert done.returncode == 2 and "was stopped and saved" in done.stderr
    assert sum("-m m3ae_jax.main" in call for call in calls[before:]) == 1


@pytest.mark.parametrize("program", ["sbatch", "kubectl", "gcloud"])
def test_a_missing_program_is_named(program, tmp_path):
    script = {
        "sbatch": ["slurm.sh", "--nodes=1", "--gpus=1", "--workdir=/x", *MAIN],
        "kubectl": ["gke.sh", "start", *GKE, *MAIN],
        "gcloud": ["tpu_vm.sh", "up", *TPU],
    }[program]
    for name in ("bash", "dirname", "git"):
        (tmp_path / name).symlink_to(shutil.which(name))
    command = [str(tmp_path / "bash"), str(LAUNCH / script[0]), *script[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and f"{program} is not installed" in done.stderr


def test_a_slurm_job_of_the_name_is_left_alone(tmp_path):
    for name, body in (("squeue", "echo 4711"), ("sbatch", "cat > $JOB; echo submitted")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    arguments = ["slurm.sh", "--nodes=1", "--gpus=2", "--workdir=/x", *MAIN]
    job = tmp_path / "job"
    done = launch(*arguments, path=tmp_path, JOB=str(job))
    assert done.returncode == 0 and "job 4711" in done.stderr and not job.exists()
    (tmp_path / "squeue").write_text("#!/usr/bin/env bash\n")
    done = launch(*arguments, path=tmp_path, JOB=str(job))
    assert done.returncode == 0 and "#SBATCH --ntasks-per-node=2" in job.read_text()


def test_gke_touches_no_jobset_of_others(tmp_path):
    program = tmp_path / "kubectl"
    program.write_text('#!/usr/bin/env bash\ncase $1 in get) echo -n "$OWNER" ;; apply) cat > "$APPLIED" ;; esac\n')
    program.chmod(0o755)
    applied = tmp_path / "applied"
    arguments = ["gke.sh", "start", *GKE, *MAIN]
    done = launch(*arguments, path=tmp_path, OWNER="run1 somebody", APPLIED=str(applied))
    assert done.returncode == 2 and "did not create" in done.stderr and not applied.exists()
    done = launch(*arguments, path=tmp_path, OWNER="", APPLIED=str(applied))
    assert done.returncode == 0 and "kind: JobSet" in applied.read_text()


def test_local_runs_all_processes_and_ends_them_together(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\n[[ "$*" != *process_index=1* ]] || exit 7\nexec sleep 50\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "local.sh"), "--processes=2", *MAIN],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python)},
        timeout=40,
        capture_output=True,
    )
    assert done.returncode == 7


@pytest.mark.parametrize(("code", "restarts", "starts"), [(75, 2, 3), (137, 1, 2), (7, 2, 1), (75, 0, 1)])
def test_local_starts_again_what_was_preempted_or_lost_a_process(tmp_path, code, restarts, starts):
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n[[ "$*" != *process_index=1* ]] || exit {code}\nexec sleep 50\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "local.sh"), "--processes=2", f"--restarts={restarts}", *MAIN],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls")},
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    # Process 0 may be ended before it has written its line.
    assert (tmp_path / "calls").read_text().count("process_index=1") == starts
