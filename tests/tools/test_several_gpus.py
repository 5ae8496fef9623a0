"""The script of the guide for several GPUs, started by torchrun on two processes and resumed on one."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.models import build
from tests.processes import python
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

GUIDE = (Path(__file__).parents[2] / "docs" / "several-gpus.md").read_text(encoding="utf-8")


def run(folder: Path, processes: int) -> dict[str, Tensor]:
    """What the script saves. It does ten steps."""
    command = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "train.py")
    python(*command, cwd=folder, CUDA_VISIBLE_DEVICES="")
    return load_file(folder / "out" / "task" / "adapter_model.safetensors")


def test_the_script_trains_on_two_processes_and_resumes_on_one(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    script = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)[0]
    assert "Qwen/Qwen3-8B" in script
    (tmp_path / "train.py").write_text(script.replace("Qwen/Qwen3-8B", str(tmp_path / "base")), encoding="utf-8")
    first = run(tmp_path, 2)
    second = run(tmp_path, 1)
    assert all(torch.any(tensor != 0) for tensor in first.values())
    assert all(not torch.equal(tensor, first[key]) for key, tensor in second.items())
    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "checkpoint.pt")
    states = torch.load(tmp_path / "checkpoint.pt")["optimizer"]["state"]
    assert {int(state["step"]) for state in states.values()} == {20}
    assert all("lora" in key for key in states)
