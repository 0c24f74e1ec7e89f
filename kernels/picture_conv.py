"""The engine's convolutions that read the picture or end a stage, by compiled CUDA C++ kernels.

The kernels (`csrc/cuda/picture_conv.cu`) compute what :func:`.conv.conv_forward` computes, in float16 and bfloat16,
for the steps that have 4 input or 3 output channels: the first layers of the U-Nets and of NetL, and the last ones.
Such steps suit an implicit matrix product badly. With 4 input channels most of its instructions are arithmetic on
addresses; with 3 output channels most of its columns are idle, or, as patches of outputs, it multiplies 2.7 times as
much. Here a tile's inputs are copied to shared memory once, and the taps of a row are columns of the product (see the
source).

They run on GPUs of compute capability 8.0 and newer: the package has machine code for 8.x, 9.0, 10.x and 12.x, and
PTX for what comes later. An engine's first use, and the tuner (`lgnet_fast.engine.cuda.tuning`), measure
:func:`candidates` beside the Triton tiles; a product uses these kernels only where they were the fastest on the GPU
in use. The first use on a GPU compares them with PyTorch in float64 (:func:`reason_against`).
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lgnet_fast.engine.geometry import Axis

from .cards import SHARED_LIMITS, Card
from .compiled_checks import DTYPES, LIMIT, FirstUse, check_bias, check_view, exact_convolution, set_stores
from .configs import device_generation
from .conv import PICTURE_CHANNELS, RAW_CHANNELS, Conv
from .conv_configs import FILL_SECONDS, INGRESS_ALONE, LAUNCH_SECONDS, Cost
from .cuda_driver import Kernel
from .launch import device_guard, is_recording
from .results import Merge, Store

CAPABILITY = (8, 0)
CHANNELS = 64
"""Output channels of a thread block, from the picture."""
SPAN = 32
"""Positions of a row that a warp computes, from the picture."""
_WARP, _FRAGMENT_BYTES, _PIXEL_BYTES, _STAGES = 32, 256, 8, 2
_FROM = ((7, 1), (4, 2))  # kernel, stride
_TO = {(64, 7, 1): (640, (32, 48, 64)), (128, 3, 2): (384, (32, 48))}
"""(input channels, taps of an axis, patch) -> most threads, input columns of a tile."""
_WARP_RATES = {"sm_90": 0.6, "sm_100": 0.3}
"""Share of the matrix rate that products of single warps reach where the hardware has wider ones. Hopper: Luo et al.,
"Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024 (0.63 of wgmma's);
Blackwell: assumed."""


class PictureTile(NamedTuple):
    """A thread block's tile: `rows` of positions and `width` columns of the input (from the picture: of the output).

    A position is an output pixel, or a patch of 2x2 outputs of a transposed convolution.
    """

    rows: int
    width: int

    @property
    def label(self) -> str:
        """As text: columns x rows."""
        return f"picture {self.width}x{self.rows}"


class Args(ctypes.Structure):
    """`Args` of csrc/cuda/picture_conv.cu."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("source", "weights", "bias", "store0", "store1", "image", "mask", "raw", "merged")
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "in_h", "in_w", "out_h", "out_w", "top", "bottom", "left", "right",
                "rows_top", "rows_left", "tiles_x", "tiles_y", "origin", "n_blocks",
                "stride_x", "stride_0", "stride_1", "activation_0", "activation_1", "reflect", "planar",
            )
        ),
    ]  # fmt: skip


class _Form(NamedTuple):
    """A step as the kernels see it.

    axis: with one phase; a position may be a patch of outputs. parts: warps that share a row. steps: of 16
    along the depth of a row of taps. products: groups of 8 columns. blocks: groups of output channels.
    """

    axis: Axis
    to_picture: bool
    parts: int
    steps: int
    products: int
    blocks: int

    @property
    def taps(self) -> int:
        return self.axis.taps[0]

    @property
    def fragments(self) -> int:
        """Products of 16 x 8 weights in a thread block."""
        return self.taps * self.steps * self.products


def _form(conv: Conv) -> _Form | None:
    """None where the kernels cannot compute the step."""
    if conv.merges:
        axis = conv.geometry.axis(2 if conv.transposed else 1)
        supported = (conv.in_channels, axis.taps[0], axis.patch) in _TO and axis.in_step == 1
        columns = axis.taps[0] * axis.patch**2 * RAW_CHANNELS
        steps = conv.in_channels // 16
        form = _Form(axis, True, steps // _STAGES, steps, -(-columns // 8), 1)
        return form if supported and conv.out_channels == RAW_CHANNELS else None
    if conv.transposed or (conv.kernel, conv.stride) not in _FROM:
        return None
    if conv.in_channels != PICTURE_CHANNELS or conv.out_channels % CHANNELS:
        return None
    return _Form(conv.geometry.axis(), False, 1, -(-conv.kernel // 4), CHANNELS // 8, conv.out_channels // CHANNELS)


def unsupported(conv: Conv) -> str | None:
    """Why the kernels cannot compute a step, or None."""
    if _form(conv) is not None:
        return None
    return f"{conv.in_channels} to {conv.out_channels} channels with {conv.kernel}x{conv.kernel} taps"


def _fragments(matrix: Tensor) -> Tensor:
    """Matrices [..., 16, 8] in the order of a warp's registers, [..., lane, register, half]."""
    parts = matrix.reshape(*matrix.shape[:-2], 2, 4, 2, 8)  # a lane's register and half, lane % 4; lane / 4
    *rest, register, quad, half, group = range(parts.dim())
    return parts.permute(*rest, group, quad, register, half).reshape(*matrix.shape[:-2], 32, 2, 2)


def pack(conv: Conv, weight: Tensor) -> Tensor:
    """Weights [out, in, k, k] (transposed: [in, out, k, k]) in the order in which the kernels read them, flat.

    To the picture: [16 input channels, row of taps, 8 columns, lane, register, half], where the columns are (tap of
    the row, y and x in the patch, channel). From the picture: [64 outputs, row of taps, 4 taps, 8 columns, lane,
    register, half], where column 2q + j of the columns 4p + c is output 32 p + 8 q + 2 c + j.

    Raises:
        ValueError: the kernels cannot compute the step.
    """
    if (form := _form(conv)) is None:
        raise ValueError(f"conv: {unsupported(conv)}")
    taps_first = weight.permute((2, 3, 0, 1) if conv.transposed else (2, 3, 1, 0))
    if not form.to_picture:
        size, steps = conv.kernel, form.steps
        padded = weight.new_zeros(size, 4 * steps, PICTURE_CHANNELS, conv.out_channels)
        padded[:, :size] = taps_first
        outputs = padded.reshape(size, steps, 16, -1, 2, 4, 4, 2)  # 64 outputs, p, q, c, j
        return _fragments(outputs.permute(3, 0, 1, 4, 6, 2, 5, 7).reshape(-1, size, steps, 8, 16, 8)).flatten()
    axis, patch, taps = form.axis, form.axis.patch, form.taps
    rows = weight.new_zeros(taps, conv.in_channels, taps, patch, patch, RAW_CHANNELS)
    for y in range(taps):
        for x in range(taps):
            for shift_y in range(patch):
                for shift_x in range(patch):
                    tap_y = conv.kernel_tap(shift_y, axis.origins[0] + y)
                    tap_x = conv.kernel_tap(shift_x, axis.origins[0] + x)
                    if tap_y is not None and tap_x is not None:
                        rows[y, :, x, shift_y, shift_x] = taps_first[tap_y, tap_x]
    columns = rows.reshape(taps, conv.in_channels, -1)
    padded = weight.new_zeros(taps, conv.in_channels, 8 * form.products)
    padded[..., : columns.shape[-1]] = columns
    blocks = padded.reshape(taps, form.steps, 16, form.products, 8)
    return _fragments(blocks.permute(1, 0, 3, 2, 4)).flatten()


class Launch(NamedTuple):
    """Parameters of one launch, without addresses; `macs` and `read_bytes` of a block say what it takes."""

    args: Args
    kernel: str
    """Its name, with {} for the dtype."""
    grid: int
    threads: int
    shared_bytes: int
    macs: int
    read_bytes: int


def describe_launch(
    conv: Conv,
    batch: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    rect: tuple[int, int, int, int],
    tile: PictureTile,
) -> Launch:
    """A launch for outputs `rect` = (top, bottom, left, right).

    Raises:
        ValueError: the kernels cannot compute the step, or have no such tile.
    """
    form = _form(conv)
    if form is None:
        raise ValueError(f"conv: {unsupported(conv)}")
    axis = form.axis
    threads = _WARP * tile.rows * form.parts
    if form.to_picture:
        most, widths = _TO[conv.in_channels, form.taps, axis.patch]
        columns = tile.width - form.taps + 1
        read = (tile.rows + form.taps - 1) * tile.width * 2 * conv.in_channels
        sums = form.parts * tile.rows * form.taps * axis.patch**2 * RAW_CHANNELS * (tile.width + 4)
        kernel = f"lgnet_to_{{}}_{conv.in_channels}_{tile.width}"
    else:
        most, widths, columns = 512, (SPAN,), SPAN
        patch_rows, pitch = (tile.rows - 1) * conv.stride + conv.kernel, (SPAN - 1) * conv.stride + 4 * form.steps
        read, sums = patch_rows * pitch * _PIXEL_BYTES, 0
        kernel = f"lgnet_from_{{}}_{conv.kernel}"
    read += form.fragments * _FRAGMENT_BYTES
    if tile.width not in widths or not 0 < threads <= most:
        raise ValueError(f"tile: expected widths of {widths} and at most {most} threads, got {tile}")
    step = axis.out_step
    top, bottom, left, right = rect
    tiles_y = -(-(-(-bottom // step) - top // step) // tile.rows)
    tiles_x = -(-(-(-right // step) - left // step) // columns)
    args = Args(
        in_h=in_size[0], in_w=in_size[1], out_h=out_size[0], out_w=out_size[1],
        top=top, bottom=bottom, left=left, right=right, rows_top=top // step, rows_left=left // step,
        tiles_x=tiles_x, tiles_y=tiles_y, origin=axis.origins[0], n_blocks=form.blocks, reflect=conv.reflect,
    )  # fmt: skip
    return Launch(
        args,
        kernel,
        grid=batch * tiles_y * tiles_x * form.blocks,
        threads=threads,
        shared_bytes=max(read, 4 * sums),  # the sums replace what was read
        macs=tile.rows * tile.width * form.fragments * 16 * 8,
        read_bytes=read,
    )


def picture_forward(
    conv: Conv,
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    stores: tuple[Store, ...],
    tile: PictureTile,
    *,
    size: tuple[int, int],
    rect: tuple[int, int, int, int] | None = None,
    merge: Merge | None = None,
    overlap: bool = False,
) -> None:
    """One step, with the arguments of :func:`.conv.conv_forward`, on the current stream of the source's GPU.

    Args:
        weight: :func:`pack`, in the dtype of `source`.

    Raises:
        ValueError: an argument is not what the kernels need.
        RuntimeError: the driver rejects the kernel.
    """
    if is_recording():  # nothing to compile
        return
    batch, in_h, in_w, _ = source.shape
    rect = (0, size[0], 0, size[1]) if rect is None else rect
    launch = describe_launch(conv, batch, (in_h, in_w), size, rect, tile)
    _check_operands(conv, source, weight, bias, stores, merge, size, rect)
    args, dtype = launch.args, source.dtype
    args.source, args.weights, args.bias = source.data_ptr(), weight.data_ptr(), bias.data_ptr()
    args.stride_x = source.stride(2)
    set_stores(args, stores)
    if merge is not None:
        args.image, args.mask, args.raw, args.merged = (t.data_ptr() for t in merge[:4])
        args.planar = merge.last
    if launch.grid == 0:
        return
    with device_guard(source):
        kernel = Kernel(
            "picture_conv",
            launch.kernel.format(str(dtype).removeprefix("torch.")),
            threads=launch.threads,
            shared_bytes=launch.shared_bytes,
            overlap=overlap,
        )
        kernel.launch(launch.grid, [ctypes.c_void_p(ctypes.addressof(args))])


def _check_operands(
    conv: Conv,
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    stores: tuple[Store, ...],
    merge: Merge | None,
    size: tuple[int, int],
    rect: tuple[int, int, int, int],
) -> None:
    dtype = source.dtype
    if dtype not in DTYPES:
        raise ValueError(f"source: expected float16 or bfloat16, got {dtype}")
    check_view("source", source, dtype, conv.in_channels, 8 if conv.merges else 4)
    form = _form(conv)
    assert form is not None  # `describe_launch` has refused other steps
    packed = form.blocks * form.fragments * _FRAGMENT_BYTES // 2
    ready = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    if weight.dtype != dtype or tuple(weight.shape) != (packed,) or not ready:
        raise ValueError(f"weight: expected pack(conv, weight) in {dtype}, got {tuple(weight.shape)} {weight.dtype}")
    check_bias(bias, conv.out_channels)
    batch = source.shape[0]
    if len(stores) > 2:
        raise ValueError(f"stores: expected one or two, got {len(stores)}")
    for store in stores:
        check_view("stores", store.view, dtype, conv.out_channels)
        if tuple(store.view.shape[:3]) != (batch, *size):
            raise ValueError(f"stores: expected {(batch, *size)} pixels, got {tuple(store.view.shape[:3])}")
    if not (0 <= rect[0] <= rect[1] <= size[0] and 0 <= rect[2] <= rect[3] <= size[1]):
        raise ValueError(f"rect: expected (top, bottom, left, right) inside {size}, got {rect}")
    if conv.merges != (merge is not None) or conv.merges == bool(stores):
        raise ValueError("merge: expected for a step that ends a stage, and stores for any other")
    if merge is None:
        return
    shapes = {"image": (batch, 3, *size), "mask": (batch, 1, *size), "raw": (batch, 3, *size)}
    shapes["merged"] = shapes["image"] if merge.last else (batch, *size, PICTURE_CHANNELS)
    for name, shape in shapes.items():
        tensor = getattr(merge, name)
        expected = dtype if name == "merged" and not merge.last else torch.float32
        ready = tensor.is_contiguous() and tensor.data_ptr() % 4 == 0
        if tuple(tensor.shape) != shape or tensor.dtype != expected or not ready:
            raise ValueError(
                f"merge.{name}: expected {shape} {expected}, contiguous, got {tuple(tensor.shape)} {tensor.dtype}"
            )


# -- use ----------------------------------------------------------------------------------------------------------


def tiles(conv: Conv) -> list[PictureTile]:
    """Every tile worth measuring for a step, whatever its size."""
    form = _form(conv)
    if form is None:
        return []
    if not form.to_picture:
        return [PictureTile(rows, SPAN) for rows in (4, 8, 16)]
    most, widths = _TO[conv.in_channels, form.taps, form.axis.patch]
    rows = [n for n in (1, 2, 3, 4, 5, 6, 8, 10) if _WARP * n * form.parts <= most]
    return [PictureTile(n, width) for width in widths for n in rows if n * form.parts >= 4]  # a warp a scheduler


def candidates(conv: Conv, dtype: torch.dtype, device: torch.device) -> list[PictureTile]:
    """Tiles worth measuring for a step; none where the kernels cannot compute it or may not be used on `device`."""
    if unsupported(conv) is not None or reason_against(device, dtype) is not None:
        return []
    limit = SHARED_LIMITS[device_generation(device)[0]]
    return [tile for tile in tiles(conv) if _shared_bytes(conv, tile) <= limit]


def cost(launch: Launch, card: Card) -> Cost:
    """Estimated seconds of a launch by its parts. Products are of single warps; a block waits for what it reads."""
    rate = _WARP_RATES.get(card.generation, 0.8) * card.macs / card.num_sms
    share = INGRESS_ALONE * card.l2 / card.num_sms
    waves = -(-launch.grid // card.num_sms)
    products, reads = waves * launch.macs / rate, waves * launch.read_bytes / share
    return Cost(
        start=LAUNCH_SECONDS + FILL_SECONDS,
        products=products,
        reads=reads,
        issue=0.0,
        together=max(products, reads),
        memory=0.0,
        splits=0.0,
        l2_bytes=float(launch.grid * launch.read_bytes),
    )


@functools.lru_cache(maxsize=4096)
def pick_tile(
    conv: Conv,
    batch: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    rect: tuple[int, int, int, int],
    card: Card,
) -> tuple[PictureTile, Launch]:
    """The tile of least estimated time for outputs `rect` of a step, and its launch.

    Raises:
        ValueError: the kernels cannot compute the step.
    """
    launches = {tile: describe_launch(conv, batch, in_size, out_size, rect, tile) for tile in tiles(conv)}
    fitting = {tile: launch for tile, launch in launches.items() if launch.shared_bytes <= card.shared_limit}
    if not fitting:
        raise ValueError(f"conv: {unsupported(conv)}")
    return min(fitting.items(), key=lambda item: cost(item[1], card).seconds)


def _shared_bytes(conv: Conv, tile: PictureTile) -> int:
    return describe_launch(conv, 1, (64, 64), (64, 64), (0, 0, 0, 0), tile).shared_bytes


def runs_on(device: torch.device) -> bool:
    """Whether a device is a GPU that the kernels were compiled for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def usable(tile: PictureTile, conv: Conv, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tile that was measured for a product can compute another step with that product."""
    return tile in tiles(conv) and reason_against(device, dtype) is None


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels are not used on a GPU in `dtype`, or None. The first call per GPU runs and checks them."""
    return _first_use.reason_against(device, dtype)


_CHECKED = (
    Conv(4, 64, 7, 1, 3, False, True, False),
    Conv(4, 64, 4, 2, 1, False, False, False),
    Conv(64, 3, 7, 1, 3, False, True, True),
    Conv(128, 3, 4, 2, 1, True, False, True),
)
_CHECKED_SIZE = (2, 22, 70)  # of inputs: batch, height, width


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare every kind of step with PyTorch in float64, for every tile that fits the GPU."""
    limit = SHARED_LIMITS[device_generation(device)[0]]
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(9)
        for conv in _CHECKED:
            trial = _Trial(conv, _CHECKED_SIZE, dtype, device, generator)
            for tile in tiles(conv):
                if _shared_bytes(conv, tile) > limit:
                    continue
                error = trial.error(tile)
                if not error < LIMIT * torch.finfo(dtype).eps:
                    return f"relative error {error:.1e} in {conv} with {tile}"
    return None


class _Trial:
    """A step on noise, of which all that it stores is compared with PyTorch in float64."""

    def __init__(
        self,
        conv: Conv,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)

        batch, height, width = shape
        self.conv, self.dtype = conv, dtype
        source = noise(batch, height, width, conv.in_channels)
        first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
        weight = noise(first, second, conv.kernel, conv.kernel) / (conv.in_channels * conv.kernel**2) ** 0.5
        bias = noise(conv.out_channels).float()
        self.operands = conv, source, pack(conv, weight).contiguous(), bias
        self.exact = exact_convolution(conv, source, weight, bias)
        self.size = self.exact.shape[1], self.exact.shape[2]
        self.image, self.mask = noise(batch, 3, *self.size).float(), noise(batch, 1, *self.size).float()

    def error(self, tile: PictureTile) -> float:
        """The largest error (RMS, relative to the result) of what a run everywhere and one in a rectangle store.

        Infinite where one writes outside its rectangle or channels.
        """
        height, width = self.size
        run = self._merged if self.conv.merges else self._stored
        return max(run(tile, rect) for rect in ((0, height, 0, width), (3, height - 2, 5, width - 1)))

    def _stored(self, tile: PictureTile, rect: tuple[int, int, int, int]) -> float:
        channels = self.conv.out_channels
        one = torch.full(self.exact.shape, 7, dtype=self.dtype, device=self.exact.device)
        wide = torch.cat((one, one), -1)
        stores = Store(one, "relu"), Store(wide[..., channels:], "leaky_relu")
        picture_forward(*self.operands, stores, tile, size=self.size, rect=rect)
        leaky = torch.where(self.exact < 0, 0.2 * self.exact, self.exact)
        found = ((one, self.exact.relu()), (wide[..., channels:], leaky))
        kept = bool((wide[..., :channels] == 7).all())
        return max(_error_inside(actual, exact, rect) for actual, exact in found) if kept else math.inf

    def _merged(self, tile: PictureTile, rect: tuple[int, int, int, int]) -> float:
        value = self.exact.permute(0, 3, 1, 2).tanh()
        expected = self.image * (1 - self.mask.double()) + value * self.mask
        errors = []
        for last in (False, True):
            raw, planar = torch.full_like(self.image, 7), torch.full_like(self.image, 7)
            buffer = torch.full((*self.exact.shape[:3], PICTURE_CHANNELS), 7, dtype=self.dtype, device=raw.device)
            merge = Merge(self.image, self.mask, raw, planar if last else buffer, last)
            picture_forward(*self.operands, (), tile, size=self.size, rect=rect, merge=merge)
            merged = planar.permute(0, 2, 3, 1) if last else buffer[..., :3]
            for actual, exact in ((raw.permute(0, 2, 3, 1), value), (merged, expected)):
                errors.append(_error_inside(actual, exact.permute(0, 2, 3, 1), rect))
            errors.append(0.0 if last or bool((buffer[..., 3] == 7).all()) else math.inf)
        return max(errors)


def _error_inside(actual: Tensor, exact: Tensor, rect: tuple[int, int, int, int]) -> float:
    """RMS of the error in a rectangle of [B, H, W, C], relative to the result; infinite for NaN, or not 7 outside."""
    top, bottom, left, right = rect
    inside = slice(None), slice(top, bottom), slice(left, right)
    outside = actual.clone()
    outside[inside] = 7
    if not bool((outside == 7).all()):
        return math.inf
    error = float((actual[inside].double() - exact[inside]).norm() / exact[inside].norm())
    return math.inf if math.isnan(error) else error


_first_use = FirstUse(
    "the convolutions from and to the picture",
    lambda capability: capability >= CAPABILITY,
    "compute capability 8.0 or newer",
    _check,
)
