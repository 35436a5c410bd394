"""One thread per test process: the models are tiny, and pytest-xdist already uses every core."""

import torch

torch.set_num_threads(1)
