"""sentence-transformers on an adapted model: train, save, load, resume, best model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.conftest import set_parameters
from tests.models import build
from torch import Tensor

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

from .words import datasets, sentence, tokenizer

pytest.importorskip("sentence_transformers")

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["query"], bias="all", lora_dropout=0.1),
    "loha": LoHaConfig(r=2, target_modules=["query", "value"]),
    "vera": VeraConfig(r=2, target_modules=["query"]),
}
MODEL, INSIDE = "the model", "the transformer inside"  # where the adapters are attached
CASES = pytest.mark.parametrize(("name", "place"), [("lora", MODEL), ("lora", INSIDE), ("loha", MODEL)])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build("bert").bert.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, place: str, config: ak.AdapterConfig) -> tuple[Any, ak.Adapters]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    model = SentenceTransformer(modules=[Transformer(str(base)), Pooling(16)], device="cpu")
    torch.manual_seed(3)
    adapters = ak.attach(model if place == MODEL else model[0].auto_model)
    adapters.add("t", config)
    return model, adapters


def embeddings(model: Any) -> Tensor:
    return model.encode([sentence(1), sentence(5)], convert_to_tensor=True)


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    given = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, **options}
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=4, disable_tqdm=True, **given
    )
    pairs = {"a": [sentence(i) for i in range(16)], "b": [sentence(i, 5) for i in range(16)], "label": [1.0, 0.0] * 8}
    data = datasets.Dataset.from_dict(pairs)
    return SentenceTransformerTrainer(model, arguments, data, data, CosineSimilarityLoss(model))


@CASES
def test_a_saved_model_gives_the_trained_embeddings(name: str, place: str, base: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model, adapters = adapted(base, place, CONFIGS[name])
    with adapters.disabled():
        bare = embeddings(model)
    trainer(model, tmp_path / "out", save_strategy="no").train()
    trained = embeddings(model)
    assert (trained - bare).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    torch.testing.assert_close(embeddings(SentenceTransformer(str(tmp_path / "saved"), device="cpu")), trained)
    adapters.merge("t")
    model.save_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(embeddings(SentenceTransformer(str(tmp_path / "merged"), device="cpu")), trained)


@CASES
def test_a_resumed_training_equals_an_uninterrupted_one(name: str, place: str, base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base, place, CONFIGS[name])
    trainer(model, tmp_path / "out").train()
    again, _ = adapted(base, place, CONFIGS[name])
    trainer(again, tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():  # another alignment of memory changes less than this, a step far more
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_the_best_model_at_the_end_is_the_one_that_was_saved_then(base: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model, _ = adapted(base, MODEL, CONFIGS["lora"])
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    run = trainer(model, tmp_path / "out", load_best_model_at_end=True, greater_is_better=True, **options)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")  # the loss falls
    best = SentenceTransformer(run.state.best_model_checkpoint, device="cpu")
    torch.testing.assert_close(embeddings(model), embeddings(best))
    last = SentenceTransformer(str(tmp_path / "out" / "checkpoint-4"), device="cpu")
    assert (embeddings(model) - embeddings(last)).abs().max() > 1e-4


def test_shared_tensors_at_the_model_itself_are_refused(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base, MODEL, CONFIGS["vera"])
    with pytest.raises(ak.StateError, match=r"attach the adapters to the transformers model inside: model\[0\]"):
        model.save_pretrained(str(tmp_path / "saved"))


def test_an_adapter_that_is_more_than_the_transformers_is_refused(base: Path, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    model, _ = adapted(base, MODEL, CONFIGS["lora"])
    model.append(Dense(16, 4))
    adapters = ak.attach(model)
    adapters.add("u", LoraConfig(r=2, target_modules=["query", "2.linear"]))
    with pytest.raises(ak.StateError, match=r"'0.model' cannot be saved with adapter 'u', which has another part at"):
        model.save_pretrained(str(tmp_path / "saved"))


@pytest.mark.parametrize("inside", [False, True])
def test_a_module_that_writes_no_adapters_is_refused_until_they_are_merged(inside: bool, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding

    words = StaticEmbedding(tokenizer().backend_tokenizer, embedding_dim=8)
    model = SentenceTransformer(modules=[words, Dense(8, 4)], device="cpu")
    adapters = ak.attach(model[1] if inside else model)
    adapters.add("t", LoraConfig(r=2, target_modules=["linear"], modules_to_save=None))
    set_parameters(adapters, "t")
    expected = embeddings(model)
    with pytest.raises(ak.StateError, match=r"acts in a Dense, whose function 'save' writes no adapters"):
        model.save_pretrained(str(tmp_path / "saved"))
    adapters.merge("t")
    model.save_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(embeddings(SentenceTransformer(str(tmp_path / "merged"), device="cpu")), expected)
    adapters.unmerge()
    if not inside:  # what is not in a state dict is not replaced there
        adapters.add("u", LoraConfig(r=2, target_modules=["linear"], modules_to_save=["embedding"]))
        adapters.merge("u")
        with pytest.raises(ak.StateError, match=r"with a head merge_and_detach\('u'\)"):
            model.save_pretrained(str(tmp_path / "head"))


def test_a_cross_encoder_is_saved_with_its_adapter_and_head(base: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(base), num_labels=1, device="cpu")
    pairs = [(sentence(1), sentence(2)), (sentence(1), sentence(7))]
    with torch.no_grad():
        model[0].model.classifier.weight.mul_(50)
    model.save_pretrained(str(tmp_path / "whole"))
    model = CrossEncoder(str(tmp_path / "whole"), device="cpu")
    adapters = ak.attach(model[0].model)
    adapters.add("t", LoraConfig(r=2, target_modules=["query"]))
    set_parameters(adapters, "t", scale=0.1)
    expected = model.predict(pairs, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "saved"))
    torch.testing.assert_close(
        CrossEncoder(str(tmp_path / "saved"), device="cpu").predict(pairs, convert_to_tensor=True), expected
    )


# Sparse encoders and cross encoders


def sparse(folder: Path) -> Any:
    from sentence_transformers import SparseEncoder

    return SparseEncoder(str(folder), device="cpu")


def cross(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), num_labels=1, device="cpu")


def outputs(model: Any) -> Tensor:
    from sentence_transformers import CrossEncoder

    pairs = [(sentence(1), sentence(2)), (sentence(1), sentence(7))]
    found = model.predict(pairs, convert_to_tensor=True) if isinstance(model, CrossEncoder) else embeddings(model)
    return found.to_dense() if found.is_sparse else found


def trained(make: Any, base: Path, config: ak.AdapterConfig, folder: Path, mixin: bool, **options: Any) -> Any:
    """A model of this kind after a training of four steps, or its rest."""
    import sentence_transformers
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.sparse_encoder.losses import SparseCosineSimilarityLoss, SpladeLoss

    from adapterkit.integrations.transformers import AdapterTrainerMixin

    model = make(base)
    torch.manual_seed(3)
    ak.attach(model).add("t", config)
    kind = type(model).__name__
    arguments = getattr(sentence_transformers, f"{kind}TrainingArguments")(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        per_device_train_batch_size=4,
        disable_tqdm=True,
    )
    rows = {"a": [sentence(i) for i in range(16)], "b": [sentence(i, 5) for i in range(16)], "label": [1.0, 0.0] * 8}
    if make is cross:
        loss = BinaryCrossEntropyLoss(model)
    else:
        loss = SpladeLoss(model, SparseCosineSimilarityLoss(model), document_regularizer_weight=1e-3)
    cls = getattr(sentence_transformers, f"{kind}Trainer")
    cls = type("Mixed", (AdapterTrainerMixin, cls), {}) if mixin else cls
    cls(model, arguments, train_dataset=datasets.Dataset.from_dict(rows), loss=loss).train(**options)
    return model


@pytest.fixture
def bases(tmp_path: Path) -> dict[Any, Path]:
    """A masked language model for the sparse encoder, and a classifier for the cross encoder."""
    from transformers import BertForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(build("bert").config).save_pretrained(tmp_path / "masked")
    tokenizer(mask_token="w5").save_pretrained(tmp_path / "masked")
    build("bert").bert.save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    cross(tmp_path / "plain").save_pretrained(str(tmp_path / "pairs"))  # with one head, not a random one each time
    return {sparse: tmp_path / "masked", cross: tmp_path / "pairs"}


OTHERS = pytest.mark.parametrize("make", [sparse, cross])


@OTHERS
@pytest.mark.parametrize("name", ["loha", "pissa"])
def test_other_encoders_are_saved_with_what_was_trained(make: Any, name: str, bases: Any, tmp_path: Path) -> None:
    config = {**CONFIGS, "pissa": LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa")}[name]
    bare = outputs(make(bases[make]))
    model = trained(make, bases[make], config, tmp_path / "out", mixin=False)
    set_parameters(ak.attach(model), "t", scale=0.5)  # so that the tiny models' outputs show it
    assert (outputs(model) - bare).abs().max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    torch.testing.assert_close(outputs(make(tmp_path / "saved")), outputs(model))


@pytest.mark.parametrize(("make", "mixin"), [(sparse, True), (cross, False)])
def test_other_encoders_resume(make: Any, mixin: bool, bases: Any, tmp_path: Path) -> None:
    model = trained(make, bases[make], CONFIGS["lora"], tmp_path / "out", mixin)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    again = trained(make, bases[make], CONFIGS["lora"], tmp_path / "out", mixin, resume_from_checkpoint=checkpoint)
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_what_is_pushed_to_the_hub_gives_the_trained_embeddings(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload itself is replaced: the folder that would be uploaded is kept."""
    from huggingface_hub import HfApi
    from sentence_transformers import SentenceTransformer

    model, adapters = adapted(base, MODEL, CONFIGS["lora"])
    set_parameters(adapters, "t", scale=0.1)

    def keep(self: Any, *, folder_path: str, **_: Any) -> Any:
        shutil.copytree(folder_path, tmp_path / "pushed")
        return type("Commit", (), {"commit_url": "", "pr_url": "", "oid": ""})()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id})())
    monkeypatch.setattr(HfApi, "create_branch", lambda self, *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", keep)
    model.push_to_hub("someone/mood")
    assert (tmp_path / "pushed" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "pushed" / "model.safetensors").exists()
    torch.testing.assert_close(
        embeddings(SentenceTransformer(str(tmp_path / "pushed"), device="cpu")), embeddings(model)
    )


@pytest.mark.parametrize("name", ["vera", "lora"])
def test_the_folder_of_any_method_loads_on_its_base(name: str, base: Path, tmp_path: Path) -> None:
    """PEFT cannot put VeRA on a model in place, so `SentenceTransformer(folder)` refuses it."""
    from sentence_transformers import SentenceTransformer

    model, adapters = adapted(base, INSIDE, CONFIGS[name])
    set_parameters(adapters, "t", scale=0.1)
    model.save_pretrained(str(tmp_path / "saved"))
    if name == "vera":
        with pytest.raises(ValueError, match="VERA"):
            SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    again, _ = adapted(base, INSIDE, CONFIGS[name])
    inside = ak.attach(again[0].auto_model)
    inside.load(tmp_path / "saved", "u")
    torch.testing.assert_close(embeddings(again), embeddings(model))
