"""Merging on disk when things go wrong: a kill at any moment, a full disk, two runs at once; and its memory."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.disk.merging import Setting, assert_same_folder, in_child, peak, save_adapters, save_base
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit as ak
from adapterkit.disk import merge_files
from adapterkit.disk.merge_files import LOCK, MANIFEST
from adapterkit_lora import LoraConfig

SETTING = Setting("llama", [LoraConfig(target_modules=["q_proj", "down_proj"], r=2)], torch.bfloat16, "2KB")
KILLED, PARTIAL = -signal.SIGKILL, ".out.partial"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several shards, an adapter, and the merged model as an undisturbed run writes it."""
    root = tmp_path_factory.mktemp("world")
    cls = save_base(SETTING, root / "base")
    save_adapters(SETTING, root / "base", cls, root)
    ak.merge_checkpoint(root / "base", root / "a", root / "expected")
    return root


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder for outputs; the inputs are afterwards as they were."""
    before = {p: p.read_bytes() for p in world.rglob("*") if p.is_file()}
    yield tmp_path
    assert {p: p.read_bytes() for p in world.rglob("*") if p.is_file()} == before


def merge(world: Path, out: Path, **options: Any) -> ak.MergeReport:
    return ak.merge_checkpoint(world / "base", world / "a", out, **options)


class Counter:
    """Counts the steps that change the disk, and kills this process before the one of a given number."""

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last = 0, last

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    def run(self, world: Path, out: Path, **options: Any) -> int:
        """Merge; how many steps that were."""
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                *((os, name) for name in ("write", "fsync")),
                *((Path, name) for name in ("rename", "replace", "unlink", "mkdir")),
                (merge_files, "exchange"),
                (shutil, "copyfile"),
            ):
                patch.setattr(owner, name, self.wrap(getattr(owner, name)))
            merge(world, out, **options)
        return self.count


def killed(world: Path, out: Path, moment: int, **options: Any) -> int:
    return in_child(lambda: Counter(moment).run(world, out, **options))


def test_killed_at_any_moment_and_resumed_the_bytes_are_the_same(world: Path, place: Path) -> None:
    steps = Counter().run(world, place / "count")
    moments = {*random.Random(0).sample(range(1, steps + 1), 12), steps - 1, steps}
    resumed = 0
    for moment in moments:
        out = place / f"out{moment}"
        status = killed(world, out, moment)
        assert status in (KILLED, 0)
        if not out.exists():
            assert out.with_name(f".{out.name}.partial").is_dir()
            report = merge(world, out, resume=True)
            resumed += len(report.resumed)
        (out / LOCK).unlink(missing_ok=True)  # all that a kill after the last rename can leave
        assert_same_folder(world / "expected", out)
    assert resumed > 0


def test_killed_while_it_replaces_there_is_always_one_whole_model(world: Path, place: Path) -> None:
    old = place / "old"
    shutil.copytree(world / "base", old)
    shutil.copytree(old, place / "count")
    steps = Counter().run(world, place / "count", overwrite=True)
    for moment in [*random.Random(1).sample(range(1, steps - 8), 4), *range(steps - 8, steps + 1)]:
        out = place / f"out{moment}"
        shutil.copytree(old, out)
        killed(world, out, moment, overwrite=True)
        (out / LOCK).unlink(missing_ok=True)
        new = (out / MANIFEST).exists()
        assert_same_folder(world / "expected" if new else old, out)


@pytest.fixture(scope="module")
def broken_off(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed when a part was finished."""
    root = tmp_path_factory.mktemp("begun")
    assert killed(world, root / "out", Counter().run(world, root / "count") // 2) == KILLED
    return root / PARTIAL


@pytest.fixture
def begun(broken_off: Path, place: Path) -> Path:
    return shutil.copytree(broken_off, place / PARTIAL)


def test_without_resume_it_begins_anew(begun: Path, world: Path, place: Path) -> None:
    assert merge(world, place / "out").resumed == ()
    assert_same_folder(world / "expected", place / "out")


def test_a_run_with_other_inputs_is_not_resumed(begun: Path, world: Path, place: Path) -> None:
    for options in ({"safe": True}, {"untie": True}):
        with pytest.raises(ak.StateError, match=r"was begun with other inputs or arguments \(arguments differ\)"):
            merge(world, place / "out", resume=True, **options)
    other = shutil.copytree(world / "base", place / "base")
    with next(other.glob("*00001*")).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x17")
    with pytest.raises(ak.StateError, match=r"\(base differ\)"):
        ak.merge_checkpoint(other, world / "a", place / "out", resume=True)
    for damaged in ("{", "[]", "{}", '{"inputs": []}'):
        (begun / MANIFEST).write_text(damaged)
        with pytest.raises(ak.StateError, match="is damaged, so it is not known what is finished"):
            merge(world, place / "out", resume=True)


@pytest.mark.parametrize("damage", ["size", "gone", "link"])
def test_a_finished_file_that_is_not_whole_is_written_again(damage: str, begun: Path, world: Path, place: Path) -> None:
    file = min(begun.glob("*.safetensors"))
    if damage == "size":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
        if damage == "link":
            file.symlink_to(world / "base" / file.name)
    assert file.name not in merge(world, place / "out", resume=True).resumed
    assert_same_folder(world / "expected", place / "out")


def test_two_runs_at_once_on_one_output_are_refused(world: Path, place: Path) -> None:
    refused = pytest.raises(ak.StateError, match=r"Another process is merging into .*out. Wait for it")
    with merge_files.partial_folder(place / "out"), refused:
        merge(world, place / "out")
    merge(world, place / "out")
    assert_same_folder(world / "expected", place / "out")


# The output's place


@pytest.mark.parametrize("how", ["in one step", "where systems cannot exchange", "behind a link", "an empty folder"])
def test_an_output_is_replaced_when_asked(how: str, world: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "an empty folder":  # which nobody has to ask for
        (place / "out").mkdir()
        merge(world, place / "out")
    else:
        shutil.copytree(world / "base", place / "out")
        with pytest.raises(ak.SaveError, match=r"exists already. Say overwrite=True"):
            merge(world, place / "out")
        assert_same_folder(world / "base", place / "out")
        if how.startswith("where"):
            monkeypatch.setattr(merge_files, "exchange", lambda *folders: False)
        out = place / "out"
        if how == "behind a link":
            out = place.with_name(f"{place.name}.link")
            out.symlink_to(place / "out")
        assert merge(world, out, overwrite=True).out == place / "out"
    assert_same_folder(world / "expected", place / "out")
    assert sorted(p.name for p in place.iterdir()) == ["out"]


def _made(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (lambda place: _made(place / "file"), "is a file; the output is a folder"),
    "below a file": (lambda place: _made(place / "file") / "out", "Not a directory.* are as they were.$"),
    "a folder of other things": (
        lambda place: _made(place / "thesis" / "chapter1.tex").parent,
        "holds chapter1.tex and no model, so it is not replaced",
    ),
    "something at the partial's place": (
        lambda place: _made(place / PARTIAL / "mine").parent.with_name("out"),
        "is in the way: it is not an unfinished merge",
    ),
}


@pytest.mark.parametrize(("where", "text"), PLACES.values(), ids=PLACES.keys())
def test_an_output_that_cannot_be_one_is_refused(
    where: Callable[[Path], Path], text: str, world: Path, place: Path
) -> None:
    out = where(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(ak.SaveError, match=text):
        merge(world, out, overwrite=True)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("inside", ["base", "base/merged", "a", "a/merged", ".", "/"])
def test_an_output_that_overlaps_an_input_is_refused(inside: str, world: Path, place: Path) -> None:
    with pytest.raises(ak.UsageError, match="lie in each other; give the output a folder of its own"):
        merge(world, world / inside, overwrite=True)


def test_an_output_that_was_made_meanwhile_is_left_alone(world: Path, place: Path) -> None:
    def meanwhile(done: int, total: int) -> None:
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / "x").touch()

    with pytest.raises(ak.SaveError, match=r"has been made meanwhile. The merged model is in "):
        merge(world, place / "out", progress=meanwhile)
    assert [p.name for p in (place / "out").iterdir()] == ["x"]


# Disks


def test_a_limit_on_files_in_the_middle_leaves_all_as_it_was_and_can_be_resumed(world: Path, place: Path) -> None:
    def work() -> None:
        with pytest.raises(ak.SaveError, match="resume=True goes on from there"):
            merge(world, place / "out", progress=lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))

    assert in_child(work) == 0
    assert not (place / "out").exists()
    merge(world, place / "out", resume=True)
    assert_same_folder(world / "expected", place / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(small_disk: Path, world: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(60 << 10))
    with pytest.raises(ak.SaveError, match=r"The output needs [\d,]+ more bytes, and .* has [\d,]+ free"):
        merge(world, small_disk / "out")
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up_leaves_the_old_output_and_can_be_resumed(small_disk: Path, world: Path) -> None:
    def fill(done: int, total: int) -> None:
        with contextlib.suppress(OSError), (small_disk / "filler").open("ab") as file:
            file.write(bytes(64 << 10))

    with pytest.raises(ak.SaveError, match="No space left on device") as caught:
        merge(world, small_disk / "out", progress=fill)
    assert "The base, and what was at" in str(caught.value)
    (small_disk / "filler").unlink()
    merge(world, small_disk / "out", resume=True)
    assert_same_folder(world / "expected", small_disk / "out")


def test_a_file_gets_its_name_when_it_is_on_the_disk(world: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    fsync, replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in synced
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    merge(world, place / "out")


def test_an_error_while_a_file_is_flushed_is_reported(
    world: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ak.SaveError, match="the disk is gone"):
        merge(world, place / "out")


def test_a_base_that_becomes_shorter_is_an_error(world: Path, place: Path) -> None:
    base = shutil.copytree(world / "base", place / "base")

    def cut(done: int, total: int) -> None:
        for file in base.glob("*.safetensors"):
            os.truncate(file, 8)

    with pytest.raises(ak.SaveError, match="a file of the base has become shorter"):
        ak.merge_checkpoint(base, world / "a", place / "out", progress=cut)


def test_safe_finds_values_that_are_not_finite_and_leaves_nothing(world: Path, place: Path) -> None:
    adapter = shutil.copytree(world / "a", place / "a")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(t for k, t in tensors.items() if "lora_B" in k)[0, 0] = float("inf")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ak.StateError, match="gives values that are not finite"):
        ak.merge_checkpoint(world / "base", adapter, place / "out", safe=True)
    assert sorted(p.name for p in place.iterdir()) == ["a"]
    merge(world, place / "fine", safe=True)
    for file in (world / "expected").glob("*.safetensors"):
        assert file.read_bytes() == (place / "fine" / file.name).read_bytes()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    found = {}
    for layers in (4, 40):
        root = tmp_path / str(layers)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
        config = LlamaConfig(vocab_size=64, num_hidden_layers=layers, dtype="bfloat16", **sizes)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(root / "base")
        adapters = ak.attach(model)
        adapters.add("a", LoraConfig(target_modules="all-linear", r=1, init_lora_weights=False))
        adapters.save("a", root / "a")
        del model, adapters

        def work(root: Path = root) -> None:
            ak.merge_checkpoint(root / "base", root / "a", root / "out", overwrite=True)

        found[layers] = peak(work, root / "peak"), (root / "base/model.safetensors").stat().st_size
    (small, few), (large, many) = found[4], found[40]
    assert many - few > 40 << 20
    assert large - small < (many - few) // 5, found
