from adapterkit.testing import parametrize_with_checks
from adapterkit_outer import OuterConfig


@parametrize_with_checks([OuterConfig(), OuterConfig(scale=0.5)])
def test_contract(check, config):
    check(config)
