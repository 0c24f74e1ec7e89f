"""LGNet, its variants and ablations, and X_LG (paper, Sections III and IV; docs/model.md)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .. import forks
from . import released
from .attention import check_variant
from .cascade import Cascade, Stages, init_weights
from .file_sets import complete_set, staged
from .networks import LocalNet, UNet
from .pretrained import (
    CONFIG_FILE,
    MODEL_CARD,
    WEIGHTS_FILE,
    check_config,
    check_hub_config,
    check_map_location,
    config_errors,
    find_weights,
    fitting,
    of_revision,
    read_safetensors,
    refuse_impostor,
    weights_errors,
    write_safetensors,
)

CASCADES = ("C", "C+L", "C+G_att", "C+G+G_att", "C+L+G", "C+L+G_att")
"""The paper's Table VI: C = NetC, L = NetL, G = NetG without attention, G_att = NetG."""

STAGE_MODULES = {"C": "net_c", "L": "net_l", "G": "net_g_plain", "G_att": "net_g"}
"""Stage name in the paper -> name of the sub-module."""

_stored_dtype: ContextVar[torch.dtype | None] = ContextVar("_stored_dtype", default=None)
"""The dtype in which the save under way stores weights; huggingface_hub's methods do not pass it on."""


def check_widths(**widths: int) -> None:
    """Raise ValueError for a width that is no positive integer."""
    for name, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"{name}: expected a positive integer, got {width!r}")


class LGNet(
    Cascade,
    PyTorchModelHubMixin,
    library_name="lgnet_fast",
    tags=["image-inpainting"],
    model_card_template=MODEL_CARD,
):
    """The three-stage inpainting network of Quan et al., "Image Inpainting with Local and Global Refinement".

    NetC, NetL and NetG (paper, Section III; docs/model.md) run one after another. Each reads cat(picture, mask),
    [B, 4, H, W], H and W multiples of 256, and gives a picture [B, 3, H, W] in [-1, 1], whose hole is merged into the
    image for the next one.

    Args:
        stages: one of :data:`CASCADES`; "C+L+G_att" is LGNet, the others are the ablations of Table VI.
        variant: attention formulation, "released" (the authors' checkpoints) or "paper" (eq. (10)).
        coarse_channels, local_channels, global_channels: n of NetC, NetL and NetG.
        share_coarse: LGNet_share: NetC is NetG run without its attention blocks, one set of weights.
        max_channels: no level of NetC and NetG is wider; None: the paper's widths, up to 8n.
        backend: see :meth:`set_backend`.

    A new model has the paper's random initialisation and is in training mode.

    Raises:
        ValueError: an argument of another type or value; the text names it. Whether the backend can run is known
            from the input only: see :meth:`forward`.
    """

    @torch.inference_mode(False)  # weights must also work outside inference mode
    def __init__(
        self,
        stages: str = "C+L+G_att",
        variant: str = "released",
        coarse_channels: int = 64,
        local_channels: int = 64,
        global_channels: int = 64,
        share_coarse: bool = False,
        backend: str = "auto",
        max_channels: int | None = None,
    ) -> None:
        super().__init__()
        if stages not in CASCADES:
            raise ValueError(f"stages: expected one of {CASCADES}, got {stages!r}")
        check_variant(variant)
        check_widths(coarse_channels=coarse_channels, local_channels=local_channels, global_channels=global_channels)
        whole = isinstance(max_channels, int) and not isinstance(max_channels, bool)
        if max_channels is not None and (not whole or max_channels < 1):
            raise ValueError(f"max_channels: expected a positive integer or None, got {max_channels!r}")
        if not isinstance(share_coarse, bool):
            raise ValueError(f"share_coarse: expected a bool, got {share_coarse!r}")
        if share_coarse and "G_att" not in stages:
            raise ValueError(f"share_coarse: needs a G_att stage to share with, got stages={stages!r}")
        self.stages, self.variant, self.share_coarse = stages, variant, share_coarse
        self.channels = (coarse_channels, local_channels, global_channels)
        self.max_channels = max_channels
        builders: dict[str, Callable[[], nn.Module]] = {
            "C": lambda: UNet(coarse_channels, max_channels=max_channels),
            "L": lambda: LocalNet(local_channels),
            "G": lambda: UNet(global_channels, max_channels=max_channels),
            "G_att": lambda: UNet(global_channels, attention=variant, max_channels=max_channels),
        }
        for stage in stages.split("+"):
            if not (stage == "C" and share_coarse):
                self.add_module(STAGE_MODULES[stage], builders[stage]())
        self.set_backend(backend)
        if not any(p.is_meta for p in self.parameters()):
            init_weights(self)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, except the backend, which depends on the machine, and a `max_channels` of
        None."""
        coarse, local, global_ = self.channels
        capped = {} if self.max_channels is None else {"max_channels": self.max_channels}
        return {
            "stages": self.stages,
            "variant": self.variant,
            "coarse_channels": coarse,
            "local_channels": local,
            "global_channels": global_,
            "share_coarse": self.share_coarse,
            **capped,
        }

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Stage name of Table VI -> the function that runs it, in order.

        Each maps cat(picture, mask) [B, 4, H, W] to a picture [B, 3, H, W] in [-1, 1].
        """
        nets: dict[str, Callable[[Tensor], Tensor]] = {}
        for stage, module in zip(self.stages.split("+"), self.stage_modules(), strict=True):
            nets[stage] = partial(module, use_attention=False) if stage == "C" and self.share_coarse else module
        return nets

    def stage_modules(self) -> list[nn.Module]:
        """The network of every stage, in order, of the shapes of :meth:`networks`.

        LGNet_share lists NetG twice; :meth:`networks` also leaves out its attention in the first stage.
        """
        names = ["G_att" if s == "C" and self.share_coarse else s for s in self.stages.split("+")]
        return [getattr(self, STAGE_MODULES[name]) for name in names]

    def forward(
        self, image: Tensor, mask: Tensor, return_stages: bool = False, until: int | None = None
    ) -> Tensor | Stages:
        """Fill the hole (paper, Section III; the formulas are in docs/model.md).

        Args:
            image: [B, 3, H, W] in [-1, 1]; H and W multiples of 256. Values are not checked.
            mask: [B, 1, H, W], 1 = hole, 0 = known; same dtype and device as `image`.
            return_stages: return every stage's picture.
            until: number of stages to run, from 1; None: all.

        Returns:
            The merged result of the last stage that runs, [B, 3, H, W] in [-1, 1], or :class:`Stages`.

        Raises:
            TypeError: an argument is no dense tensor of a floating dtype, the two have different dtypes, or their
                dtype is not that of the weights (outside autocast).
            ValueError: another shape, a mask on another device than the image, or an `until` out of range.
            BackendError: a backend that was chosen by name cannot run on this device, in this dtype or at this width.
        """
        self._check(image, mask, until)
        names = self.stages.split("+")[:until]
        nets = list(self.networks().values())[:until]
        # The hole is painted white: merge with an output of ones.
        first = nets[0](self._merge_concat(image, torch.ones_like(image), mask))
        raw, merged = self._continue(image, mask, first, nets[1:])
        if not return_stages:
            return merged[-1]
        return Stages.of(names, raw, merged)

    # -- weights ---------------------------------------------------------------------------------------------

    @classmethod
    @torch.inference_mode(False)
    def from_released(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        epoch: str | int | None = None,
        variant: str = "released",
        backend: str = "auto",
    ) -> LGNet:
        """Load the authors' checkpoint files ``<epoch>_net_G1.pth``, ``_G2.pth`` and ``_G3.pth``.

        Args:
            source: a directory, or a mapping {"G1": ..., "G2": ..., "G3": ...} of state dicts or file paths.
            epoch: which one, where the directory holds several.
            variant, backend: as in the constructor. Widths are taken from the shapes.

        Returns:
            The model in eval mode. Float64 tensors stay float64; float16 and bfloat16 become float32.

        Raises:
            TypeError: `source` is neither a path nor a mapping.
            ValueError: another `variant` or `backend`, or an `epoch` beside a mapping.
            WeightsError: a file is missing, unreadable or unsafe, or names or shapes do not fit; it lists them.
        """
        forks.prepare()
        nets = released.read(source, epoch)
        coarse, local, global_ = released.widths(nets)
        with torch.device("meta"):
            model = cls(
                variant=variant,
                coarse_channels=coarse,
                local_channels=local,
                global_channels=global_,
                backend=backend,
            )
        model.load_state_dict(released.to_native(nets, model.state_dict()), strict=True, assign=True)
        return model.eval()

    def to_released(self) -> dict[str, dict[str, Tensor]]:
        """State dicts under the authors' names, {"G1": ..., "G2": ..., "G3": ...}; the inverse of from_released.

        Raises:
            ValueError: not the three plain stages, which alone have released names.
        """
        if self.stages != "C+L+G_att" or self.share_coarse or self.max_channels is not None:
            raise ValueError(
                f"model: only plain LGNet has released names, got stages={self.stages!r}, "
                f"share_coarse={self.share_coarse}, max_channels={self.max_channels}"
            )
        return released.from_native(self.state_dict())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and, where there is none, a model card.

        The files count as one set, with hashes in ``manifest.json``: a save that fails or is killed leaves the
        old set or the new one, never a mixture. What killed saves left (``.saving-*``) is removed.

        Args:
            save_directory: created if needed.
            dtype: store floating tensors in this dtype (float16 halves the file); None: as they are.
            push_to_hub, repo_id, model_card_kwargs, push_to_hub_kwargs: see huggingface_hub's ``ModelHubMixin``.

        Returns:
            The commit's address if pushed, else None.

        Raises:
            TypeError: an argument of another type.
            WeightsError: `from_pretrained` could not load the weights, because layers were replaced, pruned,
                parametrized or compiled one by one, or some are float64 and others not; it lists them. The old set
                stays.
            LGNetError: the directory cannot be written.
        """
        if not isinstance(save_directory, (str, os.PathLike)):
            raise TypeError(f"save_directory: expected a path, got {save_directory!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating torch.dtype or None, got {dtype!r}")
        directory = Path(save_directory)
        # `push_to_hub` saves again, by this method and without `dtype`.
        token = _stored_dtype.set(dtype or _stored_dtype.get())
        try:
            with staged(directory) as staging:
                super().save_pretrained(
                    staging,
                    config=self.config,
                    model_card_kwargs={"repo_id": repo_id or directory.name, **(model_card_kwargs or {})},
                )
            if push_to_hub:
                return self.push_to_hub(repo_id=repo_id or directory.name, **push_to_hub_kwargs)
        finally:
            _stored_dtype.reset(token)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        state, dtype = self.state_dict(), _stored_dtype.get()
        if type(self) is LGNet:  # another class may make other layers
            with torch.device("meta"):
                plain = LGNet(**self.config)
            stored = {
                name: torch.empty_like(t, device="meta", dtype=dtype if t.is_floating_point() else None)
                for name, t in state.items()
            }
            fitting(
                stored, plain.state_dict(), "save: from_pretrained makes the layers anew and could not load these"
            )
        write_safetensors(state, save_directory, dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> LGNet:
        """Load what :meth:`save_pretrained` wrote, from a directory or a Hugging Face Hub id; strict, but names in
        ``config.json`` that LGNet does not have are ignored, with a warning.

        Args:
            pretrained_model_name_or_path: directory or hub id: "owner/name", or "owner/name@revision" for a branch, a
                tag or, so that it stays the same, a commit.
            kwargs: ``backend=``; ``map_location=``, the device of the weights (default: "cpu"); and those of
                huggingface_hub (revision, cache_dir, local_files_only, token).

        Returns:
            The model in eval mode. Float64 weights stay float64; float16 and bfloat16 become float32.

        Raises:
            TypeError: neither a path nor an id.
            WeightsError: an argument of another value; nothing there; ``config.json`` is no JSON object or has
                arguments that do not fit; names or shapes do not fit (it lists them); or the files of a directory, of
                a hub id the weights, are not those of its ``manifest.json``. What has none is read unchecked.
        """
        forks.prepare()
        source, revision = of_revision(pretrained_model_name_or_path, kwargs.get("revision"))
        if revision is not None:
            kwargs["revision"] = revision
        find_weights(source)
        known = inspect.signature(cls).parameters.keys()
        with weights_errors(source), torch.inference_mode(False):
            if os.path.isdir(source):
                refuse_impostor(Path(source) / CONFIG_FILE)
                refuse_impostor(Path(source) / WEIGHTS_FILE)
                source = complete_set(Path(source), (CONFIG_FILE, WEIGHTS_FILE))
                check_config(source / CONFIG_FILE, known)
                return super().from_pretrained(source, given=frozenset(kwargs), **kwargs)
            try:
                return super().from_pretrained(source, given=frozenset(kwargs), **kwargs)
            finally:  # after an error too: the hub's client does not name a configuration that it cannot read
                check_hub_config(str(source), known, kwargs.get("cache_dir"), kwargs.get("revision"))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        given: frozenset[str] = frozenset(),
        **kwargs: Any,
    ) -> LGNet:
        """See `from_pretrained`. `given`: names of the caller's arguments; the others are from ``config.json``."""
        # The last two come from huggingface_hub before 1.0.
        options = (
            "revision",
            "cache_dir",
            "force_download",
            "local_files_only",
            "token",
            "proxies",
            "resume_download",
        )
        hub = {key: kwargs.pop(key) for key in options if key in kwargs}
        kwargs.pop("strict", None)  # always strict
        check_map_location(map_location)
        own = kwargs.keys() & given
        with config_errors(f"{model_id}/{CONFIG_FILE}", kwargs.keys() - own, own), torch.device("meta"):
            model = cls(**kwargs)
        tensors = read_safetensors(model_id, model.state_dict(), map_location, **hub)
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.eval()


class LocalGlobalRefinement(Cascade):
    """X_LG: LGNet's local and global networks behind any first-stage network (paper, Section IV-E).

    Args:
        first_stage: module called as ``first_stage(image, mask)`` with the same tensors as this one; returns its
            raw picture [B, 3, H, W] in [-1, 1].
        variant, local_channels, global_channels, backend: as in :class:`LGNet`.

    A new model is in training mode, NetL and NetG with the paper's random initialisation; the first stage keeps its
    weights and its mode.

    Raises:
        TypeError: `first_stage` is no module.
        ValueError: another `variant` or `backend`. Whether the backend can run is known from the input only: see
            :meth:`LGNet.forward`.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        first_stage: nn.Module,
        variant: str = "released",
        local_channels: int = 64,
        global_channels: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(first_stage, nn.Module):
            raise TypeError(f"first_stage: expected a torch.nn.Module, got {type(first_stage).__name__}")
        check_variant(variant)
        check_widths(local_channels=local_channels, global_channels=global_channels)
        self.variant, self.channels = variant, (local_channels, global_channels)
        self.net_l = LocalNet(local_channels)
        self.net_g = UNet(global_channels, attention=variant)
        if not any(p.is_meta for p in self.net_l.parameters()):
            init_weights(self)
        self.first_stage = first_stage  # after the initialisation: it keeps its own weights
        self.set_backend(backend)

    stage_names = ("X", "L", "G_att")

    def stage_modules(self) -> list[nn.Module]:
        """The first stage, called with (image, mask), then NetL and NetG: [B, 4, H, W] to [B, 3, H, W] in [-1, 1]."""
        return [self.first_stage, self.net_l, self.net_g]

    def forward(
        self, image: Tensor, mask: Tensor, return_stages: bool = False, until: int | None = None
    ) -> Tensor | Stages:
        """Fill the hole; arguments, result and errors as of :meth:`LGNet.forward`.

        The picture of the first stage takes the place of NetC's (paper, Section IV-E; docs/model.md). Errors of the
        first stage are passed on.
        """
        self._check(image, mask, until)
        raw, merged = self._continue(image, mask, self.first_stage(image, mask), self.stage_modules()[1:until])
        if not return_stages:
            return merged[-1]
        return Stages.of(self.stage_names[:until], raw, merged)
