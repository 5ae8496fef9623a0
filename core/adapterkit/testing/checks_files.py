"""Checks of saving and loading."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.contract import KeyRule, strip_file_prefix
from adapterkit.disk import inspect_adapter
from adapterkit.errors import CheckpointError
from adapterkit.files import WEIGHTS_FILE
from adapterkit.testing.case import Case, NotApplicable, Subject, expect, expect_close, expect_equal
from adapterkit.testing.probes import TARGETS


def check_save_load_is_identity(case: Case) -> None:
    """An adapter that is saved and loaded into a fresh base gives the outputs it gave, and saves to the same file."""
    for subject in case.subjects():
        adapted = subject.train().out()
        with case.folder() as folder:
            subject.adapters.save("a", folder)
            model, adapters = subject.fresh()
            report = adapters.load(folder, name="again")
            expect(report.ok, f"On {subject}: expected the file to fit; {report}.")
            expect_close(subject.out(model), adapted, f"The outputs after loading on {subject}")
            adapters.save("again", folder.with_name("again"))
            first, second = _read(folder), _read(folder.with_name("again"))
            _expect_same_tensors(second, first, f"On {subject}, saved again")


def check_file_has_exactly_its_keys(case: Case) -> None:
    """A file holds the adapter's parameters and shared tensors under its prefix and names, and nothing else."""
    rule = case.method.key_rule(case.config)
    for subject in case.subjects():
        with case.folder() as folder:
            subject.train().adapters.save("a", folder)
            keys = set(_read(folder))
        memory = set(subject.adapters.state_dict("a"))
        expect(
            keys == memory, f"On {subject}: expected the keys of state_dict; {sorted(keys ^ memory)} are in one only."
        )
        for key in strip_file_prefix(dict.fromkeys(keys, subject.plain)):
            path, _, local = next(
                ((p, p, key[len(p) + 1 :]) for p in TARGETS if key.startswith(p + ".")), ("", "", key)
            )
            right = rule.owns(local) if path else rule.is_shared(key)
            right = right or (key.endswith(".bias") and case.config.trained_biases != "none")
            expect(
                right,
                f"On {subject}: the key {key!r} is neither a layer's nor shared: it lacks {rule.prefix!r}.",
            )
        if "to_file" not in case.method.hooks:
            _expect_every_tensor(subject, rule, keys)


def _expect_every_tensor(subject: Subject, rule: KeyRule, keys: set[str]) -> None:
    for path in TARGETS:
        for name, _ in subject.layer(path).named_parameters():
            key = f"base_model.model.{path}.{name}"
            held = key in keys or rule.may_lack(name)
            expect(held, f"On {subject}: expected {key!r} in the file; it is not.")


def check_only_exempt_keys_may_be_absent(case: Case) -> None:
    """A file without an exempt key loads with equal outputs; without any other it is refused, model untouched."""
    subject = case.subject()
    adapted = subject.train().out()
    with case.folder() as folder:
        subject.adapters.save("a", folder)
        rule = _rule_in_file(subject, folder)
        tensors = _read(folder)
        for key in tensors:
            save_file({k: t for k, t in tensors.items() if k != key}, folder / WEIGHTS_FILE)
            model, adapters = subject.fresh()
            if rule.may_lack(key.removeprefix("base_model.")):
                adapters.load(folder, name="again")
                expect_close(subject.out(model), adapted, f"The outputs after loading without the exempt {key!r}")
                continue
            expect(_is_refused(subject, folder), f"expected a file without {key!r} to be refused; it was loaded.")


def check_unknown_keys_are_refused(case: Case) -> None:
    """A file with one tensor more than the adapter has is refused, and the message names it."""
    subject = case.subject()
    if "from_file" in case.method.hooks:
        raise NotApplicable("the method reads files in its own way (from_file)")
    with case.folder() as folder:
        subject.adapters.save("a", folder)
        prefix = case.method.key_rule(case.config).prefix
        extra = f"base_model.model.up.{prefix}not_there"
        save_file({**_read(folder), extra: subject.plain}, folder / WEIGHTS_FILE)
        expect(
            _is_refused(subject, folder), f"expected a file with the unknown {extra!r} to be refused; it was loaded."
        )


def check_files_tell_the_layers(case: Case) -> None:
    """What `sizes` says of a saved adapter are its layers, with their sizes: it needs no base to be opened."""
    if "sizes" not in case.method.hooks:
        raise NotApplicable("the method has no hook sizes")
    for subject in case.subjects():
        with case.folder() as folder:
            subject.adapters.save("a", folder)
            found = inspect_adapter(folder, values=False)
        kinds = {path: subject.layer(path).kind for path in TARGETS}
        expected = {path: (kind.out_features, kind.in_features) for path, kind in kinds.items()}
        told = {layer.path: layer.shape for layer in found.layers}
        expect(told == expected, f"On {subject}: expected layers of these sizes, {expected}; it told {told}.")
        odd = (*found.missing, *found.unknown, *found.mismatched)
        expect(not odd, f"On {subject}: expected its tensors to fit those layers; these do not: {', '.join(odd)}.")


def _is_refused(subject: Subject, folder: Path) -> bool:
    model, adapters = subject.fresh()
    try:
        adapters.load(folder, name="again")
    except CheckpointError:
        expect_equal(subject.out(model), subject.plain, "The outputs after a refused load")
        return True
    return False


def _rule_in_file(subject: Subject, folder: Path) -> KeyRule:
    """The rule of the config that the file has, which may be another than the adapter's."""
    _, adapters = subject.fresh()
    adapters.load(folder, name="again")
    from adapterkit.contract import default_registry

    config = adapters.config("again")
    return default_registry.method_of(config).key_rule(config)


def _read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def _expect_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    odd = sorted(found.keys() ^ expected.keys())
    expect(not odd, f"{where}: expected the same keys; {odd} are in one file only.")
    for key, tensor in expected.items():
        expect_equal(found[key], tensor, f"{where}: {key!r}")
