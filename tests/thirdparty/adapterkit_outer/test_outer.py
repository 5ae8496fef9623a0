from adapterkit_outer import OuterConfig

from adapterkit.testing import parametrize_with_checks


@parametrize_with_checks([OuterConfig(), OuterConfig(scale=0.5)])
def test_contract(check, config):
    check(config)
