"""Fill the hole of one photo: python examples/fill_photo.py [PHOTO MASK RESULT]

Without arguments it fills the bundled picture of a cat under scratches. White pixels of the mask are the hole.
"""

import sys
from pathlib import Path

from lgnet_fast import Inpainter
from lgnet_fast.samples import sample_paths

if len(sys.argv) == 4:
    photo, mask, result = map(Path, sys.argv[1:])
elif len(sys.argv) > 1:
    sys.exit(__doc__)
else:
    (photo, mask), result = sample_paths()["chelsea"], Path("examples_output/chelsea.png")

pipe = Inpainter.from_pretrained(None)  # the bundled model; a model folder or hub id works too
done = pipe.inpaint(photo, mask, dilate=2)  # the hole grows by two pixels, so that no rim of the scratches stays
result.parent.mkdir(parents=True, exist_ok=True)
done.picture.save(result)
print(f"{photo.name} -> {result}: the mask covers {done.hole_ratio:.1%}; outside it and its rim nothing changed")
