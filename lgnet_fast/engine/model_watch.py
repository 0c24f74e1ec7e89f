"""Notices that a model has changed since its weights were folded and packed.

Every call of an engine asks, so the check must be short beside a run of half a millisecond. PyTorch's traversals of a
model (`parameters`, `buffers`) would take most of that, so the dictionaries of all modules are listed once.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..errors import LGNetError

_version = operator.attrgetter("_version")


class ModelWatch:
    """The layers and weights of a model, the eps of its normalisations, and a weak reference to the model.

    :class:`.Engine` names the writes that are not noticed.
    """

    def __init__(self, model: nn.Module) -> None:
        # Not their values alone: a module's parts are replaced in its dictionaries.
        found: list[dict[str, Any]] = [
            own for module in model.modules() for own in (module._parameters, module._buffers, module._modules) if own
        ]
        parts = _parts(found)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        counted = [tensor for tensor in tensors if not tensor.is_inference()]  # of the others, writes are not counted
        # Folded into the weights, as the weights are.
        epsilons = [(m.__dict__, m.__dict__["eps"]) for m in model.modules() if "eps" in m.__dict__]
        self._found, self._parts, self._tensors = found, parts, tensors
        self._counted, self._epsilons = counted, epsilons
        self._addresses, self._versions = _addresses(tensors), _versions(counted)
        self._storages = _storages(tensors)
        lists: tuple[list[Any], ...] = (found, parts, tensors, counted, epsilons)

        def let_go(_: object) -> None:
            for own in lists:
                own.clear()

        self._model = weakref.ref(model, let_go)

    def check(self) -> bool:
        """Whether the model still exists.

        Raises LGNetError: a weight or an eps has changed, a weight has moved, or a layer was replaced.
        """
        model = self._model()  # while it is referred to here, the lists are not cleared
        if model is None:
            return False
        if any(attributes.get("eps") != eps for attributes, eps in self._epsilons):
            raise LGNetError("the eps of a BatchNorm of the model changed after optimize(); optimize it again")
        if self._has_its_parts():
            addresses = _addresses(self._tensors)
            if addresses == self._addresses or self._only_shared(addresses):
                self._addresses = addresses
                if _versions(self._counted) == self._versions:
                    return True
        raise LGNetError("the model's layers or weights changed or moved after optimize(); optimize it again")

    def _has_its_parts(self) -> bool:
        """Whether modules, parameters and buffers are the same objects as at first."""
        parts = _parts(self._found)
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))

    def _only_shared(self, addresses: Sequence[int]) -> bool:
        """Whether weights moved to shared memory only, on their way to another process."""
        return _storages(self._tensors) == self._storages and all(
            now == before or tensor.is_shared()
            for tensor, now, before in zip(self._tensors, addresses, self._addresses, strict=True)
        )


def _parts(found: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable([own.values() for own in found]))


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written."""
    return list(map(_version, tensors))


def _storages(tensors: Sequence[Tensor]) -> list[int]:
    """What stays the same when PyTorch moves weights to shared memory for another process."""
    return [tensor.untyped_storage()._cdata for tensor in tensors]
