"""Train a language model with TRL's DPO on pairs of film reviews; the reference is the same model."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from data import preferences, smollm2_folder
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

import adapterkit as ak

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=None, help="a model folder or hub id (default: SmolLM2 of `make test-tools`)")
parser.add_argument("--method", default="lora", help="any installed method: lora, loha, vera, ...")
parser.add_argument("--steps", type=int, default=16, help="steps of the optimizer, with four pairs each")
options = parser.parse_args()
source = options.model or smollm2_folder()
logging.set_verbosity_error()
logging.disable_progress_bar()

tokenizer = AutoTokenizer.from_pretrained(source)
model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
torch.manual_seed(0)
adapters = ak.attach(model)
print(adapters.add("default", ak.config(options.method, target_modules=["q_proj", "v_proj"])))

pairs = Dataset.from_dict(preferences(rows=4 * options.steps + 24)).train_test_split(24, seed=0)
arguments = DPOConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=options.steps,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=16,
    max_length=48,
    gradient_checkpointing=False,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    save_steps=options.steps,
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
)
# The view is a `peft.PeftModel`, so TRL makes no second copy of the model for its reference.
trainer: Any = DPOTrainer(
    ak.as_peft(model),
    args=arguments,
    train_dataset=pairs["train"],
    eval_dataset=pairs["test"],
    processing_class=tokenizer,
)
trainer.remove_callback(PrinterCallback)
assert trainer.ref_model is None


def held_out() -> float:
    """The share of held-out pairs of which the model prefers the favourable review, more than its reference does."""
    return float(trainer.evaluate()["eval_rewards/accuracies"])


def review() -> str:
    """What the model writes after the prompt."""
    given = tokenizer(pairs["test"][0]["prompt"], return_tensors="pt").to(model.device)
    written = model.generate(**given, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(str(tokenizer.decode(written[0], skip_special_tokens=True)).split())


trainer.train()
print(f"prefers the favourable one of two held-out reviews: {held_out():.0%} of {len(pairs['test'])}")
with adapters.disabled():
    print(f"before: {review()}")
print(f"after:  {review()}")

saved = Path(arguments.output_dir) / f"checkpoint-{options.steps}"
size = (saved / "adapter_model.safetensors").stat().st_size
again = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
ak.attach(again).load(saved, name="reviews")
ids = tokenizer("A film", return_tensors="pt")["input_ids"]
with torch.no_grad():
    difference = (again(ids).logits - model.eval().to("cpu")(ids).logits).abs().max().item()
print(f"the saved adapter has {size:,} bytes; its outputs differ by at most {difference:.1g}")
