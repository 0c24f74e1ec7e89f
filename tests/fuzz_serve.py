"""`make fuzz-serve`: two minutes of requests generated from /openapi.json, for a server with the bundled model.

Fails on any answer of 500 or more except 503, and if the next valid request does not work.
SECONDS=120 and further arguments go to `schemathesis run`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import numpy as np

from tests.serve_support import base64_of, file_of, hole, live_server, photo, pixels_of


def main() -> int:
    """Exit code: schemathesis', or 1."""
    with live_server() as address:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"),
            *("--max-time", os.environ.get("SECONDS", "120"), "--checks", "not_a_server_error"),
            *("--continue-on-failure", "--suppress-health-check", "all", "--no-color", *sys.argv[1:]),
        ]
        code = subprocess.run(command, check=False).returncode
        body = {"image": base64_of(file_of(photo())), "mask": base64_of(file_of(hole()))}
        answer = httpx.post(f"{address}/api/v1/inpaint", json=body, timeout=120)
        unharmed = answer.status_code == 200 and np.array_equal(pixels_of(answer.content)[~hole()], photo()[~hole()])
        faults = [line for line in httpx.get(f"{address}/metrics").text.splitlines() if 'code="500"' in line]
    print("\n".join(faults) or "no answer was a 500")
    print("afterwards a good request works" if unharmed else "afterwards a good request fails")
    return code or int(bool(faults) or not unharmed)


if __name__ == "__main__":
    sys.exit(main())
