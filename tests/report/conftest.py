"""One thread, as for the other tiny tensors."""

import torch

torch.set_num_threads(1)
