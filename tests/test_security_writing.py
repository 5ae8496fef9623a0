"""What is written goes where it was asked to, whole, and nothing of others is touched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tests.command.conftest import run
from tests.models import build

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
    page.write_text("old")
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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
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


KILLED = """
import os, sys, torch
from pathlib import Path
from adapterkit import files
replace = Path.replace
def killed(self, target):
    replace(self, target)
    os._exit(9)
Path.replace = killed
files.write_folder(Path(sys.argv[1]), {config}, {{"a": torch.ones(2)}}, {{}})
"""


@linux
def test_a_killed_save_to_an_empty_folder_leaves_no_weights_without_a_config(tmp_path: Path) -> None:
    """Other programs would take such weights for an adapter of a default config."""
    place = tmp_path / "made before"
    place.mkdir()
    assert (
        subprocess.run([sys.executable, "-c", KILLED.format(config=CONFIG), place], check=False, timeout=600).returncode
        == 9
    )
    held = {path.name for path in place.iterdir() if not path.name.startswith(".")}
    assert held == {CONFIG_FILE}
    files.write_folder(place, CONFIG, TENSORS, {})
    assert {path.name for path in place.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


@linux
def test_what_killed_saves_left_is_swept_and_nothing_else(adapter: Path, tmp_path: Path) -> None:
    left = tmp_path / ".adapter.abcd_123"
    left.mkdir()
    (left / f".{CONFIG_FILE}.abcdefgh").touch()
    (left / WEIGHTS_FILE).touch()
    (adapter / f".{WEIGHTS_FILE}.12345678").touch()
    others = [tmp_path / ".adapter.documents", tmp_path / ".adapter.abcdefgh", adapter / f".{WEIGHTS_FILE}.mine"]
    for other in others[:2]:
        other.mkdir()
        (other / "thesis.tex").touch()
    others[2].touch()
    files.write_folder(adapter, CONFIG, TENSORS, {})
    assert not left.exists()
    assert {path.name for path in adapter.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, others[2].name}
    assert all(other.exists() for other in others)


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
