"""Whether vLLM and SGLang serve an adapter, by their own rules: `ak.check_serving`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from adapterkit.contract import DOTTED, FILE_PREFIX
from adapterkit.errors import UsageError, usage
from adapterkit.files.folder import WEIGHTS_FILE, read, read_config
from adapterkit.files.hub import adapter_folder
from adapterkit.files.tensors import read_header
from adapterkit.results import Printed, in_lines

ServerName = Literal["vllm", "sglang"]
# What a server reads of a layer; an embedding has the other pair.
_FACTORS = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
_DOWN = ("lora_A.weight", "lora_embedding_A")
_LAYER = re.compile(r"(^|\.)layers\.\d+\.|embed_tokens|lm_head")
_CONVERT = "`adapterkit convert --for {server}` makes one that it serves"


@dataclass(frozen=True)
class Server:
    """What a version of a server takes.

    Attributes:
        ranks: what `--max-lora-rank` may be; empty: any number.
        default_rank: what it is by default; `None`: the largest rank of the adapters that the server starts with.
        rslora: whether it divides alpha by the root of the rank if the config asks for that.
        modules: the names of modules that it serves, whatever the model; empty: the model says which.
        patterns: whether `target_modules` may be an expression.
        rest: what becomes of tensors that are not LoRA's.
    """

    title: str
    ranks: tuple[int, ...] = ()
    default_rank: int | None = None
    rslora: bool = True
    modules: frozenset[str] = frozenset()
    patterns: bool = True
    rest: str = "refused"


# vLLM: vllm/lora/peft_helper.py, lora_model.py, utils.py and vllm/config/lora.py, of 0.12 (2025-12) and of the main
# branch in 2026. SGLang: python/sglang/srt/lora/lora_config.py, lora.py, lora_manager.py, mem_pool.py and utils.py.
SERVERS: Mapping[str, Server] = {
    "vllm": Server("vLLM 0.12", ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512), default_rank=16),
    "sglang": Server(
        "SGLang 0.5.23",
        rslora=False,
        patterns=False,
        rest="left out silently",
        modules=frozenset(
            (
                *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj"),
                *("gate_up_proj", "embed_tokens", "vocab_emb", "embeddings", "word_embeddings", "lm_head", "output"),
                *("unembed_tokens", "q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa", "q_b_proj"),
                *("kv_b_proj", "in_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_q", "in_proj_k", "in_proj_v"),
                *("in_proj_z", "fc1_latent_proj", "fc2_latent_proj", "qkvr", "wo_ud"),
            )
        ),
    ),
}


@dataclass(frozen=True)
class ServingReport(Printed):
    """Whether a server serves an adapter. Prints as text; `to_dict` is for JSON.

    Attributes:
        server: the server, with the version whose rules these are.
        problems: why it would refuse the adapter, or compute something else with it; empty: it serves it.
        notes: what to start the server with.
    """

    source: str
    server: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the server serves the adapter."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        head = f"{self.server} {'serves' if self.ok else 'does not serve'} {self.source}"
        lines = [f"  problem: {problem}" for problem in self.problems] + [f"  note: {note}" for note in self.notes]
        return in_lines([head, *lines])


@usage()
def check_serving(source: str | Path, server: ServerName, *, max_rank: int | None = None) -> ServingReport:
    """Whether a server serves an adapter as it is, judged by the adapter's files and the server's own rules.

    A problem is what the server refuses, and also what it would silently leave out or scale otherwise. Whether the
    server has LoRA for the model's class, and for each of its layers, only the server itself can say.

    Args:
        source: an adapter folder, a hub id, or a file of another program.
        server: `"vllm"` or `"sglang"`.
        max_rank: the server's `--max-lora-rank`; `None`: a note says what it must be.

    Raises:
        CheckpointError: the source is not an adapter, or is damaged.
        ConfigError: another server, or a `max_rank` that it does not have.
    """
    known = server_named(server, max_rank)
    place = adapter_folder(source)
    if place.is_file():
        problem = f"it is not a folder in PEFT's format; {_CONVERT.format(server=server)}"
        return ServingReport(str(source), known.title, (problem,), ())
    if (place / WEIGHTS_FILE).is_file():
        header = read_header(place / WEIGHTS_FILE)
        shapes = {entry.name: tuple(entry.shape) for entry in header.entries}
    else:
        shapes = {key: tuple(tensor.shape) for key, tensor in read(place).tensors.items()}
    problems, notes = problems_of(read_config(place), shapes, server, max_rank), []
    if (place / "added_tokens.json").is_file() and server == "sglang":
        problems.append("added_tokens.json adds tokens to the vocabulary; remove it if the base has these tokens")
    rank = max((rank for key, shape in shapes.items() if key.endswith(_DOWN) for rank in shape[:1]), default=0)
    needed = next((allowed for allowed in known.ranks if allowed >= rank), rank)
    if max_rank is None and needed > (known.default_rank or 0):
        notes.append(f"start the server with --max-lora-rank {needed}")
    return ServingReport(str(source), known.title, tuple(problems), tuple(notes))


def server_named(name: str, max_rank: int | None) -> Server:
    """The server of this name.

    Raises:
        ConfigError: there is none, or it cannot have this rank as its limit.
    """
    if name not in SERVERS:
        raise UsageError(f"server = {name!r} must be one of {', '.join(map(repr, get_args(ServerName)))}.")
    server = SERVERS[name]
    allowed = server.ranks or (max_rank,)
    if max_rank is not None and (isinstance(max_rank, bool) or max_rank not in allowed or max_rank < 1):
        listed = ", ".join(map(str, server.ranks)) or "1, 2, ..."
        raise UsageError(f"max_rank = {max_rank!r} must be one of {listed}.")
    return server


def problems_of(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str, max_rank: int | None
) -> list[str]:
    """Why the server would refuse these files, or compute something else."""
    server, convert = SERVERS[name], _CONVERT.format(server=name)
    peft_type = str(config.get("peft_type", "")).upper()
    if peft_type != "LORA":
        return [f"it is not LoRA, but {peft_type or 'of no peft_type'}; {convert}, if its change has low rank"]
    if not all(isinstance(number, int | float) for number in (config.get("r"), *_alphas(config))):
        return ["r, lora_alpha and the values of alpha_pattern in its config must be numbers"]
    trained, targets = config.get("modules_to_save"), config.get("target_modules")
    expression = isinstance(targets, str) and targets not in ("all", "all-linear") and not server.patterns
    biases = config.get("bias", "none") != "none" or config.get("lora_bias")
    rslora = config.get("use_rslora") and not server.rslora
    fields = ("layer_replication", "trainable_token_indices", "target_parameters")
    found = [
        (config.get("use_dora"), "DoRA: it is refused. Merge the adapter into the model, and serve that"),
        (trained, f"modules_to_save = {trained}: what is trained in full is {server.rest}"),
        (biases, "trained biases are refused or left out. Merge the adapter into the model, and serve that"),
        *((config.get(field), f"{field} is set, which {server.title} does not follow") for field in fields),
        (expression, f"target_modules is an expression, which is refused; {convert}"),
        (rslora, f"use_rslora: alpha would be divided by r, not by its root; {convert}"),
    ]
    return [text for wrong, text in found if wrong] + _of_tensors(config, shapes, name, max_rank)


def _alphas(config: Mapping[str, Any]) -> list[Any]:
    """The alphas that a config gives to layers."""
    patterns = config.get("alpha_pattern") or {}
    return [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, Mapping) else (patterns,))]


def _of_tensors(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str, max_rank: int | None
) -> list[str]:
    """Why the server would refuse some tensors, leave them out, or scale them otherwise."""
    server, convert, problems = SERVERS[name], _CONVERT.format(server=name), []
    found = {key: _FACTORS.fullmatch(key) for key in shapes}
    other = [key for key, match in found.items() if match is None]
    if other:
        problems.append(
            f"{len(other)} tensors are not factors of LoRA and would be {server.rest}, such as {other[0]!r}"
        )
    paths = {key: match[1].removeprefix(FILE_PREFIX) for key, match in found.items() if match is not None}
    wrong = next((key for key in paths if not key.startswith(FILE_PREFIX) or paths[key].split(".")[0] in DOTTED), None)
    if wrong is not None:
        problems.append(f"the keys do not begin with {FILE_PREFIX!r} and the model's path, such as {wrong!r}")
    kernel = next((key for key in paths if len(shapes[key]) != 2), None)
    if kernel is not None:
        problems.append(f"{paths[kernel]!r} is a convolution, and only linear layers and embeddings are served")
    ranks = {rank for key in paths if key.endswith(_DOWN) for rank in shapes[key][:1]}
    if ranks - {config.get("r")} or len({*_alphas(config)}) > 1:
        problems.append(f"the layers have several ranks or alphas, and all would be scaled alike; {convert}")
    limit = max_rank if max_rank is not None else max(server.ranks, default=None)
    if limit is not None and max(ranks, default=0) > limit:
        truncate = f"`adapterkit convert --rank {limit}` truncates"
        problems.append(f"its rank is {max(ranks)}, and the limit is {limit}; {truncate}")
    last = sorted({path.rpartition(".")[2] for path in paths.values()})
    unknown = [module for module in last if server.modules and module not in server.modules]
    if unknown:
        problems.append(f"{server.title} has no LoRA for modules called {', '.join(map(repr, unknown))}")
    loose = next((path for path in paths.values() if not _LAYER.search(path)), None)
    if name == "sglang" and loose is not None:
        problems.append(f"{loose!r} is outside of the model's `layers`, and would be left out silently")
    return problems
