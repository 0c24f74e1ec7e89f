"""Notices that a model has changed since its weights were folded and packed."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from ..errors import LGNetError


class ModelWatch:
    """The state of a model's weights and of the eps of its normalisations, and a weak reference to the model.

    :class:`.Engine` names the writes that are not noticed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._written = _written(model)
        self._storages = _storages(model)
        # Folded into the weights, as the weights are.
        self._epsilons = [(weakref.ref(m), m.__dict__["eps"]) for m in model.modules() if "eps" in m.__dict__]

    def check(self) -> bool:
        """Whether the model still exists.

        Raises LGNetError: a weight or an eps has changed, or a weight has moved.
        """
        model = self._model()
        if model is None:
            return False
        if any((norm := ref()) is not None and norm.eps != eps for ref, eps in self._epsilons):
            raise LGNetError("the eps of a BatchNorm of the model changed after optimize(); optimize it again")
        written = _written(model)
        if written != self._written:
            if not self._only_shared(model, written):
                raise LGNetError("the model's weights changed or moved after optimize(); optimize it again")
            self._written = written
        return True

    def _only_shared(self, model: nn.Module, written: tuple[tuple[int, int], ...]) -> bool:
        """Whether nothing was written, and weights moved only to shared memory, on their way to another process."""
        return _storages(model) == self._storages and all(
            version == version_before and (address == address_before or tensor.is_shared())
            for tensor, (address, version), (address_before, version_before) in zip(
                _tensors(model), written, self._written, strict=True
            )
        )


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())


def _written(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Address and number of writes of every tensor; under ``torch.inference_mode`` writes are not counted."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in _tensors(model))


def _storages(model: nn.Module) -> tuple[int, ...]:
    """What stays the same when PyTorch moves weights to shared memory for another process."""
    return tuple(t.untyped_storage()._cdata for t in _tensors(model))
