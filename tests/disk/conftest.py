"""What the tests of this folder share."""

from __future__ import annotations

import torch

# These tensors are tiny: on a busy machine a second thread makes each operation wait for the other core.
torch.set_num_threads(1)
