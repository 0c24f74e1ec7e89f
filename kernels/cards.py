"""Facts about the NVIDIA GPUs that the kernels are made for; they are in no other file.

Shared memory: CUDA C++ Programming Guide, technical specifications per compute capability (99, 163, 227 KiB a block).
Rates: those of the H100 are measured. The others are NVIDIA's figures (data sheets and architecture papers; dense, 16
bit with float32 sums) less a fifth, the measured shortfall of an H100. L2 rates of the others are
estimated from the number and clock of the multiprocessors.
"""

from __future__ import annotations

from typing import NamedTuple

GENERATIONS = ("sm_80", "sm_89", "sm_90", "sm_100")
"""Generations that have a table of block shapes."""

SHARED_LIMITS = {"interpreted": 1 << 30, "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448}
"""Bytes of shared memory that a thread block may use, by generation. 8.6 and 12.x have as much as 8.9."""


def generation_of(major: int, minor: int) -> str:
    """The generation whose block shapes a compute capability uses.

    8.6, 8.9 and 12.x have the least shared memory (99 KiB per thread block), so their table also serves GPUs that
    have none.
    """
    name = f"sm_{major}{minor}" if major == 8 else f"sm_{major}0"
    return name if name in GENERATIONS else "sm_89"


class Card(NamedTuple):
    """A GPU.

    macs: multiply-accumulates per second on the tensor cores (16 bit, dense). l2 and memory: bytes per second.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    macs: float
    l2: float
    memory: float

    @property
    def generation(self) -> str:
        """Generation whose block shapes it uses."""
        return generation_of(*self.capability)

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a thread block may use."""
        return SHARED_LIMITS[self.generation]


CARDS = {
    card.name: card
    for card in (
        Card("A100", (8, 0), 108, 125e12, 4.0e12, 1.25e12),
        Card("RTX 3090", (8, 6), 82, 28e12, 2.0e12, 0.75e12),
        Card("RTX 4080", (8, 9), 76, 39e12, 2.1e12, 0.57e12),
        Card("RTX 4090", (8, 9), 128, 66e12, 3.5e12, 0.80e12),
        Card("L4", (8, 9), 58, 48e12, 1.4e12, 0.24e12),
        Card("L40S", (8, 9), 142, 145e12, 3.9e12, 0.69e12),
        Card("H100", (9, 0), 132, 399e12, 5.5e12, 3.0e12),
        Card("H200", (9, 0), 132, 399e12, 5.5e12, 3.8e12),
        Card("B200", (10, 0), 148, 900e12, 8.0e12, 6.4e12),
        Card("RTX 5080", (12, 0), 84, 45e12, 2.4e12, 0.77e12),
        Card("RTX 5090", (12, 0), 170, 84e12, 4.5e12, 1.43e12),
        Card("RTX PRO 6000", (12, 0), 188, 201e12, 5.0e12, 1.43e12),
    )
}


H100_CLOCK = 1.755e9
"""Clocks a second of an H100 under load, by which measured clocks become seconds."""
CLUSTERED = 120 / 132
"""Share of Hopper's multiprocessors that clusters of 4 and 8 blocks fill: 30 and 15 fit on an H100
(bench/results/h100_deep.jsonl, "held")."""


def clustered_blocks(num_sms: int, cluster: int) -> int:
    """Blocks in clusters that a Hopper GPU of so many multiprocessors runs at once, one block on each."""
    held = num_sms if cluster <= 2 else int(num_sms * CLUSTERED)
    return max(cluster, held // cluster * cluster)


def card_for(generation: str, num_sms: int) -> Card:
    """The card of a generation whose number of multiprocessors is nearest; the H100 for the interpreter."""
    same = [card for card in CARDS.values() if card.generation == generation] or [CARDS["H100"]]
    return min(same, key=lambda card: abs(card.num_sms - num_sms))


def card_with(generation: str, num_sms: int) -> Card:
    """As :func:`card_for`, with this number of multiprocessors and their share of the products' rate. `l2` and
    `memory` stay those of the whole GPU, as in `conv_configs.cost`."""
    card = card_for(generation, num_sms)
    return card._replace(num_sms=num_sms, macs=card.macs * num_sms / card.num_sms)
