"""LoRA as a plugin of adapterkit."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import residual
from adapterkit_lora.config import LoraConfig
from adapterkit_lora.foreign import LoraFormat
from adapterkit_lora.layer import LoraLayer

# PEFT's tensors for a backward of its own and for samples in training. The trained adapter is plain LoRA.
_OF_TRAINING = (".lora_velora_embed", ".lora_monteclora_sampler.")


class LoraPlugin(ak.Plugin):
    """LoRA: `dW = scaling B A`; see the config."""

    config, layer, prefix = LoraConfig, LoraLayer, "lora_"

    def key_rule(self, config: LoraConfig) -> ak.KeyRule:
        """A file of PEFT's has only the trained factors of PiSSA and OLoRA; the first ones come from the base again."""
        first = frozenset({"lora_init_A", "lora_init_B"}) if config.trains_residual else frozenset[str]()
        return ak.KeyRule(prefix="lora_", exempt=first)

    def inject(self, target: ak.Target, config: LoraConfig, shared: None) -> ak.AdapterLayer:
        """PiSSA and OLoRA have the initial factors beside the trained ones."""
        return (residual.ResidualLayer if config.trains_residual else LoraLayer)(target, config)

    def to_file(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, Mapping[str, Tensor]]:
        """PiSSA and OLoRA as plain LoRA of twice the rank, which loads onto the unchanged base."""
        return residual.to_file(config, tensors) if config.trains_residual else (config, tensors)

    def from_file(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, Mapping[str, Tensor]]:
        """The reverse, for an adapter that is PiSSA or OLoRA here, without what only training uses."""
        tensors = {key: tensor for key, tensor in tensors.items() if not any(name in key for name in _OF_TRAINING)}
        return config, residual.from_file(config, tensors) if config.trains_residual else tensors

    def from_factors(
        self, factors: Mapping[str, ak.Factors], kinds: Mapping[str, ak.LayerKind]
    ) -> tuple[LoraConfig, Mapping[str, Tensor]]:
        """A is `down` and B is `up`, with scaling 1 everywhere: `lora_alpha = r`."""
        ranks = {path: f.rank for path, f in factors.items()}
        bias = any(f.bias is not None for f in factors.values())
        tensors = {}
        for path, f in factors.items():
            kind, lookup = kinds[path], kinds[path].lookup
            if lookup and f.bias is not None:
                raise ak.UnsupportedError(f"LoRA cannot express the change of a bias at the embedding {path!r}.")
            down, up = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A.weight", "lora_B.weight")
            tensors[f"{path}.{down}"] = f.down.reshape(kind.down_shape(f.rank))
            tensors[f"{path}.{up}"] = f.up.reshape(kind.up_shape(f.rank))
            if bias and not lookup:
                tensors[f"{path}.lora_B.bias"] = f.up.new_zeros(len(f.up)) if f.bias is None else f.bias
        return LoraConfig.with_values({"r": ranks, "lora_alpha": ranks}, lora_bias=bias), tensors

    def sizes(self, tensors: Mapping[str, Tensor]) -> nn.Module | None:
        """An embedding, or a linear layer, or a convolution where A has a kernel."""
        names = ("lora_embedding_A", "lora_embedding_B", "lora_A.weight", "lora_B.weight", "lora_mid")
        held = [tensors.get(name) for name in names]
        if any(t is not None and (t.dim() < 2 or 0 in t.shape) for t in held):
            return None
        table, rows, down, up, mid = held
        if table is not None or rows is not None:
            count, width = 1 if table is None else table.shape[1], 1 if rows is None else rows.shape[0]
            return nn.Embedding(count, width, device="meta")
        inputs, outputs = 1 if down is None else down.shape[1], 1 if up is None else up.shape[0]
        kernel = mid.shape[2:] if mid is not None else () if down is None else down.shape[2:]
        groups = 1 if down is None or up is None or mid is not None else down.shape[0] // up.shape[1]
        fits = groups > 0 and inputs % groups == 0 == outputs % groups  # PEFT's factors may cross groups
        return ak.empty_layer(outputs, inputs, *kernel, groups=groups if fits else 1)

    def formats(self) -> Sequence[ak.Format]:
        """kohya-ss's, LyCORIS's and diffusers'."""
        return [LoraFormat()]


plugin = LoraPlugin()
