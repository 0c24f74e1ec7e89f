"""The C++ sources of a checkout, as a number that the extension was built with; setup.py runs this file too."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(root: Path) -> int | None:
    """60 bits of a hash of the sources in ``root/csrc``; None without them, as beside an installed package."""
    folder = root / "csrc"
    if not (folder / "module.cpp").is_file():
        return None
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h", ".inc"))
    found = hashlib.sha256()
    for path in files:
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return int(found.hexdigest()[:15], 16)
