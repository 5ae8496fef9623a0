"""What is written goes where it was asked to, whole, and nothing of others is touched."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.command.conftest import run
from tests.models import build
from tests.processes import python

import adapterkit as ak
from adapterkit import files
from adapterkit.files import PICKLE_FILE, WEIGHTS_FILE
from adapterkit.formats import CONFIG_FILE

CONFIG, TENSORS = {"peft_type": "LORA", "r": 1}, {"a": torch.ones(2)}
linux = pytest.mark.skipif(sys.platform != "linux", reason="devices, pipes and modes of files")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    place = tmp_path / "adapter"
    prefix = "base_model.model.query"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(1, 4), f"{prefix}.lora_B.weight": torch.ones(4, 1)}
    files.write_folder(place, CONFIG | {"target_modules": ["query"]}, tensors, {})
    return place


def page_of(adapter: Path, out: Path) -> None:
    done = run("report", str(adapter), "--out", str(out))
    assert (done.exit_code, done.stderr) == (0, "")


@linux
def test_a_page_goes_into_a_pipe_and_the_pipe_stays(adapter: Path, tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text(encoding="utf-8")))
    reader.start()
    page_of(adapter, pipe)
    reader.join(60)
    assert read[0].startswith("<!DOCTYPE html>")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@linux
def test_a_device_stays_a_device(adapter: Path, tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.write_bytes(b"it works")
    except OSError:
        pytest.skip("only root makes devices, on disks that allow them")
    page_of(adapter, device)
    assert stat.S_ISCHR(device.stat().st_mode)


@linux
def test_the_file_behind_a_link_is_replaced_and_the_link_stays(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    page, link = tmp_path / "pages" / "page.html", tmp_path / "link.html"
    page.write_text("<!DOCTYPE html>old")
    page.chmod(0o600)
    link.symlink_to(page)
    page_of(adapter, link)
    assert link.readlink() == page
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert stat.S_IMODE(page.stat().st_mode) == 0o600


@linux
def test_no_file_of_the_working_directory_changes_a_page(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nsvg.fonttype: path\n")
    (tmp_path / "matplotlib.py").write_text("open('ran', 'w')")
    page_of(adapter, tmp_path / "expected.html")
    code = f"import os; os.chdir({str(tmp_path)!r}); import adapterkit as ak; ak.write_report(['adapter'], 'page.html')"
    python("-c", code)
    assert (tmp_path / "page.html").read_bytes() == (tmp_path / "expected.html").read_bytes()
    assert not (tmp_path / "ran").exists()


# Adapter folders


@linux
def test_modes_of_what_is_replaced_are_kept(adapter: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (adapter / name).chmod(0o640)
    files.write_folder(adapter, CONFIG, TENSORS, {})
    assert {stat.S_IMODE(file.stat().st_mode) for file in adapter.iterdir()} == {0o640}


@linux
def test_a_link_in_a_folder_is_replaced_and_what_is_behind_it_stays(adapter: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        secret.write_text("mine")
        (adapter / name).unlink()
        (adapter / name).symlink_to(secret)
    files.write_folder(adapter, CONFIG, TENSORS, {})
    assert secret.read_text() == "mine"
    assert files.read(adapter).config == CONFIG


# A save that is killed

OLD, NEW = {"peft_type": "LORA", "r": 2}, {"peft_type": "LORA", "r": 3}
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown"}


def version(number: int, r: int | None = None) -> dict[str, torch.Tensor]:
    return {"base_model.model.query.lora_A.weight": torch.full((r or number, 4), float(number))}


def with_pickle(place: Path) -> None:
    files.write_folder(place, OLD, version(2), {})
    torch.save(version(2), place / PICKLE_FILE)
    (place / WEIGHTS_FILE).unlink()


def with_shadowed_pickle(place: Path) -> None:
    files.write_folder(place, OLD, version(2), {})
    torch.save(version(7), place / PICKLE_FILE)


BEFORE: dict[str, Callable[[Path], None]] = {
    "nothing": lambda place: None,
    "a folder of the user's": lambda place: place.mkdir(),
    "an adapter": lambda place: files.write_folder(place, OLD, version(2), {}),
    "an adapter of the same config": lambda place: files.write_folder(place, NEW, version(2, 3), {}),
    "a pickle": with_pickle,
    "a pickle beside newer weights": with_shadowed_pickle,
    "an adapter of mlx": lambda place: files.write_folder(place, OLD, version(2), {}, weights="adapters.safetensors"),
}


def killed_at(step: int, place: Path) -> bool:
    """Save `NEW` in a process that is killed before its `step`-th change of a file; whether it was."""
    child = os.fork()
    if not child:
        left = [step]

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            if event in STEPS and not (event == "open" and arguments[1] == "r"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        try:
            sys.addaudithook(count)
            files.write_folder(place, NEW, version(3), {})
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def seen_by_others(place: Path) -> int | None:
    """The version that a program reads which knows nothing of adapterkit; `None`: it finds no adapter."""
    config = place / CONFIG_FILE
    weights = next((place / name for name in (WEIGHTS_FILE, PICKLE_FILE) if (place / name).is_file()), None)
    if weights is None or not config.is_file():
        assert weights is None  # they would be taken for an adapter of a default config
        return None
    tensors = load_file(weights) if weights.name == WEIGHTS_FILE else torch.load(weights)
    (tensor,) = tensors.values()
    assert json.loads(config.read_text())["r"] == len(tensor)
    return int(tensor[0, 0])


@linux
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE.keys())
def test_a_save_that_is_killed_leaves_the_old_version_or_the_new_one(
    before: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen, step, killed = [], 0, True
    while killed:
        place = tmp_path / str(step) / "adapter"
        place.parent.mkdir()
        before(place)
        held = files.read(place).config if (place / CONFIG_FILE).exists() else None
        notes = place / "notes.txt"
        if place.exists():
            notes.write_text("the user's")
        noted, killed = notes.exists(), killed_at(step, place)
        others = seen_by_others(place) if place.exists() else None
        try:
            found = files.read(place)
        except ak.CheckpointError:
            assert held is None
        else:
            assert found.config in (held, NEW)
            (tensor,) = found.tensors.values()
            seen.append(int(tensor[0, 0]))
            assert others in (None, seen[-1])
        assert notes.exists() == noted
        files.write_folder(place, NEW, version(3), {})
        assert {path.name for path in place.iterdir()} - {"notes.txt"} == {CONFIG_FILE, WEIGHTS_FILE}
        assert [path.name for path in place.parent.iterdir()] == ["adapter"]
        step += 1
    assert seen == sorted(seen)
    assert set(seen) == ({2, 3} if held is not None else {3})
    assert step > 5


@linux
def test_files_of_others_beside_a_save_stay(adapter: Path, tmp_path: Path) -> None:
    names = [".adapter.original", f"adapter/.{CONFIG_FILE}.original", f"adapter/.{WEIGHTS_FILE}.unfinished"]
    for name in names:
        (tmp_path / name).write_text("mine")
    fresh = adapter / f".{WEIGHTS_FILE}.adapterkit-unfinished"
    for make in (lambda: fresh.symlink_to(tmp_path / names[0]), lambda: os.link(tmp_path / names[0], fresh)):
        make()
        files.write_folder(adapter, CONFIG, TENSORS, {})
        assert files.read(adapter).config == CONFIG
        assert all((tmp_path / name).read_text() == "mine" for name in names)
        fresh.unlink(missing_ok=True)


@linux
def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    page = tmp_path / "page"
    with files.appearing(page) as first, files.appearing(page) as second:
        first.write_text("first")
        second.write_text("second")
    assert page.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_an_older_format_that_another_process_writes_meanwhile_stays(adapter: Path) -> None:
    def write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        files.write_tensors(tensors, path, metadata)
        (adapter / PICKLE_FILE).write_bytes(b"another process")

    files.write_folder(adapter, CONFIG, TENSORS, {}, write)
    assert (adapter / PICKLE_FILE).read_bytes() == b"another process"
    files.write_folder(adapter, CONFIG, TENSORS, {})
    assert not (adapter / PICKLE_FILE).exists()


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        raise OSError("disk full")

    for place in (tmp_path / "new", tmp_path / "made before"):
        (tmp_path / "made before").mkdir(exist_ok=True)
        with pytest.raises(ak.SaveError, match="disk full"):
            files.write_folder(place, CONFIG, TENSORS, {}, write)
    assert [path.name for path in tmp_path.iterdir()] == ["made before"]
    assert not list((tmp_path / "made before").iterdir())


def no_locks(*arguments: Any, **options: Any) -> None:
    raise OSError("no locks")


@pytest.mark.parametrize("there", ["no folder", "another version"])
def test_processes_that_save_one_adapter_at_once_need_no_locks(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a training run do, on a shared disk that has no locks."""
    place = tmp_path / "adapter"
    if there == "another version":
        files.write_folder(place, CONFIG | {"r": 2}, {"a": torch.zeros(2)}, {})

    monkeypatch.setattr(files.writing, "_locked", no_locks)

    def write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if there == "no folder":  # another process is done
            files.write_folder(place, CONFIG, TENSORS, {})
        else:  # another process has come so far
            (place / WEIGHTS_FILE).replace(place / files.folder.aside(WEIGHTS_FILE))
        save_file(tensors, path)

    files.write_folder(place, CONFIG, TENSORS, {}, write)
    assert json.loads((place / CONFIG_FILE).read_text(encoding="utf-8")) == CONFIG
    torch.testing.assert_close(load_file(place / WEIGHTS_FILE), TENSORS)
    assert {path.name for path in place.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_adapter_that_comes_meanwhile_without_locks_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "adapter"

    def write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        files.write_folder(place, CONFIG | {"r": 2}, {"a": torch.zeros(2)}, {})
        save_file(tensors, path)

    monkeypatch.setattr(files.writing, "_locked", no_locks)
    with pytest.raises(ak.SaveError):
        files.write_folder(place, CONFIG, TENSORS, {}, write)
    assert json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))["r"] == 2
    torch.testing.assert_close(load_file(place / WEIGHTS_FILE), {"a": torch.zeros(2)})


def test_another_adapter_between_the_two_files_of_a_save_without_locks_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, replace, others = tmp_path / "adapter", Path.replace, [version(2)]
    files.write_folder(place, OLD, version(7, 2), {})
    monkeypatch.setattr(files.writing, "_locked", no_locks)

    def with_another(self: Path, target: Path) -> Path:
        if target == place / WEIGHTS_FILE and others:
            files.write_folder(place, OLD, others.pop(), {})
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", with_another)
    files.write_folder(place, NEW, version(3), {})
    assert seen_by_others(place) == 3
    assert not others


@linux
def test_a_lock_that_is_never_given_back_is_told_and_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.writing, "_PATIENCE", 0)
    with (
        files.writing._locked(tmp_path),
        pytest.warns(ak.AdapterWarning, match=r"Another process has locked .* for 0 seconds: it saves there, or hangs"),
    ):
        files.write_folder(tmp_path / "adapter", CONFIG, TENSORS, {})
    assert files.read(tmp_path / "adapter").config == CONFIG


def test_the_root_of_a_disk_is_a_folder_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, written = Path(tmp_path.anchor), list[Path]()
    monkeypatch.setattr(files.writing, "_write_into", lambda folder, *contents: written.append(folder))
    files.write_folder(root, CONFIG, TENSORS, {})
    assert written == [root]


def test_pages_and_manifests_hold_no_folders_of_this_machine(tmp_path: Path) -> None:
    """They are shared: a path would tell the user's name."""
    model = build("bert")
    model.save_pretrained(tmp_path / "base")
    adapters = ak.attach(model)
    adapters.add("a", ak.config("lora", target_modules=["query"], base_model_name_or_path=str(tmp_path / "base")))
    adapters.save("a", tmp_path / "a")
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    page_of(tmp_path / "a", tmp_path / "page.html")
    for file in (tmp_path / "merged" / "adapterkit_merge.json", tmp_path / "page.html"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")


@linux
def test_pipes_at_the_places_of_an_adapters_files_are_replaced(adapter: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (adapter / name).unlink()
        os.mkfifo(adapter / name)
    files.write_folder(adapter, CONFIG, TENSORS, {})
    assert files.read(adapter).config == CONFIG


def test_a_folder_at_the_place_of_a_file_is_an_error_and_nothing_changes(adapter: Path) -> None:
    before = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / CONFIG_FILE).unlink()
    (adapter / CONFIG_FILE).mkdir()
    with pytest.raises(ak.SaveError):
        files.write_folder(adapter, CONFIG, TENSORS, {})
    assert (adapter / WEIGHTS_FILE).read_bytes() == before
