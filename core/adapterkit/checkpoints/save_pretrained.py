"""What an adapted model's own `save_pretrained` writes.

Trainers know the model and not its adapters. They write through the model's `save_pretrained` and read through its
`load_state_dict` (see `load_state_dict.py`), so both handle the adapters, and an unchanged `Trainer` works.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterkit.checkpoints.load_state_dict import SETTING_IN_FILE, StateDictHooks
from adapterkit.checkpoints.peft import watch_peft
from adapterkit.checkpoints.setting import encoded, setting
from adapterkit.checkpoints.training_files import STATE_FILE
from adapterkit.checkpoints.unread import explain_unread_adapters
from adapterkit.contract import ATTRIBUTE, HEADS, SHARED, split_memory_key, unwrapped_key
from adapterkit.errors import SaveError, StateError, UnsupportedError, warn
from adapterkit.files import (
    PICKLE_FILE,
    WEIGHTS_FILE,
    appearing,
    file_contents,
    local_path,
    write_folder,
    write_tensors,
)
from adapterkit.formats import CONFIG_FILE
from adapterkit.merging import Parting
from adapterkit.model import Adapter, BaseModules, LabelSet, named_modules, resized_keys
from adapterkit.tensors import gathered, in_first_process, is_sharded, process_groups, real_value, whole

if TYPE_CHECKING:
    from adapterkit.adapters import Adapters

_SAVE, _SAVE_PART = "save_pretrained", "save"
# `Trainer` passes this file to `load_state_dict` when it resumes, and for the best model. Nothing else reads it.
_TRAINING_FILE = "model.safetensors"
_MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_REFUSED = {
    "safe_serialization": (False, "only safetensors is written"),
    "save_peft_format": (False, "only PEFT's keys are written"),
    "distributed_checkpoint": (True, "use torch.distributed.checkpoint on adapters.state_dict(name)"),
}


def hook_saving(root: nn.Module) -> StateDictHooks:
    """Let the model, and the models inside it, save and load with their adapters. Models around it warn."""
    _let_outer_models_warn()
    explain_unread_adapters()
    watch_peft()
    writers: dict[str, tuple[nn.Module, str]] = {}  # functions that write a model, or a module of sentence-transformers
    for path, module in named_modules(root):
        for name, argument in ((_SAVE_PART, "safe_serialization"), (_SAVE, "save_directory")):
            own = getattr(type(module), name, None)
            if inspect.isfunction(own) and argument in inspect.signature(own).parameters:
                writers[path] = (module, name)
    for path, (module, name) in writers.items():
        inside = f"{path}." if path else ""
        by_parts = name == _SAVE_PART and any(other.startswith(inside) and other != path for other in writers)
        if not by_parts and name not in module.__dict__:
            module.__dict__[name] = Saver(root, module, path, name)
    return StateDictHooks(root)


def unhook_saving(root: nn.Module, hooks: StateDictHooks) -> None:
    """Undo `hook_saving`."""
    hooks.remove()
    for _, module in named_modules(root):
        for name in (_SAVE, _SAVE_PART):
            saver = module.__dict__.get(name)
            if isinstance(saver, Saver) and saver.root is root:
                del module.__dict__[name]


class WrittenElsewhere(dict[str, Tensor]):
    """An empty `state_dict` for `save_pretrained`, from who writes the adapters: the call writes nothing."""


class Saver:
    """Replaces `save_pretrained` of a model with adapters, or of a model inside it.

    - While unmerged adapters act, it writes them in PEFT's layout, without the base's weights: the acting adapter into
      the folder itself, each other one into a subfolder of its name; if several act, all into subfolders.
    - While adapters are merged and no other acts, it writes the whole model as it computes: the merged weights, the
      heads that act, their label set.
    - While none acts (in `adapters.disabled()`), it writes the bare base with its own label set.

    With the argument `state_dict`, which `Trainer` passes and people do not, the folder is a checkpoint of a training.
    It gets a `model.safetensors` too, with the adapters' tensors under the model's own names. `load_state_dict`
    restores every bit of them, so a plain `Trainer` resumes, and loads the best model.

    It also replaces `save` of sentence-transformers' modules, which cannot write adapters: it raises while one acts.
    """

    def __init__(self, root: nn.Module, module: nn.Module, path: str, name: str) -> None:
        self.root, self.module, self.path, self.name = root, module, path, name
        self.prefix = f"{path}." if path else ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        # A copy of a part of the model has no managed adapters. It must not copy the whole model either.
        module = memo.get(id(self.module), self.module)
        return Saver(memo.get(id(self.root), module), module, self.path, self.name)

    @property
    def adapters(self) -> Adapters:
        """The adapters of the whole model."""
        found: Adapters = self.root.__dict__[ATTRIBUTE]
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the adapters, or let the model's own function write the whole model.

        Raises:
            StateError: some adapters are merged while others act, or this module cannot write any.
            SaveError: the folder cannot be written, or holds something that would be read together with this.
            UnsupportedError: an argument asks for another format.
            CheckpointError: `state_dict` lacks tensors of the adapters.
        """
        own: Any = getattr(type(self.module), self.name)
        call = inspect.signature(own).bind(self.module, *args, **kwargs)
        if ATTRIBUTE not in self.root.__dict__:
            return own(*call.args, **call.kwargs)
        given = call.arguments.get("state_dict")
        if given == {} and not isinstance(given, WrittenElsewhere) and any(map(is_sharded, self.root.parameters())):
            warn(
                "Trainer passes no tensors of a model that ZeRO-3 divides, so the adapters are in DeepSpeed's own "
                "checkpoint alone. To have their files too, set stage3_gather_16bit_weights_on_model_save to true, or "
                "put adapterkit.integrations.transformers.AdapterTrainerMixin before the trainer class."
            )
            return None
        if isinstance(given, WrittenElsewhere):
            return None
        active, inside = self.adapters._active, self._adapters_inside()
        acting = [name for name in active.state.names if name in inside]
        merged = [name for name in self.adapters.merged if name in inside]
        if merged and acting:
            raise StateError(
                f"Adapter {merged[0]!r} is merged and {acting[0]!r} acts beside it, and no format holds both. Merge "
                f"{acting[0]!r} too, or call activate() without names, to write the whole merged model; call unmerge() "
                "to write the adapters."
            )
        if self.name == _SAVE_PART:
            heads = {name: self.adapters._adapters[name].heads for name in active.state.heads}
            inside_here = [name for name, paths in heads.items() if any(f"{p}.".startswith(self.prefix) for p in paths)]
            for name in (*acting, *inside_here):
                raise StateError(
                    f"Adapter {name!r} acts in a {type(self.module).__name__}, whose function {self.name!r} writes no "
                    f"adapters and no heads. Call merge({name!r}) first, with a head merge_and_detach({name!r}); or "
                    f"save the adapter alone: adapters.save({name!r}, folder)."
                )
        if acting:
            return self._write_adapters(inside, acting, call)
        if merged and self.name == _SAVE and (local_path(call.arguments["save_directory"]) / CONFIG_FILE).is_file():
            raise SaveError(
                f"{call.arguments['save_directory']} holds an adapter, which from_pretrained would add to the merged "
                f"model once more. Give another folder, or delete {CONFIG_FILE} there."
            )
        if inside and not merged and not active.in_block:
            warn(
                f"No adapter is active, so the bare base is written, without {', '.join(map(repr, inside))}. Activate "
                "what you want to save, or use adapters.save. Inside adapters.disabled() this warning is off."
            )
        return self._write_model(call, merged=bool(merged))

    def _adapters_inside(self) -> Mapping[str, Adapter]:
        """The adapters that have a part in this module. An acting one with another part outside is refused."""
        if not self.path:
            return self.adapters._adapters
        found = {}
        for name, adapter in self.adapters._adapters.items():
            inside = [path for path in adapter.hosts if f"{path}.".startswith(self.prefix)]
            complete = len(inside) == len(adapter.hosts)
            if inside and not complete and name in self.adapters.active:
                other = next(path for path in adapter.hosts if path not in inside)
                raise StateError(
                    f"{self.path!r} cannot be saved with adapter {name!r}, which has another part at {other!r}. Save "
                    f"it with adapters.save({name!r}, folder), or call merge({name!r}) first."
                )
            if inside and (complete or name in self.adapters.merged):
                found[name] = adapter
        return found

    # The whole model

    def _write_model(self, call: inspect.BoundArguments, *, merged: bool) -> Any:
        """Call the model's own function, which sees a state dict without adapters, with acting heads as the model's.

        Args:
            merged: write the label set of the acting head instead of the model's own.
        """
        adapted = self.adapters._model
        heads = [adapted.adapters[name] for name in adapted.active.state.heads]

        parting = Parting.of(self.root, heads=heads)
        given = call.arguments.get("state_dict")
        if given is not None:
            call.arguments["state_dict"] = given = dict(given)
            for key in (tie.target.removeprefix(self.prefix) for tie in parting.freed):
                given |= {key: given[key].clone()} if key in given else {}
            self._make_plain(heads, self.module, given, "")
        labels_now = LabelSet.of(self.root)
        own = None if merged or labels_now is None or adapted.labels_of is None else adapted.labels
        handle = self.module.register_state_dict_post_hook(functools.partial(self._make_plain, heads))
        if own is not None:
            own.apply(self.root)
        try:
            parting.apply()
            return getattr(type(self.module), self.name)(*call.args, **call.kwargs)
        finally:
            parting.undo()
            handle.remove()
            if own is not None and labels_now is not None:
                labels_now.apply(self.root)

    def _make_plain(
        self, heads: list[Adapter], module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: object
    ) -> None:
        """Remove the adapters from a state dict, and put the tensors of these heads in the place of the model's."""
        state.pop(prefix + ATTRIBUTE, None)
        owners = {key: adapter for adapter in self.adapters._adapters.values() for key in self._keys(adapter)}
        replaced = tuple(path.removeprefix(self.prefix) + "." for adapter in heads for path in adapter.heads)
        from_heads = {}
        for key in [key for key in state if key.startswith(prefix)]:
            short = unwrapped_key(key.removeprefix(prefix))
            adapter = owners.get(short)
            if adapter is not None:
                value = state.pop(key)
                container, path, local = split_memory_key(key, adapter.name) or ("", "", "")
                if container == HEADS and adapter in heads:
                    from_heads[f"{path}.{local}"] = value  # of several heads at one module the last one acts
            elif short.startswith(replaced):
                del state[key]
        state.update(from_heads)

    def _keys(self, adapter: Adapter) -> set[str]:
        """An adapter's keys in the state dict of this module."""
        inside = (self.prefix, f"{SHARED}.")
        return {key.removeprefix(self.prefix) for key in adapter.state_dict_keys() if key.startswith(inside)}

    # Adapters

    def _write_adapters(self, inside: Mapping[str, Adapter], acting: list[str], call: inspect.BoundArguments) -> None:
        given = _arguments(call)
        folder, source = local_path(given["save_directory"]), given.get("state_dict")
        training = "state_dict" in given
        if not self.holds_base(folder, training=training):
            training |= (folder / _TRAINING_FILE).exists()  # an older one there must not stay beside new adapters
        places = {name: folder if [name] == acting else subfolder(folder, name) for name in inside}
        for name in places:
            self.adapters._warn_if_changed(name)
        self.adapters._model.keep_labels()
        files = {name: file_contents(inside[name], self.module, source, self.path) for name in places}
        state = self._training_state(inside.values(), source) if training else {}
        parameters = [p for adapter in inside.values() for p in adapter.parameters()]
        groups = process_groups(parameters) if source is None else []

        def write() -> None:
            for name, place in places.items():
                write_folder(place, *files[name])
                (place / STATE_FILE).unlink(missing_ok=True)  # it belongs to the files of before
            tidy(folder, places.values())
            if training:
                with appearing(folder / _TRAINING_FILE) as fresh:
                    write_tensors(state, fresh, {"format": "pt"})
            if given.get("push_to_hub"):
                _push(folder, places.values(), given)

        if groups or given.get("is_main_process", True):
            in_first_process(groups, write)
        if source is None:
            self._warn_of_unwritten_parameters()
        notes = self.adapters._model.notes_for_file
        for note in (f"Adapter {name!r}: {note}." for name in acting for note in notes(inside[name])):
            warn(note)

    def _warn_of_unwritten_parameters(self) -> None:
        """Warn of parameters that train and are written nowhere."""
        own = {id(p) for adapter in self.adapters._adapters.values() for p in adapter.parameters()}
        tables = resized_keys(BaseModules(self.module))
        parameters = self.module.named_parameters()
        trained = [name for name, p in parameters if p.requires_grad and id(p) not in own and name not in tables]
        if trained:
            warn(
                f"Parameters train that belong to no adapter, such as {trained[0]!r} ({len(trained)} in all), and are "
                "not written. With AdapterTrainerMixin the checkpoints of transformers' Trainer hold them."
            )

    def _training_state(self, inside: Collection[Adapter], source: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        ours = resized_keys(BaseModules(self.module)).union(*map(self._keys, inside))
        text = setting(self.adapters, held=self.adapters.names)
        # Only the whole model's `load_state_dict` knows it.
        acted = {} if self.path else {SETTING_IN_FILE: encoded(text)}
        if source is not None:
            found = {key: tensor for key, tensor in source.items() if unwrapped_key(key) in ours}
            return {**dict(zip(found, whole(list(found.values())), strict=True)), **acted}
        with gathered(self.root, (module for adapter in inside for module in adapter.modules())):
            found = {key: tensor for key, tensor in self.module.state_dict().items() if key in ours}
        for key, tensor in found.items():
            if tensor.is_meta:
                owner, _, local = key.rpartition(".")
                found[key] = real_value(self.module.get_submodule(owner), local)
        return {**found, **acted}

    def holds_base(self, folder: Path, *, training: bool) -> bool:
        """Whether the folder holds the base model. Its adapter may lie there, but not a checkpoint of a training.

        Raises:
            SaveError: it holds a whole model that the adapter must not lie beside.
        """
        if not (folder / _MODEL_CONFIG).is_file() or not any(any(folder.glob(pattern)) for pattern in _MODEL_WEIGHTS):
            return False
        name = getattr(self.module, "name_or_path", None)
        of_base = isinstance(name, str) and bool(name) and Path(name).is_dir() and folder.samefile(name)
        if not of_base or training:
            raise SaveError(
                f"{folder} holds a whole model, and the adapter beside it would be read as one of that model's. Give "
                "another folder, or delete the model there."
            )
        return True


def _arguments(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call of `save_pretrained`, by name. One that asks for another format is refused."""
    given = dict(call.arguments)
    for parameter in call.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    for option, (value, why) in _REFUSED.items():
        if given.get(option, not value) is value:
            raise UnsupportedError(f"{option}={value} is not possible for adapters: {why}.")
    if given.get("variant") is not None:
        raise UnsupportedError(f"variant={given['variant']!r} is not possible: adapter files have no variants.")
    return given


def subfolder(folder: Path, name: str) -> Path:
    """The subfolder for an adapter of this name."""
    if Path(name).name != name or "\0" in name:
        raise SaveError(f"Adapter {name!r} cannot have a subfolder of that name. Rename it: adapters.rename.")
    return folder / name


def tidy(folder: Path, written: Collection[Path]) -> None:
    """After adapters were written to these places: remove an older one from the folder itself, warn of others below.

    Those stay: they may be somebody else's.
    """
    for stale in (WEIGHTS_FILE, PICKLE_FILE, STATE_FILE, CONFIG_FILE) if folder not in written else ():
        (folder / stale).unlink(missing_ok=True)
    others = sorted(
        path.parent.name
        for path in folder.glob(f"*/{CONFIG_FILE}")
        if path.parent not in written and not path.parent.name.startswith("checkpoint-")  # those are `Trainer`'s
    )
    if others:
        warn(
            f"{folder} also holds adapters from before, in the subfolders {', '.join(map(repr, others))}. Delete them "
            "if they are from an earlier save."
        )


def _push(folder: Path, places: Collection[Path], given: Mapping[str, Any]) -> None:
    """Upload the adapters at these places in the folder, as the model's own function does after saving."""
    from huggingface_hub import HfApi

    hub = HfApi(token=given.get("token"))
    repo = hub.create_repo(given.get("repo_id") or folder.name, private=given.get("private"), exist_ok=True).repo_id
    hub.upload_folder(
        repo_id=repo,
        folder_path=os.fspath(folder),
        allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, *(f"{place.name}/*" for place in places if place != folder)],
        commit_message=given.get("commit_message") or "Upload adapter",
        revision=given.get("revision"),
        create_pr=given.get("create_pr", False),
    )


def _let_outer_models_warn() -> None:
    """Let transformers' models warn when they are saved and only a model inside them has adapters. Wraps once."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    original = transformers and transformers.PreTrainedModel.save_pretrained
    if original is None or hasattr(original, "_warns_of_adapters"):
        return

    @functools.wraps(original)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside = () if _SAVE in self.__dict__ else named_modules(self)
        path = next((path for path, module in inside if path and module.__dict__.get(ATTRIBUTE)), None)
        if path is not None:
            warn(
                f"The adapters are attached to {path!r} inside this model, which does not know them: its file gets "
                "their tensors under names that from_pretrained ignores, so it returns the bare base. Save them too: "
                f"ak.attach(model.{path}).save(name, folder); or attach them to the whole model."
            )
        return original(self, *args, **kwargs)

    save_pretrained.__dict__["_warns_of_adapters"] = True
    transformers.PreTrainedModel.save_pretrained = save_pretrained
