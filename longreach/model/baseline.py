"""V3.2's attention (placeholder import target until the baseline lands)."""
from torch import nn
class LatentAttention(nn.Module):
    pass
