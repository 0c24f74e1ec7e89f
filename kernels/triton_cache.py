"""A folder for the kernels that Triton compiles, where its own cannot be written."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

import triton

logger = logging.getLogger("lgnet_fast")


def ensure_folder() -> None:
    """Set ``$TRITON_CACHE_DIR`` to a temporary folder of this process where Triton's folder cannot be written.

    Triton compiles nothing then: its own is in the home folder, which users of containers often lack.
    """
    if "TRITON_CACHE_DIR" in os.environ:
        return  # the user's choice; Triton's error names it
    if not hasattr(triton, "knobs"):
        return  # a version that compiles none of the kernels
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
        reason = "it cannot be written"
    except OSError as error:
        reason = str(error)
    own = tempfile.mkdtemp(prefix="lgnet_fast_triton_")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = own
    logger.info("compiled kernels are kept for this process only, because of Triton's folder %s (%s)", folder, reason)
