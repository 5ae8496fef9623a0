"""The package's own tests: the kit, and equality with PEFT's class."""

import peft
import pytest
from adapterkit_dora import DoraConfig

from adapterkit.testing import check_peft, parametrize_with_checks

FIELDS = [{"r": 4, "lora_alpha": 3}, {"r": 4, "use_rslora": True, "rank_pattern": {"up": 2}}]


@parametrize_with_checks([DoraConfig(), DoraConfig(r=2, use_rslora=True, lora_dropout=0.1)])
def test_contract(check, config):
    check(config)


@pytest.mark.parametrize("fields", FIELDS)
def test_it_is_pefts(fields):
    check_peft(DoraConfig(**fields), peft.LoraConfig(use_dora=True, **fields))
