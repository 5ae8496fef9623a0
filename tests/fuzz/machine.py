"""The public calls in any order, with faults in them, and with other people's hands on the model between them.

A call that raises has changed nothing. One that was interrupted has changed nothing or everything: what everything is,
a twin of the model shows, on which the same call runs undisturbed.
"""

from __future__ import annotations

import copy
import hashlib
import random
import signal
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tests.fuzz.faults import SORTS, Injected, Points
from tests.fuzz.folders import Net, net
from tests.fuzz.oracle import Finding
from torch import Tensor, nn

import adapterkit as ak

IDS = torch.arange(12).view(2, 6) % 6
NAMES = ("n0", "n1", "n2", "n3")
CONFIGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"r": 2, "target_modules": ["layers.0", "conv"]}),
    ("lora", {"r": 1, "target_modules": ["embed", "layers.1"], "modules_to_save": ["head"]}),
    ("lora", {"r": 2, "target_modules": ["layers.0", "layers.1"], "bias": "lora_only", "lora_alpha": 4}),
    ("lora", {"r": 2, "target_modules": ["layers.1"], "bias": "all"}),
    ("lora", {"r": 1, "target_modules": ["layers.0"], "init_lora_weights": "pissa"}),
    ("loha", {"r": 2, "target_modules": ["layers.0", "conv"]}),
    ("vera", {"r": 2, "target_modules": ["layers.0", "layers.1"]}),
)
# Ctrl-C comes somewhere inside the block, so what is half done there is the user's.
BLOCKS = ("activated", "disabled", "per_sample")
Call = Callable[["ak.Adapters"], object]


@dataclass(frozen=True)
class Seen:
    """All that a user can see of a model and its adapters."""

    names: tuple[str, ...]
    active: tuple[str, ...]
    merged: tuple[str, ...]
    configs: tuple[ak.AdapterConfig, ...]
    tensors: dict[str, str]
    trained: frozenset[str]
    classes: tuple[str, ...]
    status: str
    files: dict[str, str]
    output: Tensor

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> Seen:
        """Look at a model, and at the files of its adapters."""
        adapters = ak.attach(model)
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        try:
            with torch.no_grad():
                output = model(IDS)
        except ak.StateError:  # an adapter is active whose module was replaced: said once, at the first forward
            output = torch.empty(0)
        return cls(
            adapters.names,
            adapters.active,
            adapters.merged,
            tuple(adapters.config(name) for name in adapters.names),
            {name: _hash(_bytes(tensor)) for name, tensor in tensors.items()},
            frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad),
            tuple(f"{name}: {type(m).__name__}" for name, m in model.named_modules(remove_duplicate=False)),
            "\n".join(line for line in str(adapters.status()).splitlines() if "never ran" not in line),
            {str(p.relative_to(folder)): _hash(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()},
            output,
        )

    def differs(self, other: Seen, *, trained: bool = True) -> str:
        """What differs first; empty if nothing does. Without `trained`, whatever requires gradients."""
        for name in ("names", "active", "merged", "configs", "classes", "trained", "tensors", "status", "files"):
            if name in ("trained", "status") and not trained:
                continue
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                if isinstance(ours, dict):
                    ours, theirs = ({k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)}, "")
                elif isinstance(ours, frozenset):
                    ours, theirs = ours - theirs, theirs - ours
                return f"{name}: {ours} {theirs}"
        if not self.output.numel() or not other.output.numel():
            return ""
        same = self.output.shape == other.output.shape and torch.allclose(
            self.output, other.output, rtol=1e-4, atol=1e-5, equal_nan=True
        )
        return "" if same else "the model's output"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bytes(data.tolist())


class World:
    """A model, its adapters, a folder of saved ones, and somebody who draws what happens next."""

    def __init__(self, dice: random.Random, *, others: bool = True) -> None:
        self.dice, self.others = dice, others
        self.steps = self.faults = 0
        self.temporary = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.folder = Path(self.temporary.name)
        self.model: nn.Module = net()
        self.untouched = True  # by others
        self.base = {name: _bytes(t) for name, t in self.model.state_dict().items()}
        self.done: list[str] = []
        self.why = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.temporary.cleanup()

    @property
    def adapters(self) -> ak.Adapters:
        """Those of the model."""
        return ak.attach(self.model)

    def step(self) -> None:
        """One call, now and then with a fault in it, or one deed of somebody else.

        Raises:
            Finding: something does not hold.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.others and self.dice.random() < 0.12:
                    self._somebody_else()
                elif self.dice.random() < 0.04:
                    self._detach()
                else:
                    self._call(*self._drawn())
        except Finding as finding:
            raise Finding(f"{finding}\n  after {'; '.join(self.done)}") from finding

    # Calls

    def _any(self) -> str:
        return self.dice.choice([*self.adapters.names, *self.adapters.names, *NAMES])

    def _drawn(self) -> tuple[str, Call]:
        dice = self.dice
        one, two, free = self._any(), self._any(), dice.choice(NAMES)
        method, fields = dice.choice(CONFIGS)
        trainable, flag = dice.random() < 0.5, dice.random() < 0.5
        heads = dice.choice([None, None, None, one])
        saved = sorted(p.name for p in self.folder.iterdir()) or ["nothing"]
        source = self.folder / dice.choice(saved)
        seed = dice.randrange(1000)
        weight, kept = dice.choice([1.0, -0.5, 0.3]), dice.random() < 0.9

        def add(a: ak.Adapters) -> None:
            a.add(free, ak.config(method, **fields), activate=flag)

        def train(a: ak.Adapters) -> None:
            with torch.no_grad():
                for p in a.parameters(one):
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)

        def in_block(a: ak.Adapters) -> None:
            with a.activated(one, trainable=trainable, heads=heads):
                a.model(IDS)

        def disabled(a: ak.Adapters) -> None:
            with a.disabled():
                a.model(IDS)

        def rows(a: ak.Adapters) -> None:
            with a.per_sample([one, None]):
                a.model(IDS)

        calls: dict[str, Call] = {
            f"add {method} {fields} as {free}, activate={flag}": add,
            f"train {one}": train,
            f"save {one}": lambda a: a.save(one, self.folder / one),
            f"load {source.name} as {free}": lambda a: a.load(source, free, activate=flag, trainable=trainable),
            f"activate {one}": lambda a: a.activate(one, trainable=trainable),
            f"activate {one}, {two}, heads={heads}": lambda a: a.activate(one, two, trainable=trainable, heads=heads),
            "activate none": lambda a: a.activate(),
            f"activated {one}": in_block,
            "disabled": disabled,
            f"merge {one}, keep_base={kept}": lambda a: a.merge(one, safe=flag, keep_base=kept, untie=trainable),
            f"merge {one}, {two}": lambda a: a.merge(one, two, untie=trainable, heads=heads),
            "unmerge": lambda a: a.unmerge(),
            f"combine {one}, {two} as {free}": lambda a: a.combine(free, {one: weight, two: 1.0}, heads=heads),
            f"convert {one} as {free}": lambda a: a.convert(one, to="lora", name=free, rank=4 if flag else None),
            f"swap {source.name} into {one}": lambda a: a.swap(one, source),
            f"rename {one} to {free}": lambda a: a.rename(one, free),
            f"copy {one} to {free}": lambda a: a.copy(one, free),
            f"remove {one}": lambda a: a.remove(one),
            f"load_state_dict {one} from {two}": lambda a: a.load_state_dict(one, a.state_dict(two)),
            f"per_sample {one}": rows,
        }
        names = list(calls)
        early = [n for n in names if n.startswith(("add", "train", "save"))]
        name = dice.choice(early if len(self.adapters.names) < 2 and dice.random() < 0.5 else names)
        return name, calls[name]

    def _call(self, name: str, call: Call) -> None:
        self.steps += 1
        seed = self.dice.randrange(2**31)
        before = Seen.of(self.model, self.folder)
        fault = self.dice.choice(["", *SORTS])
        if name.startswith("train") or (fault == "interrupt" and name.startswith(("save", *BLOCKS))):
            fault = ""  # `train` is no call of the library; how files are written is for the kills
        if name.endswith("keep_base=False") and fault != "interrupt":
            fault = ""  # what was added is subtracted again then: the last bits may differ
        if not fault:
            self.done.append(name)
            if self._refused(call, seed, name) and (
                what := Seen.of(self.model, self.folder).differs(before, trained=not name.startswith(BLOCKS))
            ):
                raise Finding(f"{name!r} was refused and changed {what}")
            return
        self.faults += 1
        points = Points()
        twin, after = self._twin(call, seed, SORTS[fault][0](points))
        number = self.dice.randint(1, points.seen) if points.seen else -1
        self.done.append(f"{name} [{fault} {number} of {points.seen}]")
        raised = self._disturbed(call, seed, SORTS[fault][0](Points(number, SORTS[fault][1])), name)
        what = f"{name!r} ({fault}, {number} of {points.seen})"
        now = Seen.of(self.model, self.folder)
        again = raised and name == "unmerge" and bool(now.merged)  # it says that it goes on where it stopped
        changed = now.differs(before, trained=not name.startswith(BLOCKS))  # a block's end says anew what trains
        if changed and not again:
            self._judge_change(what, changed, now.differs(after), failed=raised and fault != "interrupt")
        elif after.differs(before):  # a second try must do it
            if self._refused(call, seed, name):
                raise Finding(f"{what} failed, and is refused after that: {self.why}")
            if left := Seen.of(self.model, self.folder).differs(after):
                raise Finding(f"{what} failed, and repeated it is not the same: {left}")
        del twin

    @staticmethod
    def _judge_change(what: str, changed: str, left: str, *, failed: bool) -> None:
        if failed:
            raise Finding(f"{what} failed and changed {changed}")
        if left:
            raise Finding(f"{what} was half done: {changed}; missing {left}")

    def _refused(self, call: Call, seed: int, name: str) -> bool:
        torch.manual_seed(seed)
        try:
            call(self.adapters)
        except ak.AdapterError as error:
            self.why = str(error)
            return True
        except Exception as error:
            raise Finding(f"{name!r} raised {type(error).__name__}: {error}") from error
        return False

    def _twin(self, call: Call, seed: int, counting: Any) -> tuple[nn.Module, Seen]:
        """A copy of the model after the call, and what is seen then."""
        state = _files(self.folder)
        twin = copy.deepcopy(self.model)
        torch.manual_seed(seed)
        try:
            with counting:
                call(ak.attach(twin))
        except ak.AdapterError:
            pass
        except Exception as error:
            raise Finding(f"on a copy of the model: {type(error).__name__}: {error}") from error
        seen = Seen.of(twin, self.folder)
        _restore(self.folder, state)
        return twin, seen

    def _disturbed(self, call: Call, seed: int, fault: Any, name: str) -> bool:
        torch.manual_seed(seed)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with fault:
                call(self.adapters)
        except (ak.AdapterError, Injected, KeyboardInterrupt):
            return True
        except Exception as error:
            raise Finding(f"{name!r} with a fault raised {type(error).__name__}: {error}") from error
        finally:
            signal.signal(signal.SIGINT, before)
        return False

    # What is no call of the library

    def _somebody_else(self) -> None:
        dice, model = self.dice, self.model
        assert isinstance(model, Net)
        deeds: dict[str, Callable[[], object]] = {
            "replace a layer": lambda: model.layers.__setitem__(dice.randrange(2), nn.Linear(4, 4)),
            "replace the head": lambda: setattr(model, "head", nn.Linear(4, dice.choice([3, 5]))),
            "freeze all": lambda: model.requires_grad_(False),
            "thaw a weight": lambda: model.layers[0].weight.requires_grad_(True),
            "tie two layers": lambda: setattr(model.layers[1], "weight", model.layers[0].weight),
            "train and eval": lambda: model.train().eval(),
            "load its own state": lambda: model.load_state_dict(copy.deepcopy(model.state_dict())),
        }
        # What is written to while it is merged is refused then, and a copy of the model does not know it.
        name = dice.choice([*deeds] if not self.adapters.merged else ["train and eval"])
        self.untouched &= name in ("train and eval", "load its own state")
        self.done.append(f"[somebody: {name}]")
        deeds[name]()

    def _detach(self) -> None:
        self.done.append("detach")
        try:
            model = self.adapters.detach()
        except ak.StateError:  # the base was not kept
            self.model, self.untouched = net(), True
            return
        if any("adapter" in type(m).__name__.lower() for m in model.modules()) or any(
            "adapter" in name for name in (*dict(model.named_modules()), *model.state_dict())
        ):
            raise Finding("detach left adapters behind")
        if self.untouched:
            if {name: _bytes(t) for name, t in model.state_dict().items()} != self.base:
                raise Finding("detach did not give the base back")
            if not all(p.requires_grad for p in model.parameters()):
                raise Finding("detach left parameters frozen")


def _files(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _restore(folder: Path, state: dict[Path, bytes]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder) not in state:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for path, data in state.items():
        if not (folder / path).is_file() or (folder / path).read_bytes() != data:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
