"""Attention for Hopper without a GPU: the kernel on the CPU (tests/emulator/), machine code, estimate and errors."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import hopper_attention
from lgnet_fast.kernels.cards import CARDS
from lgnet_fast.kernels.hopper_attention import CHANNELS, AttentionTile, Shape, keys_of_tile, ranked, weigh

from tests import emulator
from tests.compiled_kernels import (
    disassembler,
    emulate_fault,
    fields_in_cpp,
    fields_in_python,
    hopper_gpu,
    instructions,
)

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "hopper_attention.cu"
CPU = torch.device("cpu")
emulated = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))


@pytest.fixture
def kernel(monkeypatch):
    """The launcher starts kernels on the emulator. Returns the class, whose `launched` has the kernels' names."""
    return emulator.install(monkeypatch, hopper_attention)


def noise(*shape, dtype=torch.float16, factor=1.0, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (made * factor).to(dtype)


def operands(batch, positions, channels, dtype=torch.float16, scale=2.0):
    """q, k, v, rest. scale: standard deviation of the scores."""
    size = batch, positions, channels
    q, k = noise(*size, dtype=dtype, factor=scale), noise(*size, dtype=dtype, factor=channels**-0.5, seed=1)
    return q, k, noise(*size, dtype=dtype, seed=2), noise(*size, dtype=torch.float32, seed=3)


def exact(q, k, v, rest, scale=1.0):
    """[B, N, C] in float64; scale: of the scores, to base e."""
    return (scale * (q.double() @ k.double().transpose(1, 2))).softmax(2) @ v.double() + rest.double()


def error_of(found, expected):
    return float((found.double() - expected).norm() / expected.norm() / torch.finfo(found.dtype).eps)


@emulated
@pytest.mark.parametrize(
    ("channels", "tile", "batch", "size", "dtype"),
    [
        (128, AttentionTile(64, 1), 1, (4, 64), torch.float16),
        (128, AttentionTile(64, 2), 2, (8, 70), torch.bfloat16),
        (128, AttentionTile(128, 1), 3, (3, 40), torch.float16),
        (128, AttentionTile(128, 3), 1, (16, 33), torch.float16),
        (128, AttentionTile(128, 8), 1, (32, 33), torch.bfloat16),
        (256, AttentionTile(64, 3), 1, (16, 25), torch.float16),
        (256, AttentionTile(128, 2), 2, (9, 17), torch.bfloat16),
        (512, AttentionTile(64, 4), 1, (16, 17), torch.float16),
        (512, AttentionTile(128, 6), 1, (11, 18), torch.bfloat16),
    ],
)
def test_it_computes_attention(kernel, channels, tile, batch, size, dtype):
    """In every order of events, into a view of a wider map; numbers of positions that fill no tile."""
    given = operands(batch, math.prod(size), channels, dtype)
    results = []
    for kernel.seed in (0, 1, 6):
        wide = torch.full((batch, *size, channels + 64), float("nan"), dtype=dtype)
        out = wide[..., 64:].permute(0, 3, 1, 2)
        weigh(*given, out, tile, scale=math.log2(math.e))
        assert torch.isnan(wide[..., :64]).all()
        results.append(wide[..., 64:].reshape(given[0].shape))
    assert error_of(results[0], exact(*given)) < 0.4
    assert all(torch.equal(results[0], other) for other in results[1:])
    name = f"lgnet_attention_{str(dtype).removeprefix('torch.')}_{channels}_{tile.queries}"
    assert set(kernel.launched) == {name}


@emulated
@pytest.mark.parametrize("tile", [AttentionTile(64, 2), AttentionTile(128, 3)])
def test_a_band_of_rows(kernel, tile):
    """Other rows stay as they are; the bits are those of the whole run where the tiles begin at the same queries."""
    given = operands(2, 16 * 32, 256)
    whole, some = (torch.full((2, 16, 32, 256), 9.0, dtype=torch.float16) for _ in range(2))
    weigh(*given, whole.permute(0, 3, 1, 2), tile, scale=1.0)
    weigh(*given, some.permute(0, 3, 1, 2), tile, scale=1.0, queries=(4 * 32, 5 * 32))
    assert torch.equal(some[:, 4:9], whole[:, 4:9])
    assert (some[:, :4] == 9).all()
    assert (some[:, 9:] == 9).all()


@emulated
@pytest.mark.parametrize(("tile", "positions"), [(AttentionTile(64, 1), 64 * 13), (AttentionTile(64, 2), 64 * 19)])
def test_warpgroups_that_take_many_tiles_in_turns(kernel, tile, positions):
    """One must not take a stage's earlier tile for its own, in whatever order copies end."""
    given = operands(1, positions, 128)
    expected = exact(*given)[:, :64]
    for kernel.seed in (0, 1, 6, 7, 14, 15, 22, 23):
        out = torch.empty(1, positions // 8, 8, 128, dtype=torch.float16)
        weigh(*given, out.permute(0, 3, 1, 2), tile, scale=math.log2(math.e), queries=(0, 64))
        assert error_of(out.reshape(given[0].shape)[:, :64], expected) < 0.4


@emulated
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations(kernel, activation):
    given = operands(1, 128, 128)
    out = torch.empty(1, 8, 16, 128, dtype=torch.float16)
    weigh(*given, out.permute(0, 3, 1, 2), AttentionTile(128, 1), scale=1.0, activation=activation)
    expected = exact(*given, scale=math.log(2)).reshape(out.shape)
    expected = expected.relu() if activation == "relu" else torch.nn.functional.leaky_relu(expected, 0.2)
    assert error_of(out, expected) < 0.4


@emulated
@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("tile", [AttentionTile(64, 2), AttentionTile(128, 4)])
def test_large_scores(kernel, tile, rising):
    """Scores up to 3e4 that rise or fall along the keys: sums are rescaled in every tile, or in the first alone."""
    positions = 128 * 8
    q, k, v, rest = operands(1, positions, 128, scale=16.0)
    level = torch.linspace(0, 40, positions).to(k.dtype)
    q[..., 0], k[..., 0] = 16.0, level if rising else level.flip(0)
    out = torch.empty(1, 32, 32, 128, dtype=torch.float16)
    weigh(64 * q, k, v, rest, out.permute(0, 3, 1, 2), tile, scale=math.log2(math.e))
    assert error_of(out.reshape(q.shape), exact(64 * q, k, v, rest)) < 0.4


@emulated
def test_nan_and_infinity_reach_the_rows_that_read_them(kernel):
    """As in PyTorch: from a query its row alone, from a key those that it reaches, none of another sample."""
    for name, row in (("q", 5), ("k", 300), ("v", 300), ("rest", 7)):
        for value in (math.nan, math.inf):
            given = dict(zip(("q", "k", "v", "rest"), operands(2, 512, 128)))
            given[name][1, row, 3] = value
            out = torch.empty(2, 16, 32, 128, dtype=torch.float16)
            weigh(*given.values(), out.permute(0, 3, 1, 2), AttentionTile(64, 2), scale=1.0)
            found, expected = out.reshape(given["q"].shape), exact(*given.values(), scale=math.log(2))
            finite = expected.isfinite()
            assert torch.equal(found.isfinite(), finite), (name, value)
            assert finite[0].all()
            assert not finite[1].all()
            assert error_of(found[finite], expected[finite]) < 0.4


@emulated
def test_attention_of_one_key(kernel):
    """Where one score is far above the others, the result is that key's value, whichever tile and lane it is in."""
    _, _, v, rest = operands(1, 528, 128)
    one = torch.zeros(1, 528, 128, dtype=torch.float16)
    q, k = one.clone(), one.clone()
    chosen = torch.randperm(528, generator=torch.Generator().manual_seed(0))
    bits = 2 * ((torch.arange(528)[:, None] >> torch.arange(10)) % 2) - 1  # each number has a code of its own
    k[0, :, :10], q[0, :, :10] = bits.half(), 8 * bits[chosen].half()
    for tile in (AttentionTile(64, 2), AttentionTile(128, 1), AttentionTile(128, 5)):
        out = torch.empty(1, 16, 33, 128, dtype=torch.float16)
        weigh(q, k, v, 0 * rest, out.permute(0, 3, 1, 2), tile, scale=4.0)
        assert (out.reshape(v.shape) - v[:, chosen]).abs().max() < 1e-3


@emulated
def test_the_check_at_first_use(kernel, monkeypatch):
    """It runs every kernel in clusters of every supported size, and finds a wrong result."""
    error, sizes = hopper_attention._error, []

    def smaller(channels, size, tile, dtype, device):
        sizes.append((channels, size, tile))
        batch, height, width = size
        assert Shape.of(channels, height * width, height * width, batch, tile).grid > 0
        return error(
            channels, (1, 4, -(-keys_of_tile(channels, tile.queries) * tile.cluster // 2)), tile, dtype, device
        )

    monkeypatch.setattr(hopper_attention, "_error", smaller)
    assert hopper_attention._check(CPU, torch.float16) is None
    assert len(sizes) == 3 * 2 * 6
    assert set(kernel.launched) == {f"lgnet_attention_float16_{c}_{q}" for c in CHANNELS for q in (64, 128)}
    monkeypatch.setattr(hopper_attention, "_error", lambda *case: math.nan)
    assert hopper_attention._check(CPU, torch.float16).startswith("relative error nan of 128 channels with")
    assert "NVIDIA GPU" in hopper_attention.reason_against(CPU, torch.float16)


@emulated
@pytest.mark.slow(reason="compiles the kernel for each fault")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("barrier_wait(memory.empty(ring.stage), ring.parity);", ""),  # a tile that is still read is replaced
        ("meet<1, kThreads>();  // the sums replace what both have read", ""),
        ("barrier_wait(memory.keys_full(ring.stage), ring.parity);", ""),
        ("if (args.cluster > 1) cluster_meet();  // a block must not end while others read its sums", ""),
    ],
)
def test_emulator_finds_races(kernel, tmp_path, monkeypatch, right, wrong):
    emulate_fault(tmp_path, monkeypatch, SOURCE.name, right, wrong)
    problems = []
    # the second: one warpgroup has two tiles of keys, the other one
    cases = ((1, 32, 40), AttentionTile(128, 2)), ((1, 16, 24), AttentionTile(64, 1))
    for kernel.seed, (size, tile) in itertools.product(range(6), cases):
        try:
            problems.append(not hopper_attention._error(128, size, tile, torch.float16, CPU) < 1e-3)
        except RuntimeError:
            problems.append(True)
    assert any(problems)


# -- estimate and launcher ----------------------------------------------------------------------------------------


def test_the_estimate():
    """Fewer queries take less time; more samples more; a split of the keys pays where blocks are few."""
    h100 = CARDS["H100"]
    for channels, positions in ((128, 4096), (256, 1024), (512, 256)):
        alone, band, many = (
            ranked(channels, positions, queries, batch, h100)[0][1].seconds
            for queries, batch in ((positions, 1), (positions // 4, 1), (positions, 16))
        )
        assert band <= alone < many < 16 * alone
    (tile, cost), *_ = ranked(128, 4096, 4096, 1, h100)
    assert tile.cluster > 1
    assert Shape.of(128, 4096, 4096, 1, tile).grid <= h100.num_sms
    # the products of a multiprocessor, of which as many as blocks take part
    macs = 2 * 4096**2 * 128 / Shape.of(128, 4096, 4096, 1, tile).grid
    assert 1 <= cost.products / (macs / 2048 / 1.755e9) < 1.2
    assert ranked(128, 4096, 4096, 16, h100)[0][0].cluster == 1
    assert ranked(96, 4096, 4096, 1, h100) == ()
    assert ranked(128, 100, 100, 1, h100) != ()
    assert ranked(128, 4096, 4096, 1, h100._replace(num_sms=66))[0][1].seconds > 1.2 * cost.seconds


@pytest.mark.parametrize("channels", CHANNELS)
def test_shapes_fit_and_every_warpgroup_has_a_tile(channels):
    for positions, tile in itertools.product((1, 33, 256, 4096, 16384), hopper_attention.CANDIDATES):
        if -(-positions // keys_of_tile(channels, tile.queries)) // tile.cluster < 128 // tile.queries:
            with pytest.raises(ValueError, match="leaves a warpgroup none"):
                Shape.of(channels, positions, positions, 1, tile)
            continue
        shape = Shape.of(channels, positions, positions, 1, tile)
        assert shape.shared_bytes <= hopper_attention.SHARED_LIMIT
        assert shape.query_bytes + shape.stages * shape.stage_bytes >= hopper_attention._RESULT_BYTES
        tiles = [
            (rank + 1) * shape.key_tiles // tile.cluster - rank * shape.key_tiles // tile.cluster
            for rank in range(tile.cluster)
        ]
        assert sum(tiles) == shape.key_tiles
        assert shape.stages % shape.parts == 0
        assert min(tiles) >= shape.parts
        rows = max(
            (r + 1) * tile.queries // tile.cluster - r * tile.queries // tile.cluster for r in range(tile.cluster)
        )
        assert rows * tile.cluster * shape.parts <= hopper_attention._MOST_PARTS


def test_structure_and_constants_are_the_kernel_s():
    assert fields_in_cpp(SOURCE, "Args") == [
        (name, count, {"c_float": "float"}.get(kind, kind))
        for name, count, kind in fields_in_python(hopper_attention.Args)
    ]
    text = SOURCE.read_text()
    for name, value in (
        ("kColumns", hopper_attention.COLUMNS),
        ("kMaxStages", hopper_attention.MAX_STAGES),
        ("kMostParts", hopper_attention._MOST_PARTS),
        ("kRows", hopper_attention._ROWS),
        ("kGroups", hopper_attention._GROUPS),
    ):
        assert int(re.search(rf"constexpr int {name} = (\d+);", text)[1]) == value
    keys = re.search(r"kKeys = CHANNELS == 128 \? QUERIES : (\d+) / CHANNELS;", text)
    assert [int(keys[1]) // channels for channels in (256, 512)] == [keys_of_tile(c, 64) for c in (256, 512)]
    assert [keys_of_tile(128, queries) for queries in (64, 128)] == [64, 128]
    assert int(re.search(r"constexpr int kThreads = (\d+);", text)[1]) + 32 == hopper_attention.THREADS


def test_launcher_names_the_argument():
    q, k, v, rest = operands(1, 512, 128)
    out = torch.empty(1, 16, 32, 128, dtype=torch.float16).permute(0, 3, 1, 2)
    tile = AttentionTile(128, 2)
    for arguments, said in (
        ((q.float(), k, v, rest, out), "q: expected float16 or bfloat16"),
        ((q, k[:, :4], v, rest, out), r"k: expected \(1, 512, 128\) torch.float16"),
        ((q, k, v.bfloat16(), rest, out), "v: expected"),
        ((q, k, v.transpose(1, 2).contiguous().transpose(1, 2), rest, out), "v: expected"),
        ((q, k, v, rest.half(), out), r"rest: expected \(1, 512, 128\) torch.float32"),
        ((q, k, v, rest, out.float()), r"out: expected \[1, 128, H, W\] of 512 positions in torch.float16"),
        ((q, k, v, rest, out[..., :16]), "out: expected"),
        ((q, k, v, rest, out.contiguous()), "out: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            weigh(*arguments, tile, scale=1.0)
    with pytest.raises(ValueError, match="^scale: expected more than 0, got -1"):
        weigh(q, k, v, rest, out, tile, scale=-1.0)
    for wrong, said in (
        (AttentionTile(96, 1), r"^tile: expected \(64, 128\) queries"),
        (AttentionTile(64, 9), "^tile: expected"),
        (AttentionTile(64, 6), "leaves a warpgroup none of 8 tiles"),
    ):
        with pytest.raises(ValueError, match=said):
            weigh(q, k, v, rest, out, wrong, scale=1.0)
    for queries in ((-1, 4), (0, 0), (500, 13)):
        with pytest.raises(ValueError, match="^queries: expected"):
            weigh(q, k, v, rest, out, tile, scale=1.0, queries=queries)
    with pytest.raises(ValueError, match=r"^channels: expected one of \(128, 256, 512\), got 192"):
        Shape.of(192, 512, 512, 1, tile)


def test_maps_that_it_can_store():
    wide = torch.empty(2, 8, 8, 256, dtype=torch.float16)
    assert hopper_attention.can_store(wide[..., 128:].permute(0, 3, 1, 2))
    assert not hopper_attention.can_store(wide[..., 4:132].permute(0, 3, 1, 2))
    assert not hopper_attention.can_store(wide[:, :, :7, :128].permute(0, 3, 1, 2))
    assert not hopper_attention.can_store(wide[..., :128].permute(0, 3, 1, 2).contiguous())


@emulated
def test_candidates(kernel, monkeypatch):
    """Those that the GPU holds; none where the kernel is not used."""
    monkeypatch.setattr(hopper_attention, "reason_against", lambda device, dtype: None)
    arguments = 128, 4096, 1, torch.float16, CPU, CARDS["H100"]
    assert hopper_attention.candidates(*arguments) == [tile for tile, _ in ranked(128, 4096, 4096, 1, CARDS["H100"])]

    def blocks_at_once(own):
        if own.options["cluster"] == 6:
            raise RuntimeError("invalid cluster")
        return 0 if own.options["cluster"] == 8 else 120

    monkeypatch.setattr(kernel, "blocks_at_once", blocks_at_once)
    hopper_attention._can_run.cache_clear()
    assert {tile.cluster for tile in hopper_attention.candidates(*arguments)} == {1, 2, 3, 4}
    few = 128, 4096, 512, 1, torch.float16, CPU, CARDS["H100"]
    assert ranked(128, 4096, 512, 1, CARDS["H100"])[0][0].cluster == 8
    assert hopper_attention.best_tile(*few).cluster <= 4
    hopper_attention._can_run.cache_clear()
    assert hopper_attention.candidates(96, *arguments[1:]) == []
    monkeypatch.setattr(hopper_attention, "reason_against", lambda device, dtype: "another GPU")
    assert hopper_attention.candidates(*arguments) == []


@pytest.mark.gpu
@hopper_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_tile_on_a_gpu(channels, dtype):
    device = torch.device("cuda")
    tiles = hopper_attention.candidates(channels, 4096, 1, dtype, device, CARDS["H100"])
    assert tiles
    for tile in tiles:
        error = hopper_attention._error(channels, (2, 64, 64), tile, dtype, device)
        assert error < 2 * torch.finfo(dtype).eps, tile


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm here")
def test_machine_code():
    """Both products of a tile are in flight with one wait each, loads by the copy engine, nothing in local memory."""
    kernels = instructions("hopper_attention", "sm_90a")
    assert set(kernels) == {
        f"lgnet_attention_{kind}_{channels}_{queries}"
        for kind, channels, queries in itertools.product(("float16", "bfloat16"), CHANNELS, (64, 128))
    }
    for name, body in kernels.items():
        channels, queries = map(int, name.split("_")[3:])
        keys = keys_of_tile(channels, queries)
        order = re.findall(r"(HGMMA\.64x\d+x16)\.F32|(DEPBAR\.LE gsb0)", body)
        runs = [(kind, len(list(run))) for kind, run in itertools.groupby(one or other for one, other in order)]
        scores = [(f"HGMMA.64x{keys}x16", channels // 16), ("DEPBAR.LE gsb0", 1)]
        values = [("HGMMA.64x128x16", keys // 16), ("DEPBAR.LE gsb0", 1)]
        assert runs == scores + values, f"{name}: serialised products: {runs}"
        # P is converted before the fence, whose products read it from registers
        (fence,) = re.findall(r"WARPGROUP\.ARRIVE((?:(?!WARPGROUP).)*?)HGMMA\.\S+ R\d+, R\d+", body, re.S)
        assert "F2FP" not in fence, name
        for opcode in ("UTMALDG.4D", "STG.E.128", "MUFU.EX2", "VOTE.ANY"):
            assert opcode in body, (name, opcode)
        assert body.count("MUFU.EX2") < keys / 2 + 12
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: spills"
