"""Configuration of a training run: dataclasses, read from YAML or JSON and saved with the run."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.masks import FREE_KINDS, HOLE_CLASSES, KINDS, POLARITIES, SUITE_KINDS
from ..errors import ConfigError, MissingExtraError
from ..reference.losses import FeatureOptions, LossWeights
from ..reference.networks import LEVELS
from .typed import build

_MOST_THREADS = 1024


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "lgnet"
    """Name for :func:`lgnet_fast.create_model`; ignored where `init_from` or `factory` is given."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Arguments of :class:`LGNet`, e.g. ``{"coarse_channels": 16}``."""
    init_from: str | None = None
    """"bundled", a model folder, a hub id, or a folder of the authors' files to go on from, instead of `name` with
    the paper's random weights."""
    factory: str | None = None
    """"package.module:function", which returns the model: for an X_LG (LocalGlobalRefinement)."""
    train_stages: tuple[int, ...] = ()
    """Numbers of the stages whose networks are trained, from 1; none: all. Stages before them run as in inference,
    those after them not at all. For fine-tuning: [3] costs two thirds of training LGNet's three stages, [2] half."""
    backend: str = "auto"
    """Backend of attention and merging: "auto" (fused where possible), "eager", "cpp" or "triton"."""
    freeze_batchnorm: bool = False
    """Normalise by the running statistics; neither they nor the normalisation's weights and biases are trained."""
    freeze_batchnorm_from: float | None = None
    """Share of the run, in [0, 1), after which they are frozen, because statistics of single batches shift all
    colours at every step, also late in the schedule. Weights and biases of the normalisation are still trained."""
    batchnorm_momentum: float = 0.1
    """Weight of each batch in the running statistics."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator. ``loss.adversarial: 0`` leaves it out."""

    variant: Literal["released", "paper"] = "released"
    """Padding, as in the released network or in the paper."""
    channels: int = 64
    """Width of its first layer; 64 in the paper. Fewer suit a small model on a CPU."""
    stage: Literal["first", "last"] = "first"
    """The stage whose merged picture it judges; "first" in the paper."""
    start: float = 0.0
    """Share of the run, in [0, 1), after which it is used."""
    init_from: str | None = None
    """The authors' ``<epoch>_net_D.pth`` to go on from, which has the paper's `channels`."""
    by_hole: bool = False
    """Weight each score by the hole ratio of its cell of the picture, of which there are as many as scores. In the
    paper all scores count equally, although most cells of a merged picture are true pixels."""
    crop: int | None = None
    """Side of a square around a random hole pixel, which it judges instead of the whole picture."""


@dataclass(frozen=True)
class DataConfig:
    """Pictures and masks."""

    pictures: tuple[str, ...] = ()
    """Folders of pictures or of ``*.tar`` shards (with their sub-folders, also through links, without hidden ones),
    shards, or ``hf:NAME[:SPLIT[:COLUMN]]``."""
    exclude: tuple[str, ...] = ()
    """Stems of pictures to leave out, e.g. those of the validation."""
    validation: str | None = None
    """Held-out pictures, in the forms of `pictures`; None: no validation."""
    protocol: Literal["photos", "celeba_hq", "places2", "paris_streetview", "logo_removal", "text_removal"] = "photos"
    """How a picture becomes a square; see :data:`.crops.PROTOCOLS`."""
    categories: tuple[str, ...] | None = None
    """Only pictures in folders of these names (Places2's 20 categories, for instance), or of those in a .txt file."""
    size: int = 256
    """Side of the squares in pixels, a positive multiple of 256; 256 in the paper."""
    masks: str = "generated"
    """"generated", a folder of mask pictures (Liu et al.'s, QD-IMD, ...), or "paired": those in the tar shards."""
    mask_kind: str = "strokes"
    """"strokes", "boxes", "mixed", "varied" (thin and thick strokes, boxes, blobs and shapes like objects), or "fine"
    (half of them thin strokes, close together; half varied)."""
    mask_polarity: str = "white"
    """Levels of mask pictures that are hole: "white", those above a half of the scale, or "black", the others."""
    hole_classes: tuple[int, ...] = tuple(range(len(HOLE_CLASSES)))
    """Classes of generated masks, drawn evenly; indices in :data:`.masks.HOLE_CLASSES`."""
    workers: int = 2
    """Processes that read pictures and draw masks during the training; 0: none. Not used with `in_memory`."""
    prefetch: int = 2
    """Batches that each worker prepares ahead."""
    in_memory: bool = False
    """Decode every picture once, at a few scales, and keep them on the device with a bank of masks, for a GPU that is
    faster than the decoders. 1,700 pictures of 288x400 take 1 GB."""
    mask_bank: int = 4096
    """Number of masks in the bank of `in_memory`; each is used in its eight symmetries."""
    colour: float = 0.0
    """Gains, contrast, brightness and saturation are changed at random by up to this share."""


@dataclass(frozen=True)
class LossConfig(LossWeights):
    """Weights of the terms, and the feature network of the style and perceptual ones."""

    features: str | None = "torchvision"
    """"torchvision" (VGG-16 from torch's hub cache, else downloaded), a weights file (:mod:`..reference.features`
    describes its layouts), a name of ``register_features``, "package.module:function", or None: no such terms."""
    features_sha256: str | None = None
    """SHA-256 of that weights file, or the start of it."""
    features_normalised: bool = False
    """Normalise the input of VGG-16 by ImageNet's statistics; the released network uses pictures in [-1, 1]."""
    lpips_weights: str | None = None
    """File of AlexNet or VGG-16 with LPIPS's heads, for the term and for the validation."""
    feature_stages: Literal["later", "last"] = "later"
    """Stages of the style, perceptual and LPIPS terms: every stage after the first, as in the paper, or the last
    alone."""
    feature_pictures: Literal["both", "merged"] = "both"
    """Raw and merged pictures, as in the paper, or merged ones alone."""
    feature_crop: int | None = None
    """Side of a square around a random hole pixel, to which these terms are restricted."""
    feature_every: int = 1
    """Compute these terms in every k-th step only, with k times the weight."""
    feature_dtype: Literal["same", "bf16"] = "same"
    """Dtype of the network of the style and perceptual terms outside autocast; "bf16" needs a module."""
    lean: bool = True
    """The same gradients with less memory, see ``generator_loss``; not used in float16."""

    def options(self) -> FeatureOptions:
        """The settings of the feature terms, as ``generator_loss`` takes them."""
        return FeatureOptions(
            self.feature_stages, self.feature_pictures, self.feature_crop, float(self.feature_every)
        )


@dataclass(frozen=True)
class OptimConfig:
    """Steps, optimisers, precision."""

    batch_size: int = 4
    """Pictures in a batch of one process, before accumulation."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Of the generators: Adam, as in the paper, or Muon (:mod:`.optimisers`)."""
    learning_rate: float = 2e-4
    """Of the generators, above 0, before the factor of the schedule; 2e-4 in the paper."""
    discriminator_learning_rate: float | None = None
    """Above 0; None: `learning_rate`, as in the paper."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Decay rates of Adam's two moments, each in [0, 1); 0.5 and 0.999 in the paper. With Muon, of the parameters
    that Adam optimises."""
    epochs: int | None = 200
    """Length of the run in passes over all pictures, above 0; 200 in the paper. None needs `steps`."""
    steps: int | None = None
    """Length of the run in optimiser steps, above 0; overrides `epochs`."""
    max_minutes: float | None = None
    """Longest duration of the run. The schedule follows the larger of the shares of time and of steps."""
    leg_minutes: float | None = None
    """Time after which this process stops, with a checkpoint and an exported model; ``--resume`` continues."""
    schedule: Literal["paper", "linear", "cosine", "constant"] = "paper"
    """"paper": constant for half of the epochs, then falling linearly (docs/model.md)."""
    warmup_steps: int = 0
    """Steps at the start, 0 or more, over which the learning rate rises linearly to its value; 0 in the paper."""
    clip: float | None = None
    """Largest gradient norm of either network."""
    ema: float | None = None
    """Decay of an exponential moving average of the generator, which is then validated and exported."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast; "fp16" needs a GPU."""
    dtype: Literal["float32", "float64"] = "float32"
    """Dtype of the weights."""
    channels_last: bool = False
    """Memory format channels_last; faster on GPUs in 16 bit."""
    compile: bool = False
    """torch.compile the generator."""
    cuda_graphs: bool = False
    """Replay the kernels of a step as CUDA graphs (:mod:`.graphed`), for small batches, which launch kernels more
    slowly than a GPU runs them. For one process on an NVIDIA GPU, without `compile`, fp16 and crops."""


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, device, logs, validation and checkpoints."""

    directory: str = "runs/lgnet"
    """Folder of the run: configuration, log, checkpoints, models. It is made if needed; "~" is the home folder."""
    seed: int = 0
    """0 to 2**63 - 1: of the random weights, and of order, crops, colours and holes of the pictures, also of the
    validation's holes."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto": a GPU if there is one, as accelerate chooses; "cpu"."""
    log_every: int = 50
    """Steps, 1 or more, between lines of the log, each with the means of the losses since the one before."""
    picture_every: int = 500
    """Steps between picture grids, which are for TensorBoard; 0: none."""
    validate_every: int = 1000
    """Steps, 1 or more, between validations; there is one at the end too."""
    metric: Literal["psnr", "ssim", "l1", "lpips"] = "psnr"
    """The metric that selects the best checkpoint."""
    validation_classes: tuple[int, ...] = (1, 2)
    """Classes of the validation's stroke masks, indices 0 to 5 in :data:`.masks.HOLE_CLASSES`; every picture has one
    mask of each."""
    validation_kinds: tuple[str, ...] = ()
    """Kinds of :data:`.masks.SUITE_KINDS`, instead of `validation_classes`. They are scored in batches on the device:
    l1, PSNR, sharpness, and LPIPS where ``loss.lpips_weights`` is given."""
    validation_pictures: int | None = None
    """Use only the first N pictures. Every process keeps them in memory, at 256x256 in 0.2 MB each."""
    checkpoint_every: int = 1000
    """Steps, 1 or more, between checkpoints; there is one at the end too."""
    checkpoint_minutes: float | None = None
    """Minutes after which a checkpoint is written, besides those by steps."""
    keep: int = 3
    """Checkpoints kept, besides the best."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a loss that is not finite: "stop" saves the batch and a checkpoint of the step before, and ends the run;
    "skip" skips and counts the batch."""
    finite_every: int = 1
    """With "stop": steps between checks of the loss. Each check waits for the GPU. Above 1, the weights may not be
    finite any more at the check; the last checkpoint is then an earlier one."""
    tensorboard: bool = True
    """Write TensorBoard's files beside the log; needs the extra `[train]`."""
    threads: int | None = None
    """Threads of PyTorch on the CPU; None: PyTorch's default."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(TrainConfig).items():
            section = getattr(self, name)
            if not isinstance(section, kind):
                raise ConfigError(f"{name}: expected a {kind.__name__}, got {section!r}")
            # Sections that Python code made have not been checked for the kinds of their values.
            object.__setattr__(self, name, build(type(section), vars(section), f"{name}."))
        self._check_data()
        self._check_loss()
        self._check_optim()
        self._check_run()
        self._check_without_effect()

    def _check_data(self) -> None:
        data, run = self.data, self.run
        least = 2**LEVELS
        _check("data.size", data.size, data.size > 0 and data.size % least == 0, f"a positive multiple of {least}")
        kinds = (*KINDS, *FREE_KINDS)
        _check("data.mask_kind", data.mask_kind, data.mask_kind in kinds, f"one of {kinds}")
        _check("data.mask_polarity", data.mask_polarity, data.mask_polarity in POLARITIES, f"one of {POLARITIES}")
        for name, classes in (
            ("data.hole_classes", data.hole_classes),
            ("run.validation_classes", run.validation_classes),
        ):
            inside = bool(classes) and all(0 <= c < len(HOLE_CLASSES) for c in classes)
            _check(name, classes, inside, f"indices from 0 to {len(HOLE_CLASSES) - 1}")
        _check("data.workers", data.workers, data.workers >= 0, "0 or more")
        for name in ("prefetch", "mask_bank"):
            _check(f"data.{name}", getattr(data, name), getattr(data, name) >= 1, "1 or more")
        _check("data.colour", data.colour, 0 <= data.colour < 1, "a share in [0, 1)")
        places = (*data.pictures, *(() if data.validation is None else (data.validation,)))
        name = "data.validation" if data.validation == "" else "data.pictures"
        _check(name, "", "" not in places, "a folder, a tar shard or a dataset")
        _check("data.masks", data.masks, data.masks != "", "generated, paired or a folder")

    def _check_without_effect(self) -> None:
        """Settings that another one leaves without effect are mistakes, unless it leaves out a whole part of the
        training: the adversary, the feature terms, the validation."""
        model, data, loss, run = self.model, self.data, self.loss, self.run
        drawn, of_a_class = data.masks == "generated", data.mask_kind in KINDS
        others = (
            ("model.freeze_batchnorm_from", model.freeze_batchnorm, "model.freeze_batchnorm: true"),
            ("model.batchnorm_momentum", model.freeze_batchnorm, "model.freeze_batchnorm: true"),
            ("data.mask_kind", not drawn, f"data.masks: {data.masks}"),
            ("data.hole_classes", not drawn, f"data.masks: {data.masks}"),
            ("data.hole_classes", not of_a_class, f"data.mask_kind: {data.mask_kind}"),
            ("data.mask_polarity", drawn, "data.masks: generated"),
            ("data.mask_bank", not data.in_memory, "data.in_memory: false"),
            ("data.prefetch", data.workers == 0, "data.workers: 0"),
            ("loss.features_sha256", loss.features == "torchvision", "loss.features: torchvision"),
            ("loss.hole_discount", loss.hole == 0, "loss.hole: 0"),
            ("loss.lpips_weights", not (loss.lpips or run.validation_kinds), "loss.lpips: 0, no validation_kinds"),
            ("run.validation_classes", bool(run.validation_kinds), "run.validation_kinds"),
            ("run.finite_every", run.on_nan == "skip", "run.on_nan: skip"),
            ("run.picture_every", run.picture_every > 0 and not run.tensorboard, "run.tensorboard: false"),
        )
        for name, without_effect, reason in others:
            section, _, setting = name.partition(".")
            value, default = (getattr(one, setting) for one in (getattr(self, section), type(getattr(self, section))))
            expected = f"the default ({list(default) if isinstance(default, tuple) else default}) with {reason}"
            _check(name, value, value == default or not without_effect, f"{expected}, where it has no effect")

    def _check_loss(self) -> None:
        run, data = self.run, self.data
        crops = {"loss.feature_crop": self.loss.feature_crop, "discriminator.crop": self.discriminator.crop}
        for name, crop in crops.items():
            _check(name, crop, crop is None or 64 <= crop <= data.size, f"64 to {data.size}")
        discount = self.loss.hole_discount
        _check("loss.hole_discount", discount, 0 < discount <= 1, "a factor in (0, 1]")
        _check("loss.feature_every", self.loss.feature_every, self.loss.feature_every >= 1, "1 or more")
        freeze = self.model.freeze_batchnorm_from
        _check("model.freeze_batchnorm_from", freeze, freeze is None or 0 <= freeze < 1, "a share in [0, 1)")
        momentum = self.model.batchnorm_momentum
        _check("model.batchnorm_momentum", momentum, 0 < momentum <= 1, "a share in (0, 1]")
        inside = all(kind in SUITE_KINDS for kind in run.validation_kinds)
        _check("run.validation_kinds", run.validation_kinds, inside, f"names of {SUITE_KINDS}")
        scored = run.metric != ("ssim" if run.validation_kinds else "lpips")
        _check(
            "run.metric",
            run.metric,
            scored,
            "one that is scored: lpips with validation_kinds only, ssim without only",
        )
        given = self.loss.lpips_weights
        needs = [
            name for name, asked in (("loss.lpips", self.loss.lpips), ("run.metric", run.metric == "lpips")) if asked
        ]
        _check("loss.lpips_weights", given, given is not None or not needs, f"a file, for {' and '.join(needs)}")
        channels, file = self.discriminator.channels, self.discriminator.init_from
        _check("discriminator.channels", channels, channels >= 1, "1 or more")
        own = DiscriminatorConfig.channels
        fits = file is None or channels == own
        _check("discriminator.channels", channels, fits, f"{own}, the width of discriminator.init_from")
        start = self.discriminator.start
        _check("discriminator.start", start, 0 <= start < 1, "a share in [0, 1)")
        for weight in dataclasses.fields(LossWeights):
            value = getattr(self.loss, weight.name)
            _check(f"loss.{weight.name}", value, 0 <= value < math.inf, "0 or more")

    def _check_optim(self) -> None:
        optim = self.optim
        for name in ("batch_size", "accumulate"):
            _check(f"optim.{name}", getattr(optim, name), getattr(optim, name) >= 1, "1 or more")
        _check("optim.learning_rate", optim.learning_rate, 0 < optim.learning_rate < math.inf, "a positive number")
        adversary_rate = optim.discriminator_learning_rate
        inside = adversary_rate is None or 0 < adversary_rate < math.inf
        _check("optim.discriminator_learning_rate", adversary_rate, inside, "a positive number")
        inside = len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)
        _check("optim.betas", optim.betas, inside, "two numbers in [0, 1)")
        _check("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "0 or more")
        for name in ("epochs", "steps", "max_minutes", "leg_minutes", "clip"):
            value = getattr(optim, name)
            _check(f"optim.{name}", value, value is None or value > 0, "a positive number")
        _check("optim.epochs", optim.epochs, optim.epochs is not None or optim.steps is not None, "epochs or steps")
        plain = optim.dtype == "float32" or optim.precision == "no"
        _check("optim.precision", optim.precision, plain, "no with optim.dtype: float64, which autocast leaves")
        against = {
            "optim.compile: true": optim.compile,
            "optim.precision: fp16": optim.precision == "fp16",
            "loss.feature_crop": self.loss.feature_crop is not None,
            "discriminator.crop": self.discriminator.crop is not None,
        }
        reasons = " and ".join(name for name, asked in against.items() if asked)
        _check("optim.cuda_graphs", optim.cuda_graphs, not (optim.cuda_graphs and reasons), f"false with {reasons}")
        _check("optim.ema", optim.ema, optim.ema is None or 0 < optim.ema < 1, "a number between 0 and 1")

    def _check_run(self) -> None:
        run = self.run
        _check("run.directory", run.directory, bool(run.directory) and "\0" not in run.directory, "a folder's name")
        _check("run.seed", run.seed, 0 <= run.seed < 2**63, "0 to 2**63 - 1")
        pictures = run.validation_pictures
        _check("run.validation_pictures", pictures, pictures is None or pictures >= 1, "1 or more")
        _check(
            "run.threads",
            run.threads,
            run.threads is None or 1 <= run.threads <= _MOST_THREADS,
            f"1 to {_MOST_THREADS}",
        )
        _check("run.picture_every", run.picture_every, run.picture_every >= 0, "0 or more")
        minutes = run.checkpoint_minutes
        _check("run.checkpoint_minutes", minutes, minutes is None or minutes > 0, "a positive number")
        for name in ("log_every", "validate_every", "checkpoint_every", "keep", "finite_every"):
            _check(f"run.{name}", getattr(run, name), getattr(run, name) >= 1, "1 or more")

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


def _check(name: str, value: object, condition: bool, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def config_of(mapping: Mapping[str, Any]) -> TrainConfig:
    """A configuration from nested mappings; missing values get their defaults.

    Raises:
        ConfigError: an unknown name, or a value of the wrong kind; it says which, and what was expected.
    """
    return build(TrainConfig, mapping, "")


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Read a YAML or JSON file.

    Args:
        path: the file.
        overrides: ``"section.name=value"``, the value in YAML; these replace values of the file.

    Returns:
        The configuration; settings that neither names have their defaults.

    Raises:
        ConfigError: the file cannot be read, or see :func:`config_of`.
        MissingExtraError: PyYAML, of the extra `[train]`, is not installed; JSON files need it too.
    """
    try:
        import yaml  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("configurations need PyYAML: pip install 'lgnet-fast[train]'") from error
    try:
        values = _parsed(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # a value that does not fit its YAML tag raises many types
        raise ConfigError(
            f"config: expected a readable YAML or JSON file, got {str(path)!r} ({' '.join(str(error).split())})"
        ) from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"config: expected a mapping in {str(path)!r}, got {type(values).__name__}")
    for item in overrides:
        name, equals, text = item.partition("=")
        parts = name.strip().split(".")
        if not equals or len(parts) != 2:
            raise ConfigError(f"set: expected section.name=value, got {item!r}")
        if values.get(parts[0]) is None:
            values[parts[0]] = {}
        section = values[parts[0]]
        if not isinstance(section, dict):
            raise ConfigError(f"config: expected a mapping under {parts[0]}, got {section!r}")
        try:
            section[parts[1]] = _parsed(text)
        except Exception as error:
            raise ConfigError(f"set: expected a YAML value, got {item!r} ({' '.join(str(error).split())})") from error
    return config_of(values)


def _parsed(text: str) -> Any:
    """The value of a YAML text; JSON is YAML too. Raises ValueError: a mapping has a name twice."""
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_doubles(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_doubles(node: Any) -> None:
    """Raise ValueError for a name that a YAML mapping, or a mapping in it, has twice: YAML would take the last."""
    if node is None or node.id != "mapping":
        return
    seen: set[str] = set()
    for name, below in node.value:
        if name.id == "scalar":
            if name.value in seen:
                raise ValueError(f"{name.value} is there twice, the second time in line {name.start_mark.line + 1}")
            seen.add(name.value)
        _refuse_doubles(below)
