"""`python -m tests.tools.peft_suite [test_vera ...]`: PEFT's own tests on views of adapted models.

PEFT's tests come from the source archive of the installed version. Each file runs twice: with PEFT itself, which is
the control, and with `as_peft` views. A test counts if it passes in the control and makes adapters of installed methods
alone, without an option that these lack. A failure on views needs a reason in `reasons`; one without is an error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.tools.peft_suite import page
from tests.tools.peft_suite.outcomes import read

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".cache" / "peft-suite"
# The files with tests that make adapters of LoRA, LoHa or VeRA, and need neither a GPU nor real weights.
FILES = (
    *("test_auto", "test_config", "test_custom_models", "test_decoder_models", "test_encoder_decoder_models"),
    *("test_feature_extraction_models", "test_helpers", "test_hub_features", "test_initialization"),
    *("test_integrations", "test_lora_intruders", "test_lora_variants", "test_lorafa", "test_loraplus"),
    *("test_low_level_api", "test_mapping", "test_mixed", "test_other", "test_riemannian_lora", "test_seq_classifier"),
    *("test_stablediffusion", "test_target_parameters"),
    *("test_token_classification_qa", "test_trainable_tokens", "test_tuners_utils", "test_vera", "test_vision_models"),
)


def archive() -> Path:
    """PEFT's source archive; downloaded once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    name = f"peft-{version('peft')}.tar.gz"
    if not (CACHE / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "--no-build-isolation", "--dest", str(CACHE), f"peft=={version('peft')}"], check=True)
    return CACHE / name


def prepared(source: Path) -> Path:
    """The folder with the package `peft_tests`, as PEFT's tests are called beside these here. Makes the models, too."""
    make = "import sys, pathlib; from tests.tools.peft_suite import hub; hub.make(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", make, str(CACHE / "hub")], cwd=ROOT, env=os.environ | _own(), check=True)
    folder = CACHE / "tests"
    package = folder / "peft_tests"
    if not package.exists():
        package.mkdir(parents=True)
        with tarfile.open(source) as files:
            for member in files:
                _, _, path = member.name.partition("/tests/")
                if path.endswith(".py") and "/" not in path:
                    held = files.extractfile(member)
                    assert held is not None
                    (package / path).write_bytes(held.read())
        (package / "__init__.py").touch()
        (folder / "pytest.ini").write_text("[pytest]\n")  # this project turns warnings into errors
    return folder


def run(tests: Path, through: str, name: str, *options: str | Path) -> None:
    """Run one of PEFT's files; its outcomes go to a file of their own."""
    out = outcomes_file(through, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    plugin = ["-p", "tests.tools.peft_suite.plugin", "--through", through, "--outcomes", str(out)]
    quiet = ["-q", "--no-header", "--tb=no", "-rN", "--disable-warnings", "-p", "no:cacheprovider", "-c", "pytest.ini"]
    command = [sys.executable, "-m", "pytest", *plugin, *quiet, "--timeout=300", f"peft_tests/{name}.py", *options]
    subprocess.run(command, cwd=tests, env=os.environ | _own(), check=False)


def _own() -> dict[str, str]:
    """The environment of a run: this project's packages, and the models in the cache in place of a hub."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(CACHE / "hub"), "HF_HOME": str(CACHE / "home")}
    return {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", **hub}


def outcomes_file(through: str, name: str) -> Path:
    """Where the outcomes of a file are."""
    return CACHE / "outcomes" / through / f"{name}.jsonl"


def main() -> None:
    """Run what has no outcome yet, and say what fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="names such as test_vera; without any: all")
    parser.add_argument("--fetch", action="store_true", help="download PEFT's tests, and do nothing else")
    parser.add_argument("--again", nargs="*", choices=("peft", "view"), default=(), help="run these again")
    parser.add_argument("--every", default="1", help="run each Nth test on views: a sample")
    parser.add_argument("--page", action="store_true", help="write docs/peft-tests.md")
    arguments = parser.parse_args()
    names = arguments.files or list(FILES)
    source = archive()
    if arguments.fetch:
        return
    tests = prepared(source)
    for name in names:
        for through in ("peft", "view"):
            if through in arguments.again or not outcomes_file(through, name).exists():
                print(f"{name} through {through}", flush=True)
                sample = ("--control", outcomes_file("peft", name), "--every", arguments.every)
                run(tests, through, name, *(() if through == "peft" else sample))
    control, views = (read(outcomes_file(through, name) for name in names) for through in ("peft", "view"))
    result = page.Result.of(control, views)
    print(result.text())
    if arguments.page:
        page.write(result)
    sys.exit(bool(result.unexplained))


if __name__ == "__main__":
    main()
