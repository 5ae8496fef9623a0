"""What a sum with another adapter costs, beside what the report says of the two: the reason for its thresholds.

Three adapters of two tasks, and one of random directions, are added to each other with several weights. The report's
disturbance is what the other adds in the directions that an adapter uses, relative to that adapter's size.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch
from data import Row, Task, minilm_folder, source_domain, tweet_polarity
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import adapterkit as ak
from adapterkit_lora import LoraConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rows", type=int, default=960, help="rows to train each task on")
parser.add_argument("--test-rows", type=int, default=640, help="rows to test each task on")
parser.add_argument("--weights", type=float, nargs="*", default=[0.5, 1, 2, 4, -1], help="of the adapter that is added")
options = parser.parse_args()
logging.set_verbosity_error()
logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def batches(rows: Sequence[Row], size: int) -> Iterator[Batch]:
    """Rows as inputs of the model and labels."""
    for i in range(0, len(rows), size):
        texts, labels = zip(*rows[i : i + size], strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=40, return_tensors="pt")
        yield dict(inputs), torch.tensor(labels)


def train(adapters: ak.Adapters, name: str, task: Task, rank: int) -> None:
    """An adapter of this rank, one epoch over the task's rows."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r"bert\.encoder\..*(query|key|value|dense)")
    adapters.add(name, config, id2label=dict(enumerate(task.labels)))
    optimizer = torch.optim.AdamW(adapters.parameters(name), lr=2e-3)
    adapters.model.train()
    for inputs, labels in batches(task.train, 32):
        cross_entropy(adapters.model(**inputs).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapters.model.eval()


@torch.no_grad()
def accuracy(adapters: ak.Adapters, name: str, held: Sequence[Batch]) -> float:
    """Share of the held-out rows that an adapter with its head gets right."""
    with adapters.activated(name, trainable=False):
        right = [(adapters.model(**x).logits.argmax(-1) == y).sum() for x, y in held]
    return int(torch.stack(right).sum()) / sum(len(y) for _, y in held)


@torch.no_grad()
def randomise(adapters: ak.Adapters, name: str) -> None:
    """Random directions in place of an adapter's own, its sizes kept."""
    for path, parameter in adapters.named_parameters(name):
        if "lora_" in path:
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.norm() / noise.norm())


torch.manual_seed(0)
adapters = ak.attach(AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2))
polarity, domain = (make(options.rows, options.test_rows) for make in (tweet_polarity, source_domain))
tasks = {"polarity": polarity, "domain": domain, "polarity-16": polarity}
for name, task in tasks.items():
    train(adapters, name, task, 16 if name.endswith("16") else 8)
adapters.copy("domain", "random")
randomise(adapters, "random")
held = {name: list(batches(sorted(task.test, key=lambda row: len(row[0])), 64)) for name, task in tasks.items()}
report = adapters.report()
names = [adapter.name for adapter in report.findings.adapters]

print(f"{'adapter':<12} {'with':<12} {'weight':>6} {'disturbance':>11} {'accuracy kept':>13}")
for i, name in enumerate(tasks):
    own = accuracy(adapters, name, held[name])
    adapters.convert(name, to="lora", name="cut", energy=0.99)
    print(f"{name:<12} {'cut to 99 %':<12} {'':>6} {'':>11} {accuracy(adapters, 'cut', held[name]) / own:>13.1%}")
    adapters.remove("cut")
    for j, other in enumerate(names):
        for weight in options.weights if i != j else ():
            found = report.findings.pairs[min(i, j), max(i, j)].inside[0 if i < j else 1]
            adapters.combine("sum", {name: 1.0, other: weight}, heads=name)
            kept = accuracy(adapters, "sum", held[name]) / own
            adapters.remove("sum")
            print(f"{name:<12} {other:<12} {weight:>6g} {abs(weight) * found:>11.1%} {kept:>13.1%}", flush=True)
