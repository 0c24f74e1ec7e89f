"""Steps whose networks and losses run as CUDA graphs (``optim.cuda_graphs``).

A step of LGNet launches some thousand kernels. For a small batch the host takes longer to launch them than the GPU to
run them. Here everything between the optimisers' steps is captured once: the generators and the discriminator's
gradients in one graph, the generators' losses and gradients in a second. The optimisers, the checks of the losses and
the moving average run between the replays, as without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.cuda.graphs import Pool, capture, error_text
from .steps import Judged, Part, Step, Terms

logger = logging.getLogger("lgnet_fast")

DIRECT = 3
"""Batches without graphs before a capture: kernels are compiled and checked, cuDNN's algorithms measured."""
_TOLERANCE = {torch.float32: 5e-2, torch.float64: 1e-6}
"""Largest difference of a replay's gradients from those without graphs, relative to their norm. Wide, because cuDNN
sums in an order that changes, and autocast rounds to 16 bit; what went wrong in a capture differs by more, because
the check scales the weights and mirrors the pictures."""
_SCALE = 1.5


class _Graphs(NamedTuple):
    """Two graphs with the batch that they read and the terms that they write, all at fixed places."""

    part: Part
    judge: Any
    generate: Any
    judged: Terms
    """The discriminator's terms."""
    terms: Terms
    """All terms."""

    def take(self, part: Part) -> None:
        """The next replays are of this batch."""
        self.part.image.copy_(part.image)
        self.part.mask.copy_(part.mask)


class GraphedStep(Step):
    """A `Step` of one process on an NVIDIA GPU; see there.

    Each combination of shapes, modes and losses runs :data:`DIRECT` times without graphs, and is then captured and
    compared with a run without them on other pictures and weights. What cannot be captured, or differs, runs without
    graphs from then on, after one WARNING. Gradients stay at the same places, so zeros take the place of None.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._came: dict[Any, int] = {}
        self._graphs: dict[Any, _Graphs] = {}
        self._direct = False
        """Whether graphs are given up."""
        networks = self.nets.network, self.nets.discriminator
        self._trained = [p for network in networks for p in network.parameters() if p.requires_grad]
        self._norms = [m for network in networks for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        self._gradients: list[Tensor] = []
        self._pool: Pool | None = None

    @property
    def uses_graphs(self) -> bool:
        """Whether there are graphs, which :data:`DIRECT` batches of a kind come before."""
        return bool(self._graphs)

    def _clear_gradients(self) -> None:
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._trained]
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient

    def _train_on(self, part: Part, number: int, last: bool) -> Terms | None:
        graphs = None if self._direct else self._graphs_for(part)
        if graphs is None:
            return super()._train_on(part, number, last)
        graphs.take(part)
        graphs.judge.replay()
        if part.adversarial:
            if self.on_nonfinite("D", graphs.judged, number):
                return None
            self._after_judging(number, last)
        graphs.generate.replay()
        return None if self.on_nonfinite("G", graphs.terms, number) else graphs.terms

    def _graphs_for(self, part: Part) -> _Graphs | None:
        """The graphs for such a batch; None where it is to run without."""
        image, mask, *options = part
        places = tuple((t.shape, t.stride(), t.dtype) for t in (image, mask))
        key = (places, *options, tuple(norm.training for norm in self._norms))
        if key in self._graphs:
            return self._graphs[key]
        self._came[key] = self._came.get(key, 0) + 1
        if self._came[key] <= DIRECT:
            return None
        try:
            with self._restored():
                graphs = self._captured(part)
                problem = self._problem(graphs, part)
        except Exception as error:
            # any error of torch, CUDA or a feature network, and too little memory for the graphs' own
            problem = error_text(error)
        if problem is None:
            self._graphs[key] = graphs
            return graphs
        self._direct = True
        self._graphs.clear()
        logger.warning("optim.cuda_graphs: steps run without CUDA graphs (%s)", problem)
        return None

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Weights, statistics and gradients are afterwards as they were, at the same places."""
        networks = self.nets.network, self.nets.discriminator
        states = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        states += self._gradients
        before = [state.detach().clone() for state in states]
        try:
            yield
        finally:
            with torch.no_grad():
                for state, own in zip(states, before, strict=True):
                    state.copy_(own)

    def _gradients_of(self, part: Part) -> Terms:
        """Add the gradients of a batch without graphs, and without the optimisers' steps; returns the terms."""
        judged = self._judge(part)
        if part.adversarial:
            self.accelerator.backward(judged.terms["D"] * part.share)
        terms = self._generate(judged)
        self.accelerator.backward(terms["G"] * part.share)
        return terms

    def _captured(self, part: Part) -> _Graphs:
        part = part._replace(image=part.image.clone(), mask=part.mask.clone())
        device = part.image.device
        if self._pool is None:
            self._pool = Pool(device)
        made: list[Judged] = []
        terms: Terms = {}

        def judge() -> None:
            made[:] = [self._judge(part)]
            if part.adversarial:
                self.accelerator.backward(made[0].terms["D"] * part.share)

        def generate() -> None:
            terms.update(self._generate(made[0]))
            self.accelerator.backward(terms["G"] * part.share)

        def warm_up() -> None:
            self._gradients_of(part)

        first = capture(judge, device, self._pool, warm_up=warm_up)
        # Nothing runs here: the second graph continues what the first has recorded.
        second = capture(generate, device, self._pool, warm_up=lambda: None)
        own = {name: term.detach() for name, term in made[0].terms.items()}
        return _Graphs(part, first, second, own, {name: term.detach() for name, term in terms.items()})

    def _problem(self, graphs: _Graphs, part: Part) -> str | None:
        """How the graphs differ from a run without them, on other pictures and weights; None where they do not."""
        networks = self.nets.network, self.nets.discriminator
        with torch.no_grad():
            torch._foreach_mul_([p for network in networks for p in network.parameters()], _SCALE)
        part = part._replace(image=part.image.flip(3), mask=part.mask.flip(3))
        found = []
        for graphed in (False, True):
            with self._restored():
                torch._foreach_zero_(self._gradients)
                if graphed:
                    graphs.take(part)
                    graphs.judge.replay()
                    graphs.generate.replay()
                    terms = graphs.terms
                else:
                    terms = self._gradients_of(part)
                own = {name: term.detach().clone() for name, term in terms.items()}
                found.append(([gradient.clone() for gradient in self._gradients], own))
        (exact, expected), (gradients, terms) = found
        errors = {name: _difference([expected[name]], [terms[name]]) for name in expected}
        split = sum(p.requires_grad for p in self.nets.network.parameters())
        errors["gradients of the generators"] = _difference(exact[:split], gradients[:split])
        errors["gradients of the discriminator"] = _difference(exact[split:], gradients[split:])
        limit = _TOLERANCE[exact[0].dtype]
        wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit]  # so that NaN fails
        return f"they differ from a step without them: {', '.join(wrong[:3])}, allowed {limit:.0e}" if wrong else None


def _difference(exact: list[Tensor], found: list[Tensor]) -> float:
    """The norm of all differences, relative to the norm of the exact values."""
    if not exact:
        return 0.0
    apart = float(torch.stack(torch._foreach_norm(torch._foreach_sub(found, exact))).norm())
    norm = float(torch.stack(torch._foreach_norm(exact)).norm())
    return apart / norm if norm else apart
