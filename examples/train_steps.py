"""Six training steps of a tiny LGNet on the bundled pictures (extra `train`); then fill a picture with the result.

configs/demo.yaml continues from the bundled weights; docs/training.md explains the settings.
"""

import tempfile
from pathlib import Path

from lgnet_fast import Inpainter
from lgnet_fast.samples import sample_paths
from lgnet_fast.training import Trainer
from lgnet_fast.training.config import config_of

samples = sample_paths()
with tempfile.TemporaryDirectory() as folder:
    pictures = Path(folder, "pictures")
    pictures.mkdir()
    for photo, _ in samples.values():
        (pictures / photo.name).write_bytes(photo.read_bytes())
    narrow = {"coarse_channels": 4, "local_channels": 4, "global_channels": 4}
    config = config_of(
        {
            "model": {"name": "lgnet_demo", "overrides": narrow},
            "discriminator": {"channels": 4},
            "data": {"pictures": [str(pictures)], "workers": 0},
            "loss": {"features": None, "edge": 1.0},  # no VGG-16 file needed
            "optim": {"batch_size": 2, "steps": 6},
            "run": {"directory": f"{folder}/run", "device": "cpu", "log_every": 1, "tensorboard": False},
        }
    )
    Trainer(config).fit()
    pipe = Inpainter.from_pretrained(f"{folder}/run/model", device="cpu")
    print("a picture of", pipe(*samples["coffee"]).size, "filled by the model that was trained just now")
    del pipe  # it maps the model's file, which Windows cannot remove meanwhile
