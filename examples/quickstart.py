"""Fine-tune one pretrained encoder for two tasks, a LoRA adapter and a head for each; save, reload, switch."""

import argparse
import tempfile
from pathlib import Path

import torch
from data import Task, minilm_folder, source_domain, tweet_polarity
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import adapterkit as ak

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=None, help="a model folder or hub id (default: the MiniLM of `make setup`)")
parser.add_argument("--rows", type=int, default=960, help="rows to train each task on")
parser.add_argument("--test-rows", type=int, default=640, help="rows to test each task on")
options = parser.parse_args()
source = options.model or minilm_folder()
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(source)


def logits(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """The model's outputs, `(len(texts), labels)`."""
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    return model(**inputs).logits  # type: ignore[no-any-return]


def train(model: torch.nn.Module, task: Task, adapters: ak.Adapters) -> None:
    """One epoch over the task's rows; only the active adapter and its head learn."""
    optimizer = torch.optim.AdamW(adapters.parameters(task.name), lr=2e-3)
    model.train()
    for i in tqdm(range(0, len(task.train), 32), desc=f"training {task.name}", unit="batch"):
        texts, labels = zip(*task.train[i : i + 32], strict=True)
        cross_entropy(logits(model, list(texts)), torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.inference_mode()
def held_out(model: torch.nn.Module, task: Task) -> tuple[torch.Tensor, float]:
    """Outputs for the held-out rows, and the share of them that are right."""
    texts, labels = zip(*task.test, strict=True)
    outputs = torch.cat([logits(model, list(texts[i : i + 64])) for i in range(0, len(texts), 64)])
    return outputs, (outputs.argmax(-1) == torch.tensor(labels)).float().mean().item()


model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()
adapters = ak.attach(model)
tasks = (tweet_polarity(options.rows, options.test_rows), source_domain(options.rows, options.test_rows))
saved, folder = {}, Path(tempfile.mkdtemp())

for task in tasks:
    config = ak.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    print(adapters.add(task.name, config, id2label=dict(enumerate(task.labels))))
    before = held_out(model, task)[1]
    train(model, task, adapters)
    saved[task.name], after = held_out(model, task)
    size = sum(file.stat().st_size for file in adapters.save(task.name, folder / task.name).iterdir())
    print(
        f"  {len(task.labels)} labels; the most frequent one is {task.majority:.1%} of {len(task.test)} held-out rows"
    )
    print(f"  accuracy there {before:.1%} before training, {after:.1%} after (before, the head is random)")
    print(f"  {size:,} bytes saved\n")

fresh = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()
loaded = ak.attach(fresh)
for task in tasks:
    loaded.load(folder / task.name, name=task.name, activate=False)
for task in tasks:
    loaded.activate(task.name, trainable=False)
    difference = (held_out(fresh, task)[0] - saved[task.name]).abs().max().item()
    print(f"{task.name}, loaded into a fresh base: outputs differ from those before saving by at most {difference:.1g}")
print(f"\n{loaded.status()}")
