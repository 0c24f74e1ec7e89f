"""The engine on tensors: one call for a batch of images, computed only where the holes need it."""

import torch

from lgnet_fast import LGNet, optimize
from lgnet_fast.engine.regions import Rect
from lgnet_fast.weights import bundled_path

model = LGNet.from_pretrained(bundled_path())
engine = optimize(model, size=(256, 256), batch_size=2)  # plans and packs the weights once

image = torch.rand(2, 3, 256, 256) * 2 - 1  # [B, 3, H, W] in [-1, 1]
mask = torch.zeros(2, 1, 256, 256)  # [B, 1, H, W], 1 = hole
mask[0, :, 96:160, 96:160] = 1
mask[1, :, 20:40, 10:240] = 1

filled = engine(image.to(engine.device), mask.to(engine.device))
assert isinstance(filled, torch.Tensor)  # with return_stages=True it is every stage's picture
filled = filled.cpu()
known = (mask == 0).expand_as(image)
print("known pixels unchanged:", bool(torch.equal(filled[known], image[known])))

with torch.no_grad():
    reference = model.set_backend("eager")(image, mask)
print(f"largest difference from plain PyTorch: {float((filled - reference).abs().max()):.1e}")

dense = engine.plan.total_macs()
print(f"dense plan: {dense / 1e9:.1f} GMAC for the batch of 2")
for hole in (Rect(96, 160, 96, 160), Rect(20, 40, 10, 240)):  # top, bottom, left, right; ends excluded
    print(f"{hole}: {engine.plan.restricted([hole]).total_macs() / dense:.0%} of the multiplications")
