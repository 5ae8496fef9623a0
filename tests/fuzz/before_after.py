"""What two versions of the library say of the same damaged adapters: `python -m tests.fuzz.before_after`.

    make FOLDER COUNT        damaged adapters, as the fuzz draws them
    run FOLDER RESULTS       with each version: what every call returns, warns of and writes, as JSON
    compare BEFORE AFTER     the calls that differ

Changes to how files are read, matched and written are made between two such runs. The suite does not see what it does
not look for: a float8 head, a key of a layer that is not there, another order of the keys in a message.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.fuzz import folders
from torch import Tensor

import adapterkit as ak
from adapterkit.files import WEIGHTS_FILE

# Tensors are equal if their bytes are; the paths of temporary folders differ at every run.
OUT = "/<out>/"


def make(folder: Path, count: int) -> None:
    """Write the sound adapters, and `count` damaged ones."""
    known = folders.seeds(folder / "sound")
    for number in range(count):
        place = folder / "odd" / f"{number:04d}"
        place.mkdir(parents=True)
        for name, data in folders.draw(random.Random(number), known).files().items():
            (place / name).write_bytes(data)


def run(folder: Path) -> dict[str, Any]:
    """For each adapter and call: what it returned or raised, its warnings, and the files that it wrote."""
    base, results = folders.net().to("meta"), {}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        for number, odd in enumerate(sorted((folder / "odd").iterdir())):
            given = odd / "a.safetensors" if (odd / "a.safetensors").exists() else odd
            for name, call in _calls(given, folder / "sound" / "lora", out, base if number % 2 else None).items():
                results[f"{odd.name} {name}"] = _outcome(call, out)
    return results


def _calls(odd: Path, sound: Path, out: Path, base: Any) -> dict[str, Callable[[], object]]:
    def on_model(call: Callable[[ak.Adapters], object]) -> list[str]:
        adapters = ak.attach(folders.net())
        return [str(call(adapters)), _digest(adapters.state_dict("x"))]

    def swap(adapters: ak.Adapters) -> object:
        adapters.load(sound, "x")
        return adapters.swap("x", odd)

    def give(adapters: ak.Adapters) -> object:
        adapters.load(sound, "x")
        return adapters.load_state_dict("x", load_file(odd / WEIGHTS_FILE), strict=False)

    given: dict[str, Any] = {"base": base, "overwrite": True}
    return {
        "inspect": lambda: str(ak.inspect_adapter(odd, base=base)),
        "diff": lambda: str(ak.diff_adapters(odd, sound, base=base)),
        "concat": lambda: str(ak.combine_files({odd: 0.5, sound: 0.5}, out, heads="concat", **given)),
        "average": lambda: str(ak.combine_files({sound: 0.5, odd: 0.75}, out, heads="average", rank=2, **given)),
        "truncate": lambda: str(ak.convert_file(odd, out, rank=1, **given)),
        "as it is": lambda: str(ak.convert_file(odd, out, **given)),
        "kohya": lambda: str(ak.convert_file(odd, out / "a.safetensors", naming="kohya", heads="drop", **given)),
        "load": lambda: on_model(lambda adapters: adapters.load(odd, "x")),
        "load what fits": lambda: on_model(lambda adapters: adapters.load(odd, "x", strict=False)),
        "swap": lambda: on_model(swap),
        "load_state_dict": lambda: on_model(give),
    }


def _outcome(call: Callable[[], object], out: Path) -> list[Any]:
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            found = call()
        except Exception as error:  # noqa: BLE001 - one that is not an AdapterError is a finding too
            found = [type(error).__name__, str(error).partition("\nException raised from")[0]]
    said = [str(w.message) for w in seen if issubclass(w.category, ak.AdapterWarning)]
    written = {}
    for file in sorted(out.rglob("*")) if out.exists() else ():
        text = file.read_text(encoding="utf-8") if file.suffix == ".json" else ""
        written[file.name] = text or hashlib.sha256(file.read_bytes()).hexdigest()
    return json.loads(json.dumps([found, said, written]).replace(f"{out.parent}/", OUT))  # type: ignore[no-any-return]


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for key in sorted(tensors):
        raw = tensors[key].detach().contiguous().reshape(-1).view(torch.uint8)
        found.update(f"{key} {tensors[key].dtype}".encode() + raw.numpy().tobytes())
    return found.hexdigest()


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How many calls differ, and each that does."""
    changed = [name for name in before if before[name] != after.get(name)]
    counts = Counter(name.partition(" ")[2] for name in changed)
    lines = [f"{len(changed)} of {len(before)} calls differ. {dict(counts)}"]
    for name in changed:
        for what, one, other in zip(
            ("returned", "warned", "wrote"), before[name], after.get(name, [0] * 3), strict=True
        ):
            lines += [f"{name} {what}", f"  - {one}", f"  + {other}"] if one != other else []
    return "\n".join(lines)


def main(task: str, place: Path, other: str) -> None:
    """See the module."""
    if task == "make":
        make(place, int(other))
    elif task == "run":
        Path(other).write_text(json.dumps(run(place)), encoding="utf-8")
    else:
        print(compare(json.loads(place.read_text()), json.loads(Path(other).read_text())))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
