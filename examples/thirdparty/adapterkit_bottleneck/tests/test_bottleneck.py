"""The package's own tests: the kit, and the formula of the paper on a language model."""

import pytest
import torch
import transformers
from adapterkit_bottleneck import BottleneckConfig

import adapterkit as ak
from adapterkit.testing import parametrize_with_checks


@parametrize_with_checks([BottleneckConfig(size=3, function="relu")])
def test_contract(check, config):
    check(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_it_computes_the_papers_formula_after_each_mlp_block(tmp_path):
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    adapters = ak.attach(model)
    adapters.add("a", ak.config("bottleneck", size=4, target_modules=["mlp"]))
    for parameter in adapters.parameters("a"):
        torch.nn.init.normal_(parameter, std=0.3)
    found = model(ids).logits
    adapters.save("a", tmp_path / "a")

    plain = gpt2()
    for (path, layer), block in zip(adapters.layers("a").items(), plain.transformer.h, strict=True):
        assert path.endswith(".mlp")
        down, up = layer.bottleneck_down, layer.bottleneck_up

        def after(module, args, h, down=down, up=up):
            hidden = torch.nn.functional.gelu(h @ down.weight.T + down.bias)
            return h + hidden @ up.weight.T + up.bias

        block.mlp.register_forward_hook(after)
    torch.testing.assert_close(plain(ids).logits, found)

    again = gpt2()
    ak.attach(again).load(tmp_path / "a", "again")
    torch.testing.assert_close(again(ids).logits, found)


def test_a_block_without_a_linear_layer_asks_for_the_width():
    with pytest.raises(ak.ConfigError, match="set width"):
        ak.attach(gpt2()).add("a", BottleneckConfig(target_modules=["act"]))
