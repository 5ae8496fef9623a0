"""Two tasks, an adapter each, in one model: all labels in one head, one feature extractor, and what merging costs."""

import argparse
from collections.abc import Iterator

import torch
from data import Row, Task, minilm_folder, source_domain, tweet_polarity
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import adapterkit as ak
from adapterkit_lora import LoraConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rows", type=int, default=960, help="rows to train each task on")
parser.add_argument("--test-rows", type=int, default=640, help="rows to test each task on")
parser.add_argument("--layers", default="all-linear", help="the layers to adapt: a regular expression, or all-linear")
options = parser.parse_args()
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
Batch = dict[str, torch.Tensor]


def batches(rows: list[Row], size: int = 64) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Rows of the same order as inputs of the model and labels."""
    for i in range(0, len(rows), size):
        texts, labels = zip(*rows[i : i + size], strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        yield dict(inputs), torch.tensor(labels)


def train(model: torch.nn.Module, task: Task, adapters: ak.Adapters) -> None:
    """One epoch over the task's rows; only the active adapter and its head learn."""
    optimizer = torch.optim.AdamW(adapters.parameters(task.name), lr=2e-3)
    model.train()
    for inputs, labels in tqdm(batches(task.train, 32), desc=f"training {task.name}", unit="batch"):
        cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: Task, labels: slice = slice(None)) -> float:
    """Share of the held-out rows that the outputs for these labels get right."""
    right = [(model(**x).logits[:, labels].argmax(-1) == y).sum() for x, y in batches(task.test)]
    return int(torch.stack(right).sum()) / len(task.test)


def probe(model: torch.nn.Module, task: Task) -> float:
    """Accuracy of a linear probe (ridge regression on one-hot labels, in closed form) on the model's features."""
    x, x_test = (
        ak.features(model, (inputs for inputs, _ in batches(rows)), progress=False).double()
        for rows in (task.train, task.test)
    )
    y, y_test = (torch.tensor([label for _, label in rows]) for rows in (task.train, task.test))
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, x_test = (torch.nn.functional.pad((z - mean) / deviation, (0, 1), value=1.0) for z in (x, x_test))
    penalty = 0.1 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.t() @ x + penalty, x.t() @ one_hot(y).double())
    return int(((x_test @ weights).argmax(-1) == y_test).sum()) / len(y_test)


model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2).eval()
adapters = ak.attach(model)
tasks = (tweet_polarity(options.rows, options.test_rows), source_domain(options.rows, options.test_rows))
own: dict[str, float] = {}
for task in tasks:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=options.layers)
    adapters.add(task.name, config, id2label=dict(enumerate(task.labels)))
    train(model, task, adapters)
    own[task.name] = accuracy(model, task)
    print(
        f"{task.name}: its own adapter is right on {own[task.name]:.1%}, the most frequent label on {task.majority:.1%}"
    )

# One adapter with the sum of both changes, and one head that answers both tasks at once.
weights = dict.fromkeys(own, 1.0)
print(f"\n{adapters.combine('both', weights, heads='concat')}")
adapters.activate("both", trainable=False)
print(f"labels of the model now: {', '.join(model.config.id2label.values())}")

# Method and space: accuracy of each task by its own rows of the common head, relative to its own adapter's.
print(f"\n{'merging, weights 1':<24}" + "".join(f"{task.name:>24}" for task in tasks))
pruning = {"density": 0.5, "seed": 0}
choices = {"linear": {}, "ties": {"density": 0.5}, "dare_ties": pruning, "tsv": {}}
for method, extra in choices.items():
    for space in ("delta", "core"):
        for isotropize in (False, True):
            fields = {"method": method, "space": space, "isotropize": isotropize, **extra}
            adapters.combine("merged", weights, heads="concat", **fields)  # type: ignore[arg-type]
            line, first = f"{method + ', ' + space + (', iso' if isotropize else ''):<24}", 0
            with adapters.activated("merged", trainable=False):
                for task in tasks:
                    found = accuracy(model, task, slice(first, first + len(task.labels)))
                    line += f"{found:>14.1%} ({found / own[task.name]:>6.1%})"
                    first += len(task.labels)
            adapters.remove("merged")
            print(line, flush=True)

# One feature extractor for both tasks, beside the single adapters and the bare base.
adapters.combine("tsv", weights, method="tsv", heads="drop")
print(f"\n{'linear probe on':<24}" + "".join(f"{task.name:>24}" for task in tasks))
for names in ((), *((task.name,) for task in tasks), ("both",), ("tsv",)):
    with adapters.activated(*names, trainable=False):
        shares = "".join(f"{probe(model, task):>24.1%}" for task in tasks)
    print(f"{', '.join(names) or 'the bare base':<24}{shares}", flush=True)
