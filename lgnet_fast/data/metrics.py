"""Scores of one filled picture against the true one."""

from __future__ import annotations

import math
import os
import socket
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MissingExtraError, WeightsError
from ..reference.features import LPIPS
from ..reference.pretrained import TORCHVISION_URL, torchvision_file
from ..reference.released import load_state_dict_file

METRICS = ("l1", "psnr", "ssim", "lpips", "fid")

Number = TypeVar("Number", float, Tensor)

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey values that sharpness is measured on."""
LEAST_SQUARED_ERROR = 1e-3
"""Of levels 0 to 255, so that PSNR is at most 78 dB: the infinite PSNR of one picture would be the mean of all."""

LPIPS_VARIABLE = "LGNET_FAST_LPIPS"
"""Environment variable with the path of the LPIPS weights, where none is given."""

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"

Distance = Callable[[Tensor, Tensor], Tensor]


class Metrics:
    """The metrics that are available here.

    Args:
        wanted: names in :data:`METRICS`.
        lpips: AlexNet's or VGG-16's weights as :meth:`lgnet_fast.reference.features.LPIPS.from_file` takes them
            (torchvision's file among others), or any callable on two [1, 3, H, W] in [-1, 1] that gives one number;
            None: the file that the environment variable :data:`LPIPS_VARIABLE` names, or torchvision's AlexNet from
            torch's hub cache or its download.
        fid: the Inception file of torch-fidelity, or any module from uint8 [1, 3, H, W] to [1, D]; None:
            torch-fidelity's own download.
        device: where those two networks run.

    ``available``: the names, in order. ``missing``: name -> one line why not.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """

    def __init__(
        self,
        wanted: Collection[str] = METRICS,
        lpips: str | Path | Distance | None = None,
        fid: str | Path | nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        unknown = [name for name in wanted if name not in METRICS]
        if unknown or not wanted:
            raise ValueError(f"metrics: expected names of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}")
        try:
            from skimage.metrics import structural_similarity
        except ImportError as cause:
            raise MissingExtraError(
                f"metrics: scikit-image cannot be imported ({cause}); pip install 'lgnet-fast[eval]'"
            ) from cause
        self._ssim: Callable[..., Any] = structural_similarity
        self.device = torch.device(device)
        self.missing: dict[str, str] = {}
        self._lpips: Distance | None = None
        self._inception: nn.Module | None = None
        if "lpips" in wanted:
            self._lpips = self._or_missing("lpips", lambda: _lpips_network(lpips))
        if "fid" in wanted:
            self._inception = self._or_missing("fid", lambda: _inception(fid))
        self.available = tuple(name for name in METRICS if name in wanted and name not in self.missing)

    def _or_missing(self, name: str, load: Callable[[], Any]) -> Any:
        try:
            with _stalled_downloads_end():
                network = load()
        except ImportError as cause:
            self.missing[name] = f"its network cannot be imported ({_line(cause)}); pip install 'lgnet-fast[eval]'"
            return None
        except WeightsError as cause:
            self.missing[name] = one_line(cause)
            return None
        except Exception as cause:  # unpickling and downloads raise many types of errors
            self.missing[name] = f"{type(cause).__name__}: {_line(cause)}"
            return None
        return network.to(self.device).eval() if isinstance(network, nn.Module) else network

    def scores(self, filled: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Each available metric but FID of a filled picture, uint8 [H, W, 3], sides of at least 11.

        l1: 100 * mean|a - b| / 255, in percent. PSNR in dB with data range 255; infinite for equal pictures. SSIM
        (Wang et al. 2004): Gaussian windows 11x11 of sigma 1.5 inside the picture, data range 255, mean of RGB.
        LPIPS: v0.1 on the network of the weights given.
        """
        a, b = _tensor(filled), _tensor(truth)
        values: dict[str, float] = {}
        if "l1" in self.available:
            values["l1"] = float((a - b).abs().mean()) * 100 / 255
        if "psnr" in self.available:
            error = float((a - b).square().mean())
            values["psnr"] = 10 * math.log10(255**2 / error) if error else math.inf
        if "ssim" in self.available:
            # In float64: in float32 the variances of bright flat parts are mostly rounding errors.
            ssim = self._ssim(
                filled,
                truth,
                channel_axis=2,
                data_range=255,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            values["ssim"] = float(ssim)
        if self._lpips is not None:
            with torch.inference_mode():
                scaled = [(picture / 127.5 - 1).to(self.device, torch.float32) for picture in (a, b)]
                values["lpips"] = float(self._lpips(*scaled))
        return values

    @property
    def legend(self) -> str:
        """The network of LPIPS, see :func:`lpips_legend`."""
        return lpips_legend(self._lpips)

    def features(self, picture: np.ndarray) -> np.ndarray:
        """FID's features of a uint8 [H, W, 3], float32 [D]. Raises ValueError: FID is not available."""
        if self._inception is None:
            raise ValueError("metrics: FID is not available")
        with torch.inference_mode():
            given = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))[None]).to(self.device)
            features: np.ndarray = self._inception(given).reshape(-1).float().cpu().numpy()
        return features


def relative_energy(filled: Number, truth: Number) -> Number:
    """Sharpness: the gradient energy of a fill relative to that of the true picture; 1 where both are flat."""
    return (filled + 1e-9) / (truth + 1e-9)


def lpips_legend(lpips: Distance | None) -> str:
    """On which network LPIPS is measured, in words; empty where it is not, or by a function of the caller's."""
    names = {"alexnet": "AlexNet", "vgg16": "VGG-16"}
    return f"LPIPS: {names[lpips.features.network]}." if isinstance(lpips, LPIPS) else ""


def one_line(cause: WeightsError) -> str:
    """The text of an error in one line of at most 480 characters, because lists of names can be long."""
    return textwrap.shorten(str(cause), 480, placeholder=" ...")


def _line(cause: Exception) -> str:
    return str(cause).strip().split("\n")[0].split(". ")[0]


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))[None]).double()


def _lpips_network(source: str | Path | Distance | None) -> Distance:
    if source is None:
        source = os.environ.get(LPIPS_VARIABLE) or _alexnet_file()
    return LPIPS.from_file(source) if isinstance(source, (str, Path)) else source


def _alexnet_file() -> Path:
    advice = f"; give `lpips` (--lpips) the path of {TORCHVISION_URL}{ALEXNET_FILE}"
    return torchvision_file(ALEXNET_FILE, "AlexNet's weights are", advice)


def _inception(source: str | Path | nn.Module | None) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if source is not None and not Path(source).is_file():
        raise WeightsError(
            f"fid: expected torch-fidelity's Inception weights, got {str(source)!r}, which does not exist"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    if source is not None:
        # torch-fidelity unpickles the file without checks, so it is first loaded as tensors only.
        load_state_dict_file(Path(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return NoTrainInceptionV3("inception-v3-compat", ["2048"], None if source is None else str(source))
    except OSError as cause:
        raise WeightsError(
            f"the Inception weights could not be downloaded ({cause}); give `fid` the path of torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth"
        ) from cause
    except RuntimeError as cause:
        raise WeightsError(
            f"fid: expected torch-fidelity's Inception weights, got {str(source)!r}, which does not fit them"
        ) from cause


@contextmanager
def _stalled_downloads_end() -> Iterator[None]:
    """Set a timeout for urllib, which has none by default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
