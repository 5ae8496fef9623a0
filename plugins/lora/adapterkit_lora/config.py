"""The config of LoRA: PEFT's fields that change plain LoRA."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from adapterkit import AdapterConfig, ConfigError, Dropout, Rank, UnsupportedError

_INITS = ("gaussian", "orthogonal", "pissa", "olora")
# PEFT has these too; they need data or another library. The first two leave the base as it is, so an adapter that was
# trained from them is plain LoRA. The others change the base's weights.
_PLAIN_INITS, _CHANGING_INITS = ("eva", "mica"), ("loftq", "corda", "lora_ga")
# Once trained, these are plain LoRA.
_SPECIAL_TRAINING = ("velora_config", "monteclora_config")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """Low-rank adaptation: `dW = scaling * B @ A`, A `(r, in)`, B `(out, r)` (Hu et al. 2021, arXiv 2106.09685).

    Args:
        r: the rank.
        lora_alpha: `scaling = lora_alpha / r`.
        use_rslora: `scaling = lora_alpha / sqrt(r)` instead (Kalajdzievski 2023, arXiv 2312.03732).
        lora_dropout: probability of dropping each input entry of A, in training.
        lora_bias: B has a bias of its own, `(out,)`, scaled as B is.
        rank_pattern, alpha_pattern: other values for some layers: a regular expression for the end of a
            path at a dot, and the value; the first that matches counts.
        init_lora_weights: `True`: A Kaiming-uniform, B zero. `False`: both as `nn.Linear` (embeddings: normal).
            `"gaussian"`: A normal with deviation 1/r, B zero. `"orthogonal"`: A and B span orthogonal spaces; even r.
            `"pissa"`, `"pissa_niter_N"`: the weight's leading singular vectors, exactly or by N subspace
            iterations (Meng et al. 2024, arXiv 2404.02948). `"olora"`: its QR factors (Büyükakyüz 2024, arXiv
            2406.01775). These two train the weight's own leading part; the base itself is not changed.

    The other fields are `AdapterConfig`'s.
    """

    method = "lora"
    not_in_files = ()
    patterns = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    r: Rank = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    lora_dropout: Dropout = 0.0
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def start(self) -> bool | str:
        """`init_lora_weights` in lower case, because PEFT takes `"OLoRA"` and `"Gaussian"` too."""
        return self.init_lora_weights.lower() if isinstance(self.init_lora_weights, str) else self.init_lora_weights

    @property
    def trains_residual(self) -> bool:
        """Whether the initial factors are a part of the weight itself (PiSSA, OLoRA)."""
        return isinstance(self.start, str) and self.start.startswith(("pissa", "olora"))

    @property
    def pissa_iterations(self) -> int | None:
        """N of `"pissa_niter_N"`, else `None`."""
        match = re.fullmatch(r"pissa_niter_(\d+)", str(self.start))
        return int(match[1]) if match else None

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, where: object = "adapter_config.json", trained: bool = True
    ) -> Self:
        """The config of a file. Where only the start or the training was special, it is plain LoRA."""
        special = [] if trained else [name for name in _SPECIAL_TRAINING if values.get(name)]
        if special:
            raise UnsupportedError(
                f"{where}: {special[0]} is a way to train of PEFT's that adapterkit does not implement. Leave it out."
            )
        if trained and str(values.get("init_lora_weights")).lower() in _PLAIN_INITS:
            values = {**values, "init_lora_weights": True}
        return super().from_dict(values, where=where, trained=trained)

    def check(self) -> None:
        init = self.start
        if init in _CHANGING_INITS:
            raise UnsupportedError(
                f"init_lora_weights = {init!r} is an option of PEFT that adapterkit does not implement. It replaces "
                "weights of the base, and the adapter goes with those alone. Save it in PEFT's converted form "
                "(path_initial_model_for_weight_conversion=), or save the base that PEFT made too."
            )
        if init in _PLAIN_INITS:
            raise UnsupportedError(
                f"init_lora_weights = {init!r} is an option of PEFT that adapterkit does not implement. Files of "
                "adapters that were trained from it load."
            )
        if not isinstance(init, bool) and init not in _INITS and self.pissa_iterations is None:
            raise ConfigError(
                f"init_lora_weights = {init!r} must be True, False, {', '.join(map(repr, _INITS))} or 'pissa_niter_N'."
            )
        if init == "orthogonal" and self.r % 2:
            raise ConfigError(f"r = {self.r}: init_lora_weights='orthogonal' needs an even rank.")
        if self.lora_bias and not isinstance(init, bool):
            raise ConfigError(f"lora_bias needs init_lora_weights True or False, not {init!r}.")
