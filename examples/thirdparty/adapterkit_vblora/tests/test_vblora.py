"""The package's own tests: the kit, and equality with PEFT's class."""

import peft
from adapterkit_vblora import VBLoRAConfig

from adapterkit.testing import check_peft, parametrize_with_checks

FIELDS = {"num_vectors": 9, "vector_length": 8, "topk": 3}


@parametrize_with_checks([VBLoRAConfig(**FIELDS), VBLoRAConfig(r=2, vblora_dropout=0.1, **FIELDS)])
def test_contract(check, config):
    check(config)


def test_it_is_pefts():
    check_peft(VBLoRAConfig(**FIELDS), peft.VBLoRAConfig(target_modules=["up"], **FIELDS))
