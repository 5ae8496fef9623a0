"""A part of PEFT's own tests runs on views, as `make peft-tests` runs all of them."""

from __future__ import annotations

import re

import pytest
from tests.tools.peft_suite import __main__ as suite
from tests.tools.peft_suite.outcomes import Outcome, read
from tests.tools.peft_suite.page import Result
from tests.tools.peft_suite.reasons import REASONS

# Fast files, and of a long one the tests of one method on one model.
PART = {"test_vera": (), "test_seq_classifier": ("-k", "VeraConfig and Roberta")}


@pytest.mark.skipif(not suite.CACHE.exists(), reason="python -m tests.tools.peft_suite --fetch was not run")
@pytest.mark.parametrize("name", PART)
def test_pefts_own_tests_pass_on_views_or_have_a_reason(name: str) -> None:
    suite.run(suite.prepared(suite.archive()), "view", name, *PART[name])
    file = suite.outcomes_file("view", name)
    outcomes = read([file]).values()
    file.unlink()  # a part is not what `make peft-tests` reads
    failed = [o for o in outcomes if o.outcome == "failed"]
    unexplained = [o for o in failed if not any(re.search(p, f"{o.test} {o.error}") for p in REASONS.values())]
    assert not unexplained
    assert len(outcomes) - len(failed) > 9


def test_a_failure_without_a_reason_is_told() -> None:
    control = {"a.py::b": Outcome("a.py::b", "passed", {"LORA": None}, "")}
    result = Result.of(control, {"a.py::b": Outcome("a.py::b", "failed", {}, "Surprise: nothing like it @ x.py:1")})
    assert [o.test for o in result.unexplained] == ["a.py::b"]
