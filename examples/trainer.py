"""Fine-tune a language model on tweets with transformers' `Trainer`; stop, resume in a new model, and compare."""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from data import smollm2_folder, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

import adapterkit as ak
from adapterkit.integrations.transformers import AdapterTrainerMixin
from adapterkit_lora import LoraConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=None, help="a model folder or hub id (default: SmolLM2 of `make test-tools`)")
parser.add_argument("--steps", type=int, default=20, help="steps of the optimizer, an even number")
options = parser.parse_args()
source, length = options.model or smollm2_folder(), 64
logging.set_verbosity_error()
logging.disable_progress_bar()


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """The two lines: this class, and `ak.attach(model).add(...)`."""


tokenizer = AutoTokenizer.from_pretrained(source)
tokens = torch.tensor(tokenizer("\n".join(texts("tweet")))["input_ids"])
blocks = tokens[: len(tokens) // length * length].view(-1, length)
rows = [{"input_ids": block, "labels": block} for block in blocks]
held_out, rows = rows[:24], rows[24 : 24 + 4 * options.steps]


def trainer(folder: Path) -> Any:
    """A trainer of a new model with a new adapter, as each process makes it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    report = ak.attach(model).add("tweets", LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05))
    if not any(folder.iterdir()):
        print(report)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=options.steps // 2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
    )
    run = AdapterTrainer(model, arguments, train_dataset=rows, eval_dataset=held_out)
    run.remove_callback(PrinterCallback)
    return run


def perplexity(run: Any) -> float:
    """On the held-out tweets."""
    return math.exp(run.evaluate()["eval_loss"])


folder = Path(tempfile.mkdtemp())
whole = trainer(folder)
before = perplexity(whole)
whole.train()
print(f"perplexity of held-out tweets {before:.1f} before, {perplexity(whole):.1f} after {options.steps} steps")

half = folder / f"checkpoint-{options.steps // 2}"
for file in sorted(half.glob("*.safetensors")):
    print(f"  {file.relative_to(folder)}: {file.stat().st_size:,} bytes")

# As after a kill: a new model, a new adapter, and the checkpoint.
again = trainer(folder)
again.train(resume_from_checkpoint=str(half))
pairs = zip(again.adapters.parameters("tweets"), whole.adapters.parameters("tweets"), strict=True)
difference = max((one - other).abs().max().item() for one, other in pairs)
print(f"resumed from {half.name}: the adapter differs from that of the whole run by at most {difference:.1g}")
