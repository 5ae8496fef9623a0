"""Fine-tune one pretrained encoder for two tasks, a LoRA adapter and a head each; save, reload, switch.

python examples/quickstart.py [--model FOLDER_OR_HUB_ID]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from data import Task, minilm_folder, source_domain, tweet_polarity
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import adapterkit as ak
from adapterkit_lora import LoraConfig

logging.set_verbosity_error()
logging.disable_progress_bar()


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, adapters: ak.Adapters) -> None:
    """One epoch over the task's rows with the active adapter."""
    optimizer = torch.optim.AdamW(adapters.parameters(task.name), lr=2e-3)
    batches = torch.randperm(len(task.train)).split(32)
    model.train()
    for rows in tqdm(batches, desc=f"training {task.name!r}", unit="batch"):
        texts, labels = zip(*(task.train[i] for i in rows), strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        cross_entropy(model(**inputs).logits, torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.inference_mode()
def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> torch.Tensor:
    """Logits for the held-out rows."""
    texts = [text for text, _ in task.test]
    batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    encoded = (tokenizer(b, padding=True, truncation=True, max_length=48, return_tensors="pt") for b in batches)
    return torch.cat([model(**inputs).logits for inputs in encoded])


def accuracy(logits: torch.Tensor, task: Task) -> float:
    """Share of held-out rows whose class is right."""
    return (logits.argmax(-1) == torch.tensor([label for _, label in task.test])).float().mean().item()


def main() -> None:
    """Train both adapters, save them, and use them on a fresh base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or hub id (default: the MiniLM that `make setup` installs)")
    source = parser.parse_args().model or minilm_folder()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()
    adapters = ak.attach(model)
    tasks, before_saving, folder = (tweet_polarity(), source_domain()), {}, Path(tempfile.mkdtemp())

    for task in tasks:
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        print(adapters.add(task.name, config, id2label=dict(enumerate(task.labels))))
        untrained = accuracy(outputs(model, tokenizer, task), task)
        train(model, tokenizer, task, adapters)
        before_saving[task.name] = outputs(model, tokenizer, task)
        size = sum(file.stat().st_size for file in adapters.save(task.name, folder / task.name).iterdir())
        print(
            f"  {len(task.labels)} classes; the largest has {task.majority:.1%} of the {len(task.test)} held-out rows"
        )
        print(
            f"  accuracy {untrained:.1%} before, {accuracy(before_saving[task.name], task):.1%} after; {size:,} bytes saved\n"
        )

    fresh = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()
    loaded = ak.attach(fresh)
    for task in tasks:
        loaded.load(folder / task.name, name=task.name, activate=False)
    for task in tasks:
        loaded.activate(task.name, trainable=False)
        difference = (outputs(fresh, tokenizer, task) - before_saving[task.name]).abs().max().item()
        print(f"{task.name!r} on a fresh base: largest difference of its outputs from before saving {difference:.1g}")
        print(f"  labels now {list(fresh.config.id2label.values())}")
    print(f"\n{loaded.status()}")


if __name__ == "__main__":
    main()
