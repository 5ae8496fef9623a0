"""Pretrained: what an adapted model's own `save_pretrained` writes.

Trainers know the model and not its adapters. What they write goes through it, and what they read through the model's
`load_state_dict` (see the
module beside), so that is where the adapters of an unchanged `Trainer` are.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterkit.contract import ATTRIBUTE, HEADS, SHARED, split_memory_key, unwrapped_key
from adapterkit.errors import AdapterWarning, SaveError, StateError, UnsupportedError
from adapterkit.files import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    appearing,
    local_path,
    to_files,
    write_folder,
    write_tensors,
)
from adapterkit.integrations.load_state_dict import Loader
from adapterkit.integrations.outer_models import SAVE, let_outer_models_tell, warn_of_others
from adapterkit.merging import Parting
from adapterkit.model import KEPT, Adapter, BaseModules, LabelSet, named_modules, resized_keys
from adapterkit.tensors import gathered, in_first_process, process_groups, real_value, whole

if TYPE_CHECKING:
    from adapterkit.adapters import Adapters

# What `Trainer` hands to `load_state_dict` when it resumes and for the best model, and nobody else reads.
TRAINING_FILE = "model.safetensors"
_WHOLE_MODEL = "config.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_REFUSED = {
    "safe_serialization": (False, "only safetensors is written"),
    "save_peft_format": (False, "only PEFT's keys are written"),
    "distributed_checkpoint": (True, "use torch.distributed.checkpoint on adapters.state_dict(name)"),
}


class Saver:
    """Stands for `save_pretrained` of a model that has adapters, or of one inside it.

    - While unmerged adapters act, they are written in PEFT's layout, and the base's weights are not: the one that acts
      into the folder itself, every other adapter into a subfolder of its name; several that act all into subfolders.
    - While adapters are merged, and no other acts, the whole model is written as it computes: the merged weights, the
      heads that act, their label set.
    - While none acts (in `adapters.disabled()`) the bare base is written, with its own label set.

    With the argument `state_dict`, which `Trainer` gives and people do not, the folder is a checkpoint of a training:
    it gets `model.safetensors` too, with the adapters' tensors under the model's own names. `load_state_dict` takes
    these back, all bits, so a plain `Trainer` resumes, and loads the best model.

    It stands for `save` of the modules of sentence-transformers too, which write no adapters: they are refused.
    """

    def __init__(self, root: nn.Module, module: nn.Module, path: str, name: str) -> None:
        self.root, self.module, self.path, self.name = root, module, path, name

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        # A copy of a part of the model has no adapters that are managed; it must not copy the whole model either.
        module = memo.get(id(self.module), self.module)
        return Saver(memo.get(id(self.root), module), module, self.path, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, which is asked for all that it alone can write.

        Raises:
            StateError: some adapters are merged while others act beside them, or this module cannot write any.
            SaveError: the folder cannot be written, or holds something that would be read together with this.
            UnsupportedError: an argument that asks for another format.
            CheckpointError: `state_dict` lacks tensors of the adapters.
        """
        own: Any = getattr(type(self.module), self.name)
        call = inspect.signature(own).bind(self.module, *args, **kwargs)
        adapters: Adapters | None = self.root.__dict__.get(ATTRIBUTE)
        if adapters is None:
            return own(*call.args, **call.kwargs)
        members = self._adapters(adapters)
        acting = [name for name in adapters._active.names if name in members]
        merged = [name for name in adapters._merged.names if name in members]
        if merged and acting:
            raise StateError(
                f"Adapter {merged[0]!r} is merged and {acting[0]!r} acts beside it, and no format holds both. Merge "
                f"{acting[0]!r} too, or call activate() without names, to write the whole merged model; call unmerge() "
                "to write the adapters."
            )
        here = f"{self.path}." if self.path else ""
        heads = [
            n for n in adapters._active.heads if any(f"{p}.".startswith(here) for p in adapters._adapters[n].heads)
        ]
        for name in (*acting, *heads) if self.name != SAVE else ():
            raise StateError(
                f"Adapter {name!r} acts in a {type(self.module).__name__}, whose function {self.name!r} writes no "
                f"adapters and no heads. Call merge({name!r}) first, with a head merge_and_detach({name!r}); or save "
                f"the adapter alone: adapters.save({name!r}, folder)."
            )
        if acting:
            return self._write_adapters(adapters, members, acting, call)
        if merged and self.name == SAVE:
            self._check_no_adapter(call.arguments)
        if members and not merged and not adapters._active.in_block:
            warnings.warn(
                f"No adapter is active, so the bare base is written, without {', '.join(map(repr, members))}. Activate "
                "what is to be saved, or use adapters.save; inside adapters.disabled() nothing is said.",
                AdapterWarning,
                stacklevel=3,
            )
        return self._write_model(adapters, call, follow=bool(merged))

    def _adapters(self, adapters: Adapters) -> dict[str, Adapter]:
        """The adapters that have a part in this module.

        Raises:
            StateError: an adapter that acts has another part outside of it.
        """
        if not self.path:
            return adapters._adapters
        found = {}
        for name, adapter in adapters._adapters.items():
            inside = [path for path in adapter.hosts if f"{path}.".startswith(f"{self.path}.")]
            whole = len(inside) == len(adapter.hosts)
            if inside and not whole and name in adapters._active.names:
                other = next(path for path in adapter.hosts if path not in inside)
                raise StateError(
                    f"{self.path!r} is to be saved with adapter {name!r}, which has another part at {other!r}. Save "
                    f"it with adapters.save({name!r}, folder), or call merge({name!r}) first."
                )
            if inside and (whole or name in adapters._merged.names):
                found[name] = adapter
        return found

    # The whole model

    def _write_model(self, adapters: Adapters, call: inspect.BoundArguments, *, follow: bool) -> Any:
        """By the model's own function, which sees a state dict without adapters, and acting heads as the model's.

        Args:
            follow: write the label set that the config follows now, and not the model's own.
        """
        heads = [adapters._adapters[name] for name in adapters._active.heads]

        def without_adapters(module: nn.Module, state: MutableMapping[str, Any], prefix: str, _: object) -> None:
            self._make_plain(adapters, heads, state, prefix)

        parting = Parting.of(self.root, heads=heads)
        given = call.arguments.get("state_dict")
        if given is not None:
            call.arguments["state_dict"] = given = dict(given)
            for key in (self._inside(tie.target) for tie in parting.freed):
                given |= {key: given[key].clone()} if key in given else {}
            self._make_plain(adapters, heads, given, "")
        host, acting = adapters._model, LabelSet.of(self.root)
        own = None if follow or acting is None or host.labels_of is None else host.labels
        handle = self.module.register_state_dict_post_hook(without_adapters)
        if own is not None:
            own.apply(self.root)
        try:
            with parting.told():
                return getattr(type(self.module), self.name)(*call.args, **call.kwargs)
        finally:
            handle.remove()
            if own is not None and acting is not None:
                acting.apply(self.root)

    def _make_plain(
        self, adapters: Adapters, heads: list[Adapter], state: MutableMapping[str, Any], prefix: str
    ) -> None:
        owners = {key: adapter for adapter in adapters._adapters.values() for key in self._keys(adapter)}
        replaced = {self._inside(path) + "." for adapter in heads for path in adapter.heads}
        own = {}
        for key in [key for key in state if key.startswith(prefix)]:
            short = unwrapped_key(key.removeprefix(prefix))
            adapter = owners.get(short)
            if adapter is not None:
                value = state.pop(key)
                container, path, local = split_memory_key(key, adapter.name) or ("", "", "")
                if container == HEADS and adapter in heads:
                    own[f"{path}.{local}"] = value  # the last one's, which is the one that acts
            elif short.startswith(tuple(replaced)):
                del state[key]
        state.update(own)

    def _keys(self, adapter: Adapter) -> Iterator[str]:
        """An adapter's keys in the state dict of this module."""
        prefix = f"{self.path}." if self.path else ""
        for key in adapter.memory_keys():
            if key.startswith((prefix, f"{SHARED}.")):
                yield key.removeprefix(prefix)

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.path}.") if self.path else path

    # Adapters

    def _write_adapters(
        self, adapters: Adapters, members: Mapping[str, Adapter], acting: list[str], call: inspect.BoundArguments
    ) -> None:
        given = _arguments(call)
        folder, source = local_path(given["save_directory"]), given.get("state_dict")
        training = "state_dict" in given
        if not self._check_no_model(folder, training=training):
            training |= (folder / TRAINING_FILE).exists()  # it must not be of another moment than the adapters
        names = {name: folder if [name] == acting else folder / _file_name(name) for name in members}
        for name in names:
            adapters._warn_if_changed(name, KEPT)
        files = {name: to_files(members[name], self.module, source, self.path) for name in names}
        state = self._training_state(members.values(), source) if training else {}
        groups = (
            process_groups(p for adapter in members.values() for p in adapter.parameters()) if source is None else []
        )

        def write() -> None:
            for name, place in names.items():
                write_folder(place, *files[name])
            for stale in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE) if len(acting) > 1 else ():
                (folder / stale).unlink(missing_ok=True)
            if training:
                with appearing(folder / TRAINING_FILE) as fresh:
                    write_tensors(state, fresh, {"format": "pt"})
            if given.get("push_to_hub"):
                parts = [f"{name}/*" for name, place in names.items() if place != folder]
                _push(folder, [CONFIG_FILE, WEIGHTS_FILE, *parts], given)

        if groups or given.get("is_main_process", True):
            in_first_process(groups, write)
            warn_of_others(folder, names.values())
        for note in (
            f"Adapter {name!r}: {note}." for name in acting for note in adapters._model.never_ran(members[name])
        ):
            warnings.warn(note, AdapterWarning, stacklevel=3)

    def _training_state(self, members: Collection[Adapter], source: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        ours = {key for adapter in members for key in self._keys(adapter)} | resized_keys(BaseModules(self.module))
        if source is not None:
            found = {key: tensor for key, tensor in source.items() if unwrapped_key(key) in ours}
            return dict(zip(found, whole(list(found.values())), strict=True))
        with gathered(self.root, (module for adapter in members for module in adapter.modules())):
            found = {key: tensor for key, tensor in self.module.state_dict().items() if key in ours}
        for key, tensor in found.items():
            if tensor.is_meta:
                owner, _, local = key.rpartition(".")
                found[key] = real_value(self.module.get_submodule(owner), local)
        return found

    # What else a folder holds

    def _check_no_model(self, folder: Path, *, training: bool) -> bool:
        """Whether the folder holds the base model, beside which its adapter may lie, but no training's file."""
        if not (folder / _WHOLE_MODEL).is_file() or not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            return False
        name = getattr(self.module, "name_or_path", None)
        of_base = isinstance(name, str) and bool(name) and Path(name).is_dir() and folder.samefile(name)
        if not of_base or training:
            raise SaveError(
                f"{folder} holds a whole model, and the adapter beside it would be read as one of that model's. Give "
                "another folder, or delete the model there."
            )
        return True

    @staticmethod
    def _check_no_adapter(given: Mapping[str, Any]) -> None:
        folder = local_path(given["save_directory"])
        if (folder / CONFIG_FILE).is_file():
            raise SaveError(
                f"{folder} holds an adapter, which from_pretrained would add to the merged model once more. Give "
                f"another folder, or delete {CONFIG_FILE} there."
            )


def _arguments(call: inspect.BoundArguments) -> dict[str, Any]:
    """What `save_pretrained` was called with, by name.

    Raises:
        UnsupportedError: one asks for another format.
    """
    given = dict(call.arguments)
    for parameter in call.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    for option, (value, why) in _REFUSED.items():
        if given.get(option, not value) is value:
            raise UnsupportedError(f"{option}={value} cannot be had for adapters: {why}.")
    if given.get("variant") is not None:
        raise UnsupportedError(f"variant={given['variant']!r} cannot be had: adapter files have no variants.")
    return given


def _file_name(name: str) -> str:
    if Path(name).name != name or "\0" in name:
        raise SaveError(f"Adapter {name!r} cannot have a subfolder of that name. Rename it: adapters.rename.")
    return name


def _push(folder: Path, files: list[str], given: Mapping[str, Any]) -> None:
    """Upload these files of the folder, as the model's own function does after saving."""
    from huggingface_hub import HfApi

    hub = HfApi(token=given.get("token"))
    repo = hub.create_repo(given.get("repo_id") or folder.name, private=given.get("private"), exist_ok=True).repo_id
    hub.upload_folder(
        repo_id=repo,
        folder_path=os.fspath(folder),
        allow_patterns=files,
        commit_message=given.get("commit_message") or "Upload adapter",
        revision=given.get("revision"),
        create_pr=given.get("create_pr", False),
    )


def install(root: nn.Module) -> Loader:
    """Let the model, and the models inside it, save and load with their adapters; one around it says that it cannot."""
    let_outer_models_tell()
    writers = {path: (module, name) for path, module in named_modules(root) for name in _writer(module)}
    for path, (module, name) in writers.items():
        inside = f"{path}." if path else ""
        by_parts = name != SAVE and any(other.startswith(inside) and other != path for other in writers)
        if not by_parts and name not in module.__dict__:
            module.__dict__[name] = Saver(root, module, path, name)
    return Loader(root)


def _writer(module: nn.Module) -> Iterator[str]:
    """The name of the function by which a model, or a module of sentence-transformers, is written."""
    for name, argument in ((SAVE, "save_directory"), ("save", "safe_serialization")):
        own = getattr(type(module), name, None)
        if inspect.isfunction(own) and argument in inspect.signature(own).parameters:
            yield name
            return


def uninstall(root: nn.Module, loader: Loader) -> None:
    """Undo `install`."""
    loader.remove()
    for _, module in named_modules(root):
        for name in (SAVE, "save"):
            saver = module.__dict__.get(name)
            if isinstance(saver, Saver) and saver.root is root:
                del module.__dict__[name]
