"""Fill a folder of pictures by the command line, and read its report.

python examples/fill_folder.py [PICTURES MASKS RESULTS]
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from lgnet_fast.samples import sample_paths

if len(sys.argv) == 4:
    pictures, masks, results = map(Path, sys.argv[1:])
elif len(sys.argv) > 1:
    sys.exit(__doc__)
else:
    pictures, masks, results = (Path("examples_output", name) for name in ("pictures", "masks", "results"))
    for folder in (pictures, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for name, (photo, mask) in sample_paths().items():
        shutil.copy(photo, pictures / f"{name}.png")
        shutil.copy(mask, masks / f"{name}.png")

report = results / "report.json"
command = [sys.executable, "-m", "lgnet_fast", "run", "-i", pictures, "-m", masks, "-o", f"{results}/"]
done = subprocess.run([*map(str, command), "--skip-existing", "--report", str(report)], check=False)
if done.returncode == 2:  # wrong usage, said on standard error; there is no report
    sys.exit(2)

for entry in json.loads(report.read_text())["items"]:
    print(f"{entry['input']}: {entry['status']}, strategy {entry['strategy']} -> {entry['output']}")
sys.exit(done.returncode)
