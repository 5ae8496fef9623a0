"""Processes killed at a random moment while they write: what is there then is the old version or the new one, whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.oracle import Finding

from adapterkit.disk.merge_files import LOCK
from adapterkit.files import as_bytes, read
from adapterkit.formats import CONFIG_FILE

ROOT = Path(__file__).parents[2]
VERSIONS = 3
# Each writes a version to `out`, from what is in the folder `here`.
WORKS = {
    "save": "adapters[i].save('a', out)",
    "combine_files": "ak.combine_files({here / f'a{i}': 0.5, here / 'a0': 1.0 + i}, out, heads='a0', overwrite=True)",
    "merge_checkpoint": "ak.merge_checkpoint(here / 'base', here / f'a{i}', out, overwrite=True)",
}
SCRIPT = """
import itertools, os, signal, sys, warnings
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import adapterkit as ak
import transformers
from tests.models import build
here = Path(sys.argv[1])
model = build("bert")
transformers.utils.logging.disable_progress_bar()
model.save_pretrained(here / "base", max_shard_size="20KB")
adapters = []
for i in range({versions}):
    adapters.append(ak.attach(build("bert")))
    config = ak.config("lora", r=2 + i // 2, lora_alpha=i + 1, target_modules=["query", "value"])
    adapters[i].add("a", config)
    with torch.no_grad():
        for parameter in adapters[i].parameters("a"):
            parameter.fill_(0.1 * (i + 1))
    adapters[i].save("a", here / f"a{{i}}")
def write(work, i, out):
    exec(work, globals() | dict(i=i, out=out))
works = {works!r}
for name, work in works.items():
    for i in range({versions}):
        write(work, i, here / name / f"version{{i}}")
    write(work, 0, here / name / "out")
print("ready", flush=True)
for line in sys.stdin:  # each line: a child that does this work until it is killed
    child = os.fork()
    if not child:
        for i in itertools.cycle(range({versions})):
            write(works[line.strip()], i, here / line.strip() / "out")
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


class Writer:
    """A process that writes versions to one place for each work, in children that are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = SCRIPT.format(root=str(ROOT), versions=VERSIONS, works=WORKS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"
        self.versions = {
            work: {_state(folder / work / f"version{i}"): f"version {i}" for i in range(VERSIONS)} for work in WORKS
        }
        assert all(len(found) == VERSIONS for found in self.versions.values())
        self.longest, self.last = dict.fromkeys(WORKS, 0.05), dict.fromkeys(WORKS, "")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill_and_look(self, work: str, dice: random.Random) -> str:
        """Let a child work for a random time, kill it, and say which version is there.

        Raises:
            Finding: none of them is.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{work}\n")
        self.process.stdin.flush()
        child = int(self._line())
        time.sleep(dice.uniform(0.0, self.longest[work]))
        os.kill(child, signal.SIGKILL)
        assert self._line() == "dead"
        found = self.versions[work].get(_state(self.folder / work / "out"))
        for path in (self.folder / work).glob(".*"):  # what a killed process had begun
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if found is None:
            raise Finding("a killed process left something that is no version")
        # A busy machine writes nothing in a short time; much more than one version in a long one tells nothing new.
        self.longest[work] = min(2.0, self.longest[work] * (1.2 if found == self.last[work] else 0.95))
        self.last[work] = found
        return found


def _state(folder: Path) -> tuple[tuple[str, str], ...]:
    """What an adapter's folder is read as; else each file's name and hash, without the file by which a merge holds it.

    A save that was cut between its two files leaves the old ones aside, where they are read.
    """
    if (folder / CONFIG_FILE).exists():
        found = read(folder)
        tensors = sorted((key, hashlib.sha256(as_bytes(tensor)).hexdigest()) for key, tensor in found.tensors.items())
        return (("config", json.dumps(found.config, sort_keys=True)), *tensors)
    return tuple(
        (str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    )
