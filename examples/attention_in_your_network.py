"""The fused attention block in a network of one's own: forward, backward, and which backends ran."""

import torch
from torch import Tensor, nn

import lgnet_fast  # registers torch.ops.lgnet.*


class AttendedStem(nn.Module):
    """A convolution, then cosine attention over all positions with its 1x1 combiner."""

    def __init__(self, channels: int = 96) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.combine = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.stem(image)
        attended: Tensor = torch.ops.lgnet.attention_block(features, self.combine.weight, self.combine.bias, "paper")
        return attended


torch.manual_seed(0)
network = AttendedStem()
optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
image, target = torch.rand(2, 3, 128, 128), torch.rand(2, 96, 32, 32)
for step in range(5):
    loss = (network(image) - target).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"step {step}: loss {loss.item():.4f}")

print("what ran:", lgnet_fast.ops.calls())
