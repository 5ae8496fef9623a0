"""Checks of saving and loading."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.contract import default_registry, strip_file_prefix
from adapterkit.disk import inspect_adapter
from adapterkit.errors import CheckpointError
from adapterkit.files import WEIGHTS_FILE
from adapterkit.testing.case import TARGETS, Case, NotApplicable, expect, expect_close, expect_equal


def check_save_load_is_identity(case: Case) -> None:
    """An adapter that is saved and loaded into a fresh base gives the outputs it gave, and saves to the same file."""
    for subject in case.subjects():
        adapted = subject.train().out()
        with TemporaryDirectory() as name:
            folder, second = Path(name) / "first", Path(name) / "second"
            subject.adapters.save("a", folder)
            model, adapters = subject.fresh()
            report = adapters.load(folder, name="again")
            expect(report.ok, f"On {subject}: expected the file to fit; {report}.")
            expect_close(subject.out(model), adapted, f"The outputs after loading on {subject}")
            adapters.save("again", second)
            expected, found = _read(folder), _read(second)
        odd = sorted(found.keys() ^ expected.keys())
        expect(not odd, f"On {subject}, saved again: expected the same keys; {odd} are in one file only.")
        for key, tensor in expected.items():
            expect_equal(found[key], tensor, f"On {subject}, saved again: {key!r}")


def check_file_has_exactly_its_keys(case: Case) -> None:
    """A file holds the adapter's parameters and shared tensors under its prefix and names, and nothing else."""
    rule = case.method.key_rule(case.config)
    for subject in case.subjects():
        with TemporaryDirectory() as folder:
            subject.train().adapters.save("a", folder)
            keys = set(_read(Path(folder)))
        odd = sorted(keys ^ set(subject.adapters.state_dict("a")))
        expect(not odd, f"On {subject}: expected the keys of state_dict; {odd} are in one only.")
        for key in strip_file_prefix(dict.fromkeys(keys, subject.plain)):
            path = next((p for p in TARGETS if key.startswith(f"{p}.")), "")
            right = rule.owns(key.removeprefix(f"{path}.")) if path else rule.is_shared(key)
            right = right or (key.endswith(".bias") and case.config.trained_biases != "none")
            expect(right, f"On {subject}: the key {key!r} is neither a layer's nor shared: it lacks {rule.prefix!r}.")
        if "to_file" in case.method.hooks:
            continue  # it may write other tensors
        for path in TARGETS:
            for name, _ in subject.layer(path).named_parameters():
                key = f"base_model.model.{path}.{name}"
                expect(key in keys or rule.may_lack(name), f"On {subject}: expected {key!r} in the file; it is not.")


def check_only_exempt_keys_may_be_absent(case: Case) -> None:
    """A file without an exempt key loads with equal outputs; without any other it is refused, model untouched."""
    subject = next(case.subjects())
    adapted = subject.train().out()
    with TemporaryDirectory() as name:
        folder = Path(name)
        subject.adapters.save("a", folder)
        _, adapters = subject.fresh()
        adapters.load(folder, name="again")
        config = adapters.config("again")  # the file may have another than the adapter
        rule = default_registry.method_of(config).key_rule(config)
        tensors = _read(folder)
        for key in tensors:
            save_file({k: t for k, t in tensors.items() if k != key}, folder / WEIGHTS_FILE)
            exempt = rule.may_lack(key.removeprefix("base_model."))
            model, adapters = subject.fresh()
            try:
                adapters.load(folder, name="again")
                expect(exempt, f"expected a file without {key!r} to be refused; it was loaded.")
            except CheckpointError:
                expect(not exempt, f"expected a file without the exempt {key!r} to load; it was refused.")
            expected = adapted if exempt else subject.plain
            expect_close(subject.out(model), expected, f"The outputs after loading without {key!r}")


def check_files_tell_the_layers(case: Case) -> None:
    """`sizes` tells the layers of a saved adapter, with their sizes, so that it can be opened without a base."""
    if "sizes" not in case.method.hooks:
        raise NotApplicable("the method has no hook sizes")
    for subject in case.subjects():
        with TemporaryDirectory() as folder:
            subject.adapters.save("a", folder)
            found = inspect_adapter(folder, values=False)
        kinds = {path: subject.layer(path).kind for path in TARGETS}
        expected = {path: (kind.out_features, kind.in_features) for path, kind in kinds.items()}
        told = {layer.path: layer.shape for layer in found.layers}
        expect(told == expected, f"On {subject}: expected layers of these sizes, {expected}; it told {told}.")
        odd = (*found.missing, *found.unknown, *found.mismatched)
        expect(not odd, f"On {subject}: expected its tensors to fit those layers; these do not: {', '.join(odd)}.")


def _read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_FILE)
