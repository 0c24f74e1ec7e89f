"""The convolution for Hopper without a GPU: a model of its index maps, its machine code, its launcher's errors.

The model takes the arguments that the launcher gives to the kernel and emulates the documented hardware: boxes of the
tensor memory accelerator, the swizzle, filling of reflected borders, wgmma's matrix descriptors, the accumulator's
layout, and the stores. It uses integers, so that sums are exact in any order.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lgnet_fast.kernels import hopper
from lgnet_fast.kernels.conv import Conv, Store
from lgnet_fast.kernels.hopper import HopperTile

from tests.cubins import build

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "hopper_conv.cu"
BLOCK = Conv(256, 256, 3, 1, 1, False, True, False)
"""NetL's block convolution."""
TILE = HopperTile(16, 4)


# -- the model ----------------------------------------------------------------------------------------------------


def swizzled(address):
    """128-byte swizzle: bits 4 to 6 exclusive-or bits 7 to 9."""
    return address ^ ((address >> 7 & 7) << 4)


def load_box(memory, address, lines):
    """Write like the TMA: lines [n, 64] of two bytes per element, one after another."""
    at = swizzled(address + 128 * np.arange(len(lines))[:, None] + 2 * np.arange(64)[None, :])
    memory[at // 2] = lines


def box_of(source, sample, x, y, width, height):
    """[height * width, 64] pixels, zeros outside the map."""
    _, in_h, in_w, _ = source.shape
    ys, xs = np.arange(y, y + height), np.arange(x, x + width)
    inside = ((ys >= 0) & (ys < in_h))[:, None] & ((xs >= 0) & (xs < in_w))[None, :]
    pixels = source[sample, ys.clip(0, in_h - 1)[:, None], xs.clip(0, in_w - 1)[None, :]]
    return np.where(inside[..., None], pixels, 0).reshape(-1, source.shape[3])


def reflected(i, size):
    return -i if i < 0 else 2 * (size - 1) - i if i >= size else i


def mend(memory, box, args, y0, x0):
    """`mend` of the kernel."""

    def copy(to, frm):
        for part in range(8):
            a, b = box + to * 128 + ((part ^ to & 7) << 4), box + frm * 128 + ((part ^ frm & 7) << 4)
            memory[a // 2 : a // 2 + 8] = memory[b // 2 : b // 2 + 8]

    for row in (-1 - y0, args.in_h - y0):
        if 0 <= row < args.box_rows:
            for x in range(args.pitch):
                to = reflected(x0 + x, args.in_w) - x0
                if 0 <= to < args.pitch:
                    copy(row * args.pitch + x, (reflected(y0 + row, args.in_h) - y0) * args.pitch + to)
    for column in (-1 - x0, args.in_w - x0):
        if 0 <= column < args.pitch:
            frm = reflected(x0 + column, args.in_w) - x0
            if 0 <= frm < args.pitch:
                for y in range(args.box_rows):
                    if 0 <= y0 + y < args.in_h:
                        copy(y * args.pitch + column, y * args.pitch + frm)


def run_block(block, launch, tile, source, weight, out):
    """One block of the kernel; adds nothing but the product. `out` [B, H, W, C] starts as NaN."""
    args = launch.args
    tile_index, rest = block % args.m_tiles, block // args.m_tiles
    column, phase = rest % args.n_blocks * 64, args.phases - 1 - rest // args.n_blocks
    phase_y, phase_x = phase >> 1, phase & 1
    place_x = args.rows_left + tile_index % args.tiles_x * 8
    place_y = args.rows_top + tile_index // args.tiles_x % args.tiles_y * tile.tile_h
    sample = tile_index // (args.tiles_x * args.tiles_y)
    y0, x0 = place_y + args.origin_y[phase_y], place_x + args.origin_x[phase_x]
    mending = args.reflect and (y0 < 0 or x0 < 0 or y0 + args.box_rows > args.in_h or x0 + args.pitch > args.in_w)
    taps_x = args.taps[phase_x]
    before = phase_y * args.taps[0] * (args.taps[0] + args.taps[1]) + phase_x * args.taps[phase_y] * args.taps[0]
    pixels = 8 * tile.tile_h
    memory = np.full(hopper.SHARED_LIMIT // 2, np.nan, np.float32)
    stage_address, patch_address = 0, args.weight_stages * 8192
    assert patch_address + args.patch_stages * args.patch_bytes + 1024 == launch.shared_bytes
    total = np.zeros((64, pixels), np.float32)
    depth, n, m = np.arange(64), np.arange(pixels), np.arange(64)
    step = 0
    for chunk in range(args.chunks):
        patch = patch_address + chunk % args.patch_stages * args.patch_bytes
        channels = slice(64 * chunk, 64 * chunk + 64)
        lines = box_of(source[..., channels], sample, x0, y0, *launch.box)
        assert 2 * lines.size == args.box_rows * args.pitch * 128 <= args.patch_bytes
        load_box(memory, patch, lines)
        if mending:
            mend(memory, patch, args, y0, x0)
        for y in range(args.count_y[phase_y]):
            for x in range(args.count_x[phase_x]):
                stage = stage_address + step % args.weight_stages * 8192
                step += 1
                tap = before + (args.first_y[phase_y] + y) * taps_x + args.first_x[phase_x] + x
                part = 64 // launch.cluster
                for rank in range(launch.cluster):
                    row = (tap * args.chunks + chunk) * 64 + rank * part
                    load_box(memory, stage + rank * part * 128, weight[row : row + part, column : column + 64])
                start = patch + y * args.pitch * 128 + x * 128
                # depth 16 k + i of the k-th product: starts move by 2048 bytes of weights, 32 of pixels
                k, i = depth // 16, depth % 16
                a = stage + k * 2048 + i // 8 * 1024 + i % 8 * 128
                b = start + k * 32 + 2 * i
                weights = memory[swizzled(a[None, :] + 2 * m[:, None]) // 2]
                lines = memory[swizzled(b[None, :] + (n // 8 * args.pitch * 128 + n % 8 * 128)[:, None]) // 2]
                total += weights @ lines.T
    # the accumulator's layout, then [pixel, channel] in shared memory
    rows = np.full((pixels, 64), np.nan, np.float32)
    thread, i = np.arange(128)[:, None], np.arange(pixels // 2)[None, :]
    warp, lane = thread // 32, thread % 32
    registers = total[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2]
    rows[i // 4 * 8 + lane % 4 * 2 + i % 2, warp * 16 + lane // 4 + i // 2 % 2 * 8] = registers
    for pixel in range(pixels):
        y = (place_y + pixel // 8) * args.out_step + phase_y
        x = (place_x + pixel % 8) * args.out_step + phase_x
        if args.top <= y < args.bottom and args.left <= x < args.right:
            assert np.isnan(out[sample, y, x, column : column + 64]).all(), "two blocks store the same pixel"
            out[sample, y, x, column : column + 64] = rows[pixel]


def exact(conv, source, weight):
    """The product by PyTorch, [B, H, W, C]."""
    x = torch.from_numpy(source).permute(0, 3, 1, 2)
    if conv.transposed:
        extra = 1 if conv.kernel == 3 else 0
        y = F.conv_transpose2d(x, weight, None, conv.stride, conv.padding, extra)
    elif conv.reflect:
        y = F.conv2d(F.pad(x, [conv.padding] * 4, mode="reflect"), weight)
    else:
        y = F.conv2d(x, weight, None, 1, conv.padding)
    return y.permute(0, 2, 3, 1).numpy()


def check_model(conv, batch, size, tile, rect=None, blocks_kept=None):
    """Every output of the model (or of some blocks) is the convolution's; nothing outside `rect` is written."""
    rng = np.random.default_rng(0)
    source = rng.integers(-2, 3, (batch, *size, conv.in_channels)).astype(np.float32)
    first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
    weight = torch.from_numpy(rng.integers(-2, 3, (first, second, conv.kernel, conv.kernel)).astype(np.float32))
    expected = exact(conv, source, weight)
    out_size = expected.shape[1:3]
    rect = (0, out_size[0], 0, out_size[1]) if rect is None else rect
    launch = hopper.describe_launch(conv, batch, size, out_size, rect, tile)
    out = np.full(expected.shape, np.nan, np.float32)
    packed = conv.pack(weight).numpy()
    blocks = list(range(launch.grid))
    if blocks_kept is not None and blocks_kept < len(blocks):
        blocks = sorted(rng.choice(launch.grid, blocks_kept, replace=False))
    for block in blocks:
        run_block(block, launch, tile, source, packed, out)
    written = ~np.isnan(out)
    assert np.array_equal(out[written], expected[written])
    if len(blocks) == launch.grid:
        top, bottom, left, right = rect
        inside = np.zeros_like(written)
        inside[:, top:bottom, left:right] = True
        assert np.array_equal(written, inside)
    else:
        assert 0 < written.sum() <= len(blocks) * 64 * 8 * tile.tile_h


def plan_convs():
    """Every step of LGNet that the kernel can compute: (name, Conv, size of its input)."""
    from lgnet_fast import create_model
    from lgnet_fast.engine.build import build_plan, plan_stages
    from lgnet_fast.engine.cuda_weights import conv_of
    from lgnet_fast.engine.plan import ConvStep

    with torch.device("meta"):
        model = create_model("lgnet").eval()
    plan = build_plan(plan_stages(model), 1, 256, 256)
    found = []
    for step in plan.steps:
        if not isinstance(step, ConvStep):
            continue
        conv, buffer = conv_of(step), plan.source(step)
        if hopper.unsupported(conv) is None:
            found.append((step.name, conv, (buffer.height, buffer.width)))
    return found


def test_supported_steps():
    names = [name for name, *_ in plan_convs()]
    blocks = [f"net_l.block{i}.{part}" for i in range(4) for part in ("first", "second")]
    assert [name for name in names if name.startswith("net_l")] == [*blocks, "net_l.up1", "net_l.up2"]
    ups = [f"d{i}" for i in range(8, 1, -1)]
    for net in ("net_c", "net_g"):
        assert [name for name in names if name.startswith(net)] == [f"{net}.{up}" for up in ups]


def test_model_of_every_product_of_the_plan():
    """Distinct steps only (NetL's eight are one), some blocks of each."""
    seen = set()
    for _, conv, size in plan_convs():
        if (conv, size) in seen:
            continue
        seen.add((conv, size))
        check_model(conv, 1, size, HopperTile(16 if size[0] >= 16 else 4, 4, 8, 2), blocks_kept=1)


@pytest.mark.slow(reason="a minute; the test above has some of its blocks")
def test_model_of_every_pixel_of_the_local_network():
    steps = {(conv, size) for name, conv, size in plan_convs() if name.startswith("net_l.block")}
    ((conv, size),) = steps
    check_model(conv, 1, size, HopperTile(16, 4, 8, 2))


@pytest.mark.parametrize("tile_h", hopper.TILE_HEIGHTS)
def test_model_of_tiles(tile_h):
    """Both kinds of step, every border, a batch, stages that are used again."""
    tile = HopperTile(tile_h, 2, 2, 2)
    check_model(Conv(128, 64, 3, 1, 1, False, True, False), 2, (tile_h + 8, 16), tile)
    check_model(Conv(64, 64, 3, 1, 1, False, False, False), 1, (12, 11), tile)
    check_model(Conv(64, 64, 3, 1, 1, False, True, False), 1, (12, 11), tile)
    check_model(Conv(128, 64, 4, 2, 1, True, False, False), 1, (tile_h, 16), tile)
    check_model(Conv(64, 64, 3, 2, 1, True, False, False), 1, (9, 8), tile)


def test_model_of_rectangles():
    conv = Conv(64, 128, 3, 1, 1, False, True, False)
    tile = HopperTile(8, 2, 4, 2)
    for rect in ((0, 7, 0, 5), (3, 20, 9, 22), (19, 24, 1, 24), (23, 24, 23, 24)):
        check_model(conv, 1, (24, 24), tile, rect)
    check_model(Conv(64, 64, 4, 2, 1, True, False, False), 1, (16, 16), tile, (5, 19, 2, 31))


def test_every_block_of_a_cluster_has_the_same_weights():
    for _, conv, size in plan_convs():
        out_size = tuple(conv.axis.out_step * n for n in size)
        launch = hopper.describe_launch(conv, 1, size, out_size, (0, out_size[0], 0, out_size[1]), HopperTile(4, 8))
        assert launch.grid % launch.cluster == 0
        assert launch.args.m_tiles % launch.cluster == 0


def test_netl_fills_the_chip():
    launch = hopper.describe_launch(BLOCK, 1, (64, 64), (64, 64), (0, 64, 0, 64), HopperTile(16, 4))
    assert launch.grid == 128
    assert launch.cluster == 4


# -- the launcher -------------------------------------------------------------------------------------------------


def test_arguments_match_the_kernel():
    """Names and order of `Args`, and the limits, agree in C++ and Python."""
    text = SOURCE.read_text()
    body = re.search(r"struct Args \{(.*?)\};", text, re.S).group(1)
    body = re.sub(r"//[^\n]*", "", body)
    fields = []
    for declaration in body.split(";"):
        words = re.sub(r"^\s*(const )?(float|void|int32_t)\*?", "", declaration.strip())
        for name in words.split(","):
            if name.strip():
                bare, _, length = name.strip().partition("[")
                fields.append((bare, 2 if length else 1, "*" in declaration))
    expected = []
    for name, kind in hopper.Args._fields_:
        expected.append((name, 2 if issubclass(kind, ctypes.Array) else 1, kind is ctypes.c_void_p))
    assert fields == expected
    constants = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    assert int(constants["kChannels"]) == hopper.CHANNELS
    assert int(constants["kThreads"]) == hopper._THREADS
    assert int(constants["kMaxWeightStages"]) == hopper._MAX_WEIGHT_STAGES
    assert int(constants["kMaxPatchStages"]) == hopper._MAX_PATCH_STAGES


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Conv(64, 64, 3, 2, 1, False, False, False), "stride 2"),
        (Conv(64, 3, 4, 2, 1, True, False, True), "ends a stage"),
        (Conv(96, 64, 3, 1, 1, False, False, False), "multiples of 64"),
        (Conv(64, 64, 7, 1, 3, False, True, False), "7x7"),
    ],
)
def test_steps_it_cannot_compute(conv, reason):
    assert reason in hopper.unsupported(conv)
    with pytest.raises(ValueError, match="conv: "):
        hopper.describe_launch(conv, 1, (8, 8), (8, 8), (0, 8, 0, 8), HopperTile(8, 1))


def test_launcher_names_the_argument():
    conv = Conv(64, 64, 3, 1, 1, False, True, False)
    x = torch.zeros(1, 16, 16, 64, dtype=torch.float16)
    weight = torch.zeros(9 * 64, 64, dtype=torch.float16)
    bias = torch.zeros(64)
    store = (Store(torch.zeros_like(x), "relu"),)

    def launch(source=x, weight=weight, bias=bias, stores=store, tile=TILE, residual=None):
        hopper.hopper_forward(conv, source, weight, bias, stores, tile, size=(16, 16), residual=residual)

    wide = torch.zeros(1, 16, 16, 68, dtype=torch.float16)
    with pytest.raises(ValueError, match="^source: expected float16 or bfloat16"):
        launch(source=x.float())
    with pytest.raises(ValueError, match="^source: expected 64 adjacent channels"):
        launch(source=x.permute(0, 1, 3, 2))
    with pytest.raises(ValueError, match="^source: expected pixels at multiples of 16 bytes"):
        launch(source=wide[..., :64])
    with pytest.raises(ValueError, match="^source: expected evenly spaced pixels"):
        launch(source=torch.zeros(1, 16, 24, 64, dtype=torch.float16)[:, :, :16])
    with pytest.raises(ValueError, match="^stores: expected 64 adjacent channels"):
        launch(stores=(Store(x.float(), "none"),))
    with pytest.raises(ValueError, match="^residual: expected 64 adjacent channels"):
        launch(residual=wide)
    with pytest.raises(ValueError, match="^weight: expected Conv.pack"):
        launch(weight=weight.float())
    with pytest.raises(ValueError, match="^bias: expected 64 aligned float32"):
        launch(bias=bias.half())
    with pytest.raises(ValueError, match="^tile: .* bytes of shared memory"):
        hopper.describe_launch(BLOCK, 1, (64, 64), (64, 64), (0, 64, 0, 64), HopperTile(32, 4, 12, 4))
    with pytest.raises(ValueError, match="^conv: clusters of 3"):
        launch(tile=HopperTile(16, 3))


def test_not_used_without_such_a_gpu():
    cpu = torch.device("cpu")
    assert "NVIDIA GPU" in hopper.reason_against(cpu, torch.float16)
    work = BLOCK.work(1, (64, 64), (64, 64), (0, 64, 0, 64))
    assert hopper.candidates(BLOCK, work, torch.float16, cpu) == []
    assert not hopper.usable(TILE, BLOCK, torch.float16, cpu)


def test_candidates_can_be_launched(monkeypatch):
    """Every candidate of every product of the plan fits shared memory; small maps get small tiles only."""
    monkeypatch.setattr(hopper, "reason_against", lambda device, dtype: None)
    for _, conv, size in plan_convs():
        out_size = tuple(conv.axis.out_step * n for n in size)
        whole = (0, out_size[0], 0, out_size[1])
        tiles = hopper.candidates(conv, conv.work(1, size, out_size, whole), torch.float16, torch.device("cpu"))
        heights = {tile.tile_h for tile in tiles}
        assert max(heights) == max(h for h in hopper.TILE_HEIGHTS if h == 4 or 8 * h <= size[0] * size[1])
        for tile in tiles:
            assert hopper.usable(tile, conv, torch.float16, torch.device("cpu"))
            assert hopper.describe_launch(conv, 1, size, out_size, whole, tile).grid > 0
    stride_2 = Conv(64, 64, 3, 2, 1, False, False, False)
    work = stride_2.work(1, (64, 64), (32, 32), (0, 32, 0, 32))
    assert hopper.candidates(stride_2, work, torch.float16, torch.device("cpu")) == []


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != hopper.CAPABILITY,
    reason="no Hopper GPU here",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_candidate_is_right_on_a_gpu(dtype):
    """A reflecting step with a residual and a transposed one, each candidate beside PyTorch in float64."""
    assert hopper.reason_against(torch.device("cuda"), dtype) is None


# -- the machine code ---------------------------------------------------------------------------------------------


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit, or the one that Triton's wheel carries."""
    import triton

    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(carried) if carried.is_file() else None)


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm here")
def test_machine_code():
    """Matrix products on the tensor cores in flight, loads by the copy engine, nothing in local memory."""
    text = subprocess.run(
        [disassembler(), "-c", str(hopper.CUBIN)], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"^\.text\.(lgnet_conv_\w+):$", text, flags=re.M)[1:]
    kernels = dict(zip(functions[::2], functions[1::2]))
    names = {hopper._kernel_name(dtype, HopperTile(h, 1)) for dtype in hopper._TYPES for h in hopper.TILE_HEIGHTS}
    assert set(kernels) == names
    for name, body in kernels.items():
        pixels = 8 * int(name.rpartition("_")[2])
        assert len(re.findall(rf"HGMMA\.64x{pixels}x16\.F32", body)) == 4, name
        assert len(re.findall(r"WARPGROUP\.DEPBAR", body)) == 2, f"{name}: serialised products"
        assert "UTMALDG.4D" in body, name
        assert "UTMALDG.2D.MULTICAST" in body, name
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: spills"
        assert "STG.E.128" in body, name


@pytest.mark.slow(reason="compiles the kernels, which the shipped machine code already shows")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_source_compiles(tmp_path):
    said = build.build("hopper_conv", tmp_path / "conv.cubin")
    spills = re.findall(r"(\d+) bytes spill stores", said)
    assert len(spills) == len(hopper.TILE_HEIGHTS) * len(hopper._TYPES)
    assert set(spills) == {"0"}
