"""Triton kernels, one operator a file or a few. Importing this package does not import triton.

`attention`         cosine-similarity attention and its 1x1 combiner, forward and backward
`attention_inference`  the same block where nothing is saved for a backward
`merge_concat`      ``cat(image * (1 - m) + output * m, m)``, forward and backward
`conv`              every convolution of the engine's plan, with its epilogue; split depth for the deep layers
`configs`           block shapes of attention and merge per GPU generation; the table itself is in `tables`,
                    written by `bench/tune_attention.py`
`cards`             facts about GPUs: shared memory, multiprocessors, rates
`conv_configs`      tiles of the convolutions, by an estimate; `conv_tables`, measured by `bench/gpu_contact.py` and
                    written by `bench/write_tables.py`, overrides it
`launch`            device guard, interpreter check
`deep`              a U-Net's deep layers in one launch on Hopper: csrc/cuda/deep.cu, its machine code in `deep.cubin`
`cuda_driver`       loading and launching such machine code
`precompile`        compiling many launches in parallel processes
`aot`               compiling what any card would launch ahead of time, without a GPU
==================  ===================================================================
=======
=======================  ==============================================================
`attention`              launchers of attention and its 1x1 combiner, forward and backward; what they compute
`attention_forward`      their forward kernels
`attention_backward`     their backward kernels
`attention_inference`    the same block where nothing is saved for a backward
`merge_concat`           ``cat(image * (1 - m) + output * m, m)``, forward and backward
`conv`                   every convolution of the engine's plan, with its epilogue: packing and launchers
`conv_kernels`           their kernels; split depth for the deep layers
`hopper`                 some of these convolutions by a compiled kernel for Hopper GPUs
`deep`                   a U-Net's deep layers in one launch on Hopper GPUs, compiled too
`cuda_driver`            loading and launching such machine code
`maps`                   feature maps as arguments, channels as tuples of tiles
`configs`                block shapes of attention and merge per GPU generation; the table itself is in `tables`,
                         written by `bench/tune_attention.py`
`cards`                  facts about GPUs: shared memory, multiprocessors, rates
`conv_configs`           tiles of the convolutions, by an estimate; `conv_tables`, measured by `bench/gpu_contact.py`
                         and written by `bench/write_tables.py`, overrides it
`launch`                 the launch itself, device guard, interpreter check, matrix products
`precompile`             compiling many launches in parallel processes
`aot`                    compiling what any card would launch ahead of time, without a GPU
=======================  ==============================================================

The launchers allocate and launch, nothing else: registration, autograd and dispatch are in `lgnet_fast.ops`.
"""

from __future__ import annotations

LOWEST_TRITON = (3, 6)
"""The lowest that `make aot` passes with; 3.3 does not compile the convolutions."""


def missing() -> str | None:
    """Why the kernels cannot be imported here, or None where they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LOWEST_TRITON:
        return f"triton {triton.__version__} is installed, {'.'.join(map(str, LOWEST_TRITON))} or newer is needed"
    return None
