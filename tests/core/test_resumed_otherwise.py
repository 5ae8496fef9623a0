"""A training resumes only if the adapters act as they did: otherwise it would go on with other numbers, unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import load_file
from tests.core.conftest import set_parameters
from tests.core.test_trainer import Wrapped, assert_equal, values
from tests.core.test_trainer_mixin import AdapterTrainer, trainer
from tests.models import build
from torch import nn
from transformers import Trainer

import adapterkit as ak
from adapterkit.integrations.accelerate import save_adapters_alone
from adapterkit.integrations.distributed import TrainingState
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

# torch says so whatever it is asked for
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TRAINED = LoraConfig(r=2, target_modules=["value"], modules_to_save=None)
BESIDE = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=None)


def together(
    *names: str,
    config: ak.AdapterConfig = TRAINED,
    beside: ak.AdapterConfig = BESIDE,
    order: str = "beside t",
    seed: int = 1,
    **options: Any,
) -> nn.Module:
    """A model whose adapter "t" trains beside the frozen adapter "beside"; `names` and the options for `activate`."""
    model = build("bert")
    adapters = ak.attach(model)
    torch.manual_seed(7)
    for name in order.split():
        adapters.add(name, config if name == "t" else beside, activate=False)
    set_parameters(adapters, "beside", seed=seed)
    adapters.activate(*(names or ("beside", "t")), **{"trainable": ["t"], **options})
    return model


def loaded_again(folder: Path) -> nn.Module:
    """The same, with "beside" saved and loaded as people do it in a new process."""
    first = together()
    ak.attach(first).save("beside", folder)
    model = build("bert")
    torch.manual_seed(7)
    ak.attach(model).load(folder, "beside")
    ak.attach(model).add("t", TRAINED)
    ak.attach(model).activate("beside", "t", trainable=["t"])
    return model


def frozen_in_part(model: nn.Module) -> nn.Module:
    for key, parameter in ak.attach(model).named_parameters("t"):
        parameter.requires_grad_("lora_B" in key)
    return model


def in_another_dtype(model: nn.Module) -> nn.Module:
    ak.attach(model).layers("t")["bert.encoder.layer.0.attention.self.value"].to(torch.bfloat16)
    return model


def renamed(model: nn.Module) -> nn.Module:
    ak.attach(model).rename("t", "u")
    return model


def with_one_more(model: nn.Module) -> nn.Module:
    ak.attach(model).add("s", TRAINED)
    ak.attach(model).activate("beside", "t", "s", trainable=["t", "s"])
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "not active": (lambda: together("t"), r"'beside', 't' acted and 't' trained, and here 't' acted and 't' trained"),
    "another order": (lambda: together("t", "beside"), r"adapters.activate\('beside', 't', trainable=\['t'\]\)"),
    "another strength": (
        lambda: together(strengths={"beside": 0.5}),
        r"and here 'beside' \(strength 0.5\), 't' acted",
    ),
    "trained too": (lambda: together(trainable=True), "'t' trained, and here .* 'beside', 't' trained|model trains"),
    "another alpha": (
        lambda: together(config=TRAINED.replace(lora_alpha=32)),
        "it was saved with lora_alpha = 8, and here it is 32",
    ),
    "another method": (
        lambda: together(config=LoHaConfig(r=2, target_modules=["value"], modules_to_save=None)),
        "method = 'lora', and here it is 'loha'|holds tensors of adapters that the model lacks",
    ),
    "another name": (
        lambda: renamed(together()),
        r"holds the adapters 't', and the model trains 'u'|trains 'u', and the state dict holds tensors of .*\.t\.",
    ),
    "one more": (
        lambda: with_one_more(together()),
        "holds the adapters 't', and the model trains 't', 's'|trains 's', and the state dict lacks them",
    ),
    "another rank": (
        lambda: together(config=TRAINED.replace(r=3)),
        r"it was saved with r = 2, and here it is 3|'t' was saved with another .*lora_A.*' is \(2, 16\) .*\(3, 16\)",
    ),
    "fewer targets": (
        lambda: together(config=TRAINED.replace(target_modules=["layer.0.attention.self.value"])),
        "'t' had 4 parameters, .*, and here it has 2 |holds tensors of adapters that the model lacks",
    ),
    "more targets": (
        lambda: together(config=TRAINED.replace(target_modules=["value", "key"])),
        "'t' had 4 parameters, none of them frozen.*, and here it has 8 parameters",
    ),
    "frozen in part": (
        lambda: frozen_in_part(together()),
        r"'t' had 4 parameters, none of .*, and here it has 4 .*, 2 of them frozen \(such as '.*lora_A.weight'\)",
    ),
    "another dtype": (
        lambda: in_another_dtype(together()),
        r"the dtype torch.float32, and here .* torch.bfloat16, torch.float32.* add the adapter with",
    ),
    "a head": (lambda: together(config=TRAINED.replace(modules_to_save=["classifier"])), "with the head of 't'"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[type[Trainer], Path]:
    folders = {}
    for cls in (AdapterTrainer, Trainer):
        folder = tmp_path_factory.mktemp("training")
        trainer(together(), folder, cls=cls).train()
        folders[cls] = folder / "checkpoint-1"
    return folders


@pytest.mark.parametrize("cls", [AdapterTrainer, Trainer], ids=["with the mixin", "plain"])
@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_training_in_which_adapters_act_otherwise_is_refused_and_changes_nothing(
    make: Callable[[], nn.Module], message: str, cls: type[Trainer], checkpoints: dict[type[Trainer], Path]
) -> None:
    model = make()
    before = values(model)
    with pytest.raises(ak.CheckpointError, match=message):
        trainer(model, checkpoints[cls].parent, cls=cls).train(resume_from_checkpoint=str(checkpoints[cls]))
    assert_equal(values(model), before)


@pytest.mark.parametrize("other", [{"seed": 2}, {"beside": BESIDE.replace(lora_alpha=32)}], ids=["values", "alpha"])
def test_another_frozen_adapter_is_refused(other: dict[str, Any], checkpoints: dict[type[Trainer], Path]) -> None:
    folder = checkpoints[AdapterTrainer]
    with pytest.raises(ak.CheckpointError, match=r"adapter 'beside' acted with other values.*load 'beside' from"):
        trainer(together(**other), folder.parent).train(resume_from_checkpoint=str(folder))


def test_a_plain_trainer_restores_the_frozen_adapter(checkpoints: dict[type[Trainer], Path]) -> None:
    model = together(seed=2)
    trainer(model, checkpoints[Trainer].parent, cls=Trainer).train(resume_from_checkpoint=str(checkpoints[Trainer]))
    for found, expected in zip(
        ak.attach(model).parameters("beside"), ak.attach(together()).parameters("beside"), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_training_beside_an_adapter_that_was_loaded_again_resumes(tmp_path: Path) -> None:
    whole, again = together(), loaded_again(tmp_path / "beside")
    trainer(whole, tmp_path).train()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(values(again), values(whole))


def in_memory(model: nn.Module, folder: Path) -> Callable[[nn.Module], object]:
    torch.save(model.state_dict(), folder / "state.pt")
    return lambda other: other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))


def by_plain_trainer(model: nn.Module, folder: Path) -> Callable[[nn.Module], object]:
    trainer(model, folder, cls=Trainer).train()
    checkpoint = str(folder / "checkpoint-1")
    return lambda other: trainer(other, folder, cls=Trainer).train(resume_from_checkpoint=checkpoint)


def by_accelerate(model: nn.Module, folder: Path) -> Callable[[nn.Module], object]:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder))

    def load(other: nn.Module) -> None:
        again = Accelerator(cpu=True)
        again.prepare(other)
        again.load_state(str(folder))

    return load


def by_torch(model: nn.Module, folder: Path) -> Callable[[nn.Module], object]:
    dcp.save({"model": model}, checkpoint_id=folder, no_dist=True)
    return lambda other: dcp.load({"model": other}, checkpoint_id=folder, no_dist=True)


def not_transformers(**options: Any) -> Any:
    model = Wrapped(inside=False)
    ak.attach(model).remove("t")
    torch.manual_seed(7)
    ak.attach(model).add("t", TRAINED.replace(lora_alpha=options.pop("lora_alpha", 8)))
    ak.attach(model).activate("t", **options)
    return model


def test_accelerate_notices_that_adapters_of_a_transformers_model_act_otherwise(tmp_path: Path) -> None:
    resume = by_accelerate(together(), tmp_path)
    resume(together())
    with pytest.raises(ak.CheckpointError, match=r"'beside' \(strength 0.5\), 't' acted"):
        resume(together(strengths={"beside": 0.5}))


@pytest.mark.parametrize("save", [in_memory, by_plain_trainer, by_accelerate, by_torch])
def test_whatever_saves_the_whole_state_dict_a_training_goes_on_only_as_it_was(save: Any, tmp_path: Path) -> None:
    resume = save(not_transformers(), tmp_path)
    resume(not_transformers())
    with pytest.raises(ak.CheckpointError, match="it was saved with lora_alpha = 8, and here it is 32"):
        resume(not_transformers(lora_alpha=32))
    with pytest.raises(ak.CheckpointError, match=r"and here 't' \(strength 0.5\) acted"):
        resume(not_transformers(strengths={"t": 0.5}))


def test_a_plain_trainer_says_what_reads_a_checkpoint_of_the_mixin(checkpoints: dict[type[Trainer], Path]) -> None:
    folder = checkpoints[AdapterTrainer]
    with pytest.raises(
        ak.CheckpointError, match=r"checkpoint-1 holds adapters and no model. Put .*AdapterTrainerMixin"
    ):
        trainer(together(), folder.parent, cls=Trainer).train(resume_from_checkpoint=str(folder))


def test_accelerate_says_what_reads_a_checkpoint_of_adapters_alone(tmp_path: Path) -> None:
    for saves in (True, False):
        accelerator, model = Accelerator(cpu=True), not_transformers()
        accelerator.prepare(model)
        if saves:
            save_adapters_alone(accelerator)
            accelerator.save_state(str(tmp_path))
    with pytest.raises(ak.CheckpointError, match=r"holds adapters and no model. Call .*save_adapters_alone"):
        accelerator.load_state(str(tmp_path))


def test_a_state_dict_of_the_whole_model_goes_into_any_base() -> None:
    other = not_transformers()
    for parameter in other.inner.bert.parameters():
        parameter.data.mul_(2)
    other.load_state_dict(not_transformers().state_dict())  # no warning of another base: it is replaced


def test_an_average_of_checkpoints_is_made_and_loaded(tmp_path: Path) -> None:
    by_accelerate(not_transformers(), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    average = {key: value * 0.9 + value * 0.1 for key, value in saved.items()}
    not_transformers().load_state_dict(average)
    with pytest.raises(ak.CheckpointError, match="lora_alpha = 8, and here it is 32"):
        not_transformers(lora_alpha=32).load_state_dict(average)


def test_a_model_that_tools_prepared_has_a_state_dict_of_its_own_tensors_alone(tmp_path: Path) -> None:
    model = not_transformers()
    expected = model.state_dict().keys()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    assert model.state_dict().keys() == accelerator.get_state_dict(model).keys() == expected
    assert all(isinstance(model.get_parameter(key), nn.Parameter) for key in expected)
    accelerator.save_model(model, str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() <= expected


def test_equal_trainings_have_equal_state_dicts_and_metadata() -> None:
    one, other = (not_transformers().state_dict() for _ in range(2))
    assert one._metadata == other._metadata  # so files of them are equal, too


def test_no_model_takes_the_setting_that_it_only_read_for_its_own() -> None:
    """Loading a base asks for the model's own state dict, which is given to nobody."""
    saved, model = not_transformers().state_dict(), not_transformers()
    model.load_state_dict(dict(saved))
    ak.attach(model).activate("t", strengths={"t": 0.5})
    with pytest.raises(ak.CheckpointError, match=r"and here 't' \(strength 0.5\) acted"):
        model.load_state_dict(saved)


def test_a_part_of_a_state_dict_that_is_asked_for_is_loaded() -> None:
    state = not_transformers().state_dict()
    left_out = next(key for key in state if "lora_B" in key)
    del state[left_out]
    assert left_out in not_transformers().load_state_dict(state, strict=False).missing_keys


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.complex64).conj()], ids=["sparse", "conjugate"]
)
def test_a_training_on_a_base_with_tensors_of_any_layout_has_a_state_dict(tensor: torch.Tensor) -> None:
    def model() -> nn.Module:
        made = build("bert")
        made.extra = nn.Parameter(tensor, requires_grad=False)
        ak.attach(made).add("t", TRAINED)
        return made

    model().load_state_dict(model().state_dict())


def test_a_state_dict_is_given_inside_a_transform_of_torch() -> None:
    model = not_transformers()

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        assert model.state_dict().keys() == parameters.keys()
        return sum(p.sum() for p in parameters.values())

    torch.func.grad(loss)({key: value.detach() for key, value in model.state_dict().items()})


def test_a_state_dict_goes_back_into_its_model_and_into_one_that_does_not_train_whatever_acts() -> None:
    model = not_transformers()
    duplicate = copy.deepcopy(model)
    state = model.state_dict()
    assert state.keys() == not_transformers(trainable=False).state_dict().keys()  # nothing that others would not know
    for own in (model, duplicate):
        ak.attach(own).activate("t", strengths={"t": 0.5})
    for other in (model, duplicate, not_transformers(trainable=False, strengths={"t": 0.5})):
        other.load_state_dict(state)


def test_a_state_dict_is_saved_and_loaded_where_adapters_are_disabled_for_a_while() -> None:
    model, other = not_transformers(), not_transformers()
    with ak.attach(model).disabled():
        inside = model.state_dict()
    other.load_state_dict(inside)
    with ak.attach(other).disabled():
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("save", [lambda model: model.state_dict(), lambda model: TrainingState(model).state_dict()])
def test_a_training_beside_a_merged_adapter_resumes_beside_it(save: Any) -> None:
    saved = save(merged := together("t"))
    other = together("t")
    ak.attach(other).merge("beside")
    ak.attach(merged).merge("beside")
    for state, model, says in (
        (save(merged), together("t"), r"with 'beside' merged, and here .*: adapters.merge\('beside'\), adapters.activ"),
        (saved, other, r"'t' acted and 't' trained, and here .* with 'beside' merged.*: adapters.unmerge\(\), "),
    ):
        load = model.load_state_dict if "setting" not in state else TrainingState(model).load_state_dict
        with pytest.raises(ak.CheckpointError, match=says):
            load(state)
    (other.load_state_dict if "setting" not in saved else TrainingState(other).load_state_dict)(save(merged))


def test_a_training_state_of_several_processes_is_refused_too() -> None:
    saved = TrainingState(together()).state_dict()
    again = together(seed=2)
    with pytest.raises(ak.CheckpointError, match=r"The checkpoint is .* adapter 'beside' acted with other values"):
        TrainingState(again).load_state_dict(saved)
    ak.attach(again).activate("t")
    with pytest.raises(ak.CheckpointError, match=r"The checkpoint is .* in which 'beside', 't' acted"):
        TrainingState(again).load_state_dict(saved)


def test_a_training_state_of_more_targets_is_not_restored_in_part(tmp_path: Path) -> None:
    """torch reads those tensors of a checkpoint that it is asked for, and leaves out the others."""
    dcp.save({"t": TrainingState(together("t", config=BESIDE))}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ak.CheckpointError, match=r"'t' had 8 parameters, .*, and here it has 4 parameters"):
        dcp.load({"t": TrainingState(together("t"))}, checkpoint_id=tmp_path, no_dist=True)


def test_an_optimizer_is_not_resumed_for_adapters_in_another_order(tmp_path: Path) -> None:
    """Averages belong to parameters by their number, and shapes do not tell two adapters apart."""
    options = {"config": BESIDE, "trainable": True}
    trainer(together(**options), tmp_path).train()
    with pytest.raises(ak.CheckpointError, match=r"'beside', 't' trained, and here .* 't', 'beside' trained"):
        trainer(together(order="t beside", **options), tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.to(torch.bfloat16), "whose weights are float32, and here they are bfloat16"),
        (lambda model: [p.data.mul_(2) for p in model.parameters()], "with other weights than this one has"),
        (lambda model: model.bert.embeddings.word_embeddings.weight.data.mul_(2), "with other weights than this one"),
    ],
)
def test_a_warning_says_that_the_base_is_another(change: Callable[[nn.Module], object], message: str) -> None:
    first, other = build("bert"), build("bert")
    change(other)
    for model in (first, other):
        ak.attach(model).add("t", TRAINED)
    saved = TrainingState(first).state_dict()
    with pytest.warns(ak.AdapterWarning, match=f"The checkpoint is of a training on a base {message}"):
        TrainingState(other).load_state_dict(saved)


def test_a_checkpoint_of_which_only_a_part_was_written_again_is_refused(tmp_path: Path) -> None:
    """As when a save into the same folder is killed in the middle."""
    model = together()
    trainer(model, tmp_path).train()
    ak.attach(model).save("t", tmp_path / "checkpoint-1")
    with pytest.raises(ak.CheckpointError, match=r"checkpoint-1 holds adapter_model.safetensors and .* of two saves"):
        trainer(together(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_view_is_resumed_only_as_it_acted(tmp_path: Path) -> None:
    trainer(ak.as_peft(together("t", config=BESIDE)), tmp_path, cls=Trainer).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ak.CheckpointError, match=r"and here 't' \(strength 0.5\) acted"):
        trainer(ak.as_peft(together("t", config=BESIDE, strengths={"t": 0.5})), tmp_path, cls=Trainer).train(
            resume_from_checkpoint=checkpoint
        )
    view = ak.as_peft(together(config=BESIDE))
    with pytest.warns(ak.AdapterWarning, match=r"only the first active adapter act and train, here 'beside'.*Mixin"):
        view.load_adapter(f"{checkpoint}/t", "t")
