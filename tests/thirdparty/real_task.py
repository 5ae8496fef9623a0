"""Run in the fresh environment: foreign methods, asked for by name, on a real model and real texts."""

import sys
from pathlib import Path

import torch
from data import minilm_folder, tweet_polarity
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import adapterkit as ak

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
folder = Path(sys.argv[1])
CONFIGS = {
    "ia3": {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    "outer": {"target_modules": ["query", "value"]},
    "oft": {"target_modules": ["query", "value"], "oft_block_size": 16},
    "lokr": {"target_modules": ["query", "value"], "init_weights": "lycoris"},
    "lora": {"target_modules": ["query", "value"]},
}
texts, labels = zip(*tweet_polarity(16, 16).train, strict=True)
source = minilm_folder()
inputs = AutoTokenizer.from_pretrained(source)(
    list(texts), padding=True, truncation=True, max_length=16, return_tensors="pt"
)


def fresh() -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**inputs).logits


def train(adapters: ak.Adapters, name: str) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(adapters.parameters(name), lr=5e-3)
    losses = []
    for _ in range(3):
        loss = adapters.model(**inputs, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


model = fresh()
plain = logits(model)
bits = {key: value.clone() for key, value in model.state_dict().items()}
adapters, outputs = ak.attach(model), {}
for name, fields in CONFIGS.items():
    adapters.add(name, ak.config(name, **fields))
    torch.testing.assert_close(logits(model), plain)
    first, last = train(adapters, name)
    assert last < first, (name, first, last)
    outputs[name] = logits(model)
    assert (outputs[name] - plain).abs().max() > 1e-3, name
    adapters.save(name, folder / name)

for name in CONFIGS:
    adapters.activate(name, trainable=False)
    torch.testing.assert_close(logits(model), outputs[name])
    adapters.merge(name)
    torch.testing.assert_close(logits(model), outputs[name], rtol=1e-4, atol=1e-4)
    adapters.unmerge()
    other = fresh()
    ak.attach(other).load(folder / name, name="again")
    torch.testing.assert_close(logits(other), outputs[name])

together = ("lora", "outer", "lokr", "oft", "ia3")
adapters.activate(*together, trainable=False, heads="lora")
apart = logits(model)
adapters.merge(*together, heads="lora")
torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-4)
adapters.unmerge()
adapters.activate("lora", "outer", heads="lora", trainable=False)
one = logits(model)
adapters.activate("outer", "lora", heads="lora", trainable=False)
torch.testing.assert_close(logits(model), one)
model = adapters.detach()
for key, value in model.state_dict().items():
    assert torch.equal(value, bits[key]), key
torch.testing.assert_close(logits(model), plain)
print("all is well")
