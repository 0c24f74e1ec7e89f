"""Fill the hole of one photo: python examples/fill_photo.py [PHOTO MASK RESULT]

Without arguments it fills the bundled picture of a cat under scratches. White pixels of the mask are the hole.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from lgnet_fast import Inpainter
from lgnet_fast.samples import sample_paths

if len(sys.argv) == 4:
    photo, mask, result = map(Path, sys.argv[1:])
else:
    (photo, mask), result = sample_paths()["chelsea"], Path("examples_output/chelsea.png")

pipe = Inpainter.from_pretrained(None)  # the bundled model; a model folder or hub id works too
filled = pipe(photo, mask, dilate=2)  # the hole grows by two pixels, so that no rim of the scratches stays
result.parent.mkdir(parents=True, exist_ok=True)
filled.save(result)

before, after = np.asarray(Image.open(photo).convert("RGB")), np.asarray(filled.convert("RGB"))
changed = (before != after).any(axis=2).mean()
print(f"{photo.name} -> {result}: {changed:.1%} of the pixels changed, the others are identical")
