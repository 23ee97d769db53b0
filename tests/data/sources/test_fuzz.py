"""Damaged files of every format, each read in a process of its own: no crash, no hang, no pair of two examples."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CHECKED = ("tfrecord", "array_record")
"""Formats whose records carry checksums: a changed byte must not come through."""

_PROGRAM = r"""
import json, os, shutil, signal, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, "{root}")
from tests.data.sources.test_contract import PAIRS, WRITERS
from m3ae_jax.data import images
from m3ae_jax.data.sources import open_format
from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.errors import UserError

key, checked, folder = sys.argv[1], sys.argv[2] == "1", Path(sys.argv[3])
os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
name, write = WRITERS[key]
(folder / "whole").mkdir()
# In a process of its own: some libraries start threads, which a fork would leave behind.
writer = os.fork()
if not writer:
    (folder / "path").write_text(write(folder / "whole", PAIRS))
    os._exit(0)
assert os.waitpid(writer, 0)[1] == 0
path = (folder / "path").read_text()
files = sorted(p for p in (folder / "whole").rglob("*") if p.is_file() and p.stat().st_size)
rng = np.random.default_rng(0)
pictures = {{image: i for i, (image, _) in enumerate(PAIRS)}}


def damaged(data):
    kind = rng.integers(3)
    if kind == 0:
        return data[: rng.integers(len(data))]
    out = bytearray(data)
    for _ in range(1 if kind == 1 else 20):
        out[rng.integers(len(out))] ^= 1 << rng.integers(8)
    return bytes(out)


def read(case):
    try:
        source = open_format(name, path.replace(str(folder / "whole"), str(case)), SourceOptions(), "data.train.")
        records = source.read(np.arange(len(source)))
    except UserError as error:
        assert "\n" not in str(error)
        return 3
    except OSError:
        return 4
    last = -1
    for record in records:
        image, caption = record.get("image", b""), record.get("caption", b"")
        if image in pictures:
            number = pictures[image]
            assert number > last, "out of order or twice"
            last = number
            # The caption is this picture's own, or one that was itself changed.
            others = {{c for _, c in PAIRS}} - {{PAIRS[number][1]}}
            assert caption not in others, "a caption of another picture"
        elif checked and image:
            raise AssertionError("a changed picture came through a checksum")
    return 0


results = {{"cases": 0, "read": 0, "stopped": 0, "failed": []}}
for number in range(int(sys.argv[4])):
    case = folder / f"case{{number}}"
    shutil.copytree(folder / "whole", case)
    victim = case / files[rng.integers(len(files))].relative_to(folder / "whole")
    victim.write_bytes(damaged(victim.read_bytes()))
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(read(case))
        except BaseException as error:
            (folder / "why").write_text(repr(error))
            os._exit(1)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = "hangs"
            break
        time.sleep(0.002)
    results["cases"] += 1
    if status == 0:
        results["read"] += 1
    elif status in (3 << 8, 4 << 8):
        results["stopped"] += 1
    else:
        why = (folder / "why").read_text() if status == 1 << 8 else ""
        results["failed"].append([number, str(victim), str(status), why])
    shutil.rmtree(case)
print(json.dumps(results))
"""


@pytest.mark.parametrize(
    "key", ["webdataset", "tfrecord", "array_record", "hdf5", "parquet", "folder", "tfds", "tfds of array_record"]
)
def test_damage_never_crashes_hangs_or_mispairs(key, tmp_path):
    arguments = [key, str(int(key in CHECKED)), str(tmp_path), "24"]
    program = _PROGRAM.format(root=ROOT)
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert results["failed"] == [] and results["cases"] == 24
    assert results["read"] > 0
