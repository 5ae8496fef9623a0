"""A merge copies only what is the base's own, and replaces only models."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from tests.command.conftest import run
from tests.models import build

import adapterkit as ak
from adapterkit.disk.merge_files import LOCK

linux = pytest.mark.skipif(sys.platform != "linux", reason="links, devices and pipes")


def merge(world: Path, base: Path, out: Path, **options: bool) -> ak.MergeReport:
    return ak.merge_checkpoint(base, world / "mood", out, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `base`, and an adapter of it, `mood`."""
    folder, model = tmp_path_factory.mktemp("files"), build("bert")
    model.save_pretrained(folder / "base")
    adapters = ak.attach(model)
    adapters.add("mood", ak.config("lora", r=2, target_modules=["query"]))
    adapters.save("mood", folder / "mood")
    return folder


@pytest.fixture
def base(files: Path, tmp_path: Path) -> Path:
    return shutil.copytree(files / "base", tmp_path / "base")


@linux
def test_what_is_behind_links_of_a_base_stays_where_it_is(files: Path, base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id_rsa").write_text("my key")
    (base / "tokenizer.json").symlink_to(secret / "id_rsa")
    (base / "README.md").symlink_to(Path("..") / "secret" / "id_rsa")
    (base / "assets").symlink_to(secret)
    (base / "vocab.txt").symlink_to("/dev/zero")
    (base / "broken.txt").symlink_to("nowhere")
    os.mkfifo(base / "merges.txt")
    (base / "own.txt").write_text("own")
    (base / "own_link.txt").symlink_to("own.txt")
    report = merge(files, base, tmp_path / "out")
    kept = ("tokenizer.json", "README.md", "assets", "vocab.txt", "broken.txt", "merges.txt")
    assert set(kept) <= set(report.not_copied)
    assert (tmp_path / "out" / "own_link.txt").read_text() == "own"
    assert not any("my key" in p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


@linux
def test_a_snapshot_of_the_hubs_cache_is_copied_whole(files: Path, tmp_path: Path) -> None:
    blobs, snapshot = (tmp_path / "models--org--name" / inside for inside in ("blobs", "snapshots/0123abc"))
    shutil.copytree(files / "base", blobs)
    (blobs / "tokens").write_text("own")
    snapshot.mkdir(parents=True)
    for file in (files / "base").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/tokens")
    (snapshot / "vocab.txt").symlink_to("/etc/passwd")
    assert merge(files, snapshot, tmp_path / "out").not_copied == ("vocab.txt",)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "own"


@linux
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("what", ["pipe", "endless"])
def test_a_pipe_or_a_device_in_a_base_is_refused(name: str, what: str, files: Path, base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name) if what == "pipe" else (base / name).symlink_to("/dev/zero")
    for place in (base, base / name):
        with pytest.raises(ak.CheckpointError):
            merge(files, place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@linux
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("what", ["pipe", "endless"])
def test_a_pipe_or_a_device_in_an_adapter_is_refused(name: str, what: str, files: Path, tmp_path: Path) -> None:
    place = shutil.copytree(files / "mood", tmp_path / "a")
    (place / "adapter_model.safetensors").unlink()
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name) if what == "pipe" else (place / name).symlink_to("/dev/zero")
    for source in (place, place / name):
        assert run("inspect", str(source)).exit_code == 1
        assert run("targets", str(files / "base"), "--config", str(source)).exit_code in (0, 1)  # a config alone may do


# Replacing


def test_only_models_are_replaced(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    (out / ".git").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "thesis.tex").write_text("years of work")
    (out / ".git" / "HEAD").write_text("ref")
    with pytest.raises(ak.SaveError, match=r"overwrite=True would delete \.git/HEAD, thesis\.tex\. Move that"):
        merge(files, files / "base", out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_what_somebody_put_beside_a_merged_model_is_not_deleted(files: Path, base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("the base's")
    out = tmp_path / "out"
    merge(files, base, out)
    holds = json.loads((out / "adapterkit_merge.json").read_text())["holds"]
    assert sorted(holds) == sorted(path.name for path in out.iterdir() if path.name != LOCK)
    merge(files, base, out, overwrite=True)  # the README is a merge's
    (out / "evaluation.csv").write_text("1,2,3")
    for number in range(6):
        (out / f"notes{number}.txt").touch()
    with pytest.raises(ak.SaveError, match=r"would delete evaluation\.csv, notes0\.txt, .* and 3 more"):
        merge(files, base, out, overwrite=True)
    assert (out / "evaluation.csv").exists()


@linux
def test_a_link_at_the_locks_place_is_not_written_through(files: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / LOCK).symlink_to(mine)
    with pytest.raises(ak.SaveError):
        merge(files, files / "base", tmp_path / "out")
    assert mine.read_text() == "mine"


@linux
def test_a_replaced_folder_keeps_its_mode(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(files, files / "base", out)
    out.chmod(0o2750)
    merge(files, files / "base", out, overwrite=True)
    assert out.stat().st_mode & 0o7777 == 0o2750


@linux
def test_a_merge_opens_no_file_beside_an_adapters_own(files: Path, tmp_path: Path) -> None:
    """A pipe would never end."""
    adapter = shutil.copytree(files / "mood", tmp_path / "mood")
    os.mkfifo(adapter / "adapter_pipe")
    (adapter / "adapter_folder").mkdir()
    (adapter / "adapter_zeros").symlink_to("/dev/zero")
    ak.merge_checkpoint(files / "base", adapter, tmp_path / "out")
    held = json.loads((tmp_path / "out" / "adapterkit_merge.json").read_text())["inputs"]["adapters"]
    assert held[0]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


@linux
def test_links_in_a_circle_are_left_out_or_an_error_of_their_own(files: Path, base: Path, tmp_path: Path) -> None:
    (base / "circle.txt").symlink_to("circle.txt")
    assert "circle.txt" in merge(files, base, tmp_path / "out").not_copied
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    for command in ("merge", "convert", "combine"):
        sources = [str(base), str(files / "mood")] if command == "merge" else [str(files / "mood")]
        done = run(command, *sources, "--out", str(circle / "in"))
        assert (done.exit_code, "internal" in done.output) == (1, False), done.output
