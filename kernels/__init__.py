"""GPU kernels, mostly Triton: one or a few files per operator. Importing this package does not import triton.

=======================  ==============================================================
`attention`              launchers of attention and its 1x1 combiner, forward and backward; what they compute
`attention_forward`      the forward kernels of attention
`attention_backward`     the backward kernels of attention
`attention_inference`    the attention block for inference: nothing is saved for a backward
`merge_concat`           ``cat(image * (1 - m) + output * m, m)``, forward and backward
`conv`                   every convolution of the engine's plan, with its epilogue: packing and launchers
`conv_kernels`           the kernels of `conv`; split-K for the deep layers
`results`                what a convolution stores
`hopper`                 convolutions by a compiled CUDA C++ kernel for Hopper GPUs; `hopper_shapes`: which ones
`hopper_chain`           consecutive convolutions in one launch, by a compiled CUDA C++ kernel for Hopper GPUs
`hopper_attention`       attention's loop over the keys, by a compiled CUDA C++ kernel for Hopper GPUs
`picture_conv`           the first and last layers, which read or write the picture, by compiled CUDA C++ kernels
`compiled`               `hopper` and `picture_conv` as choices of the engine; `compiled_checks`: what they share
`deep`                   a U-Net's deep layers in one launch, by a compiled CUDA C++ kernel for Hopper GPUs;
                         `deep_shapes`: which ones, `deep_exchange`: what passes between layers
`cuda_driver`            loading and launching the machine code of the CUDA C++ kernels
`maps`                   feature maps as kernel arguments, channels as tuples of tiles
`configs`                block shapes of attention and merge per GPU generation; the table itself is in `tables`,
                         written by `bench/tune_attention.py`
`tuned`                  block shapes that `lgnet-fast tune --training` measured on this GPU, from the user's cache
`cards`                  facts about GPUs: shared memory, multiprocessors, rates
`conv_configs`           tiles of the convolutions, chosen by a cost estimate. `conv_tables` overrides the estimate;
                         it is measured by `bench/gpu_contact.py` and written by `bench/write_tables.py`
`launch`                 the launch itself, device guard, interpreter check, matrix products
`triton_cache`           where Triton keeps what it compiles
`precompile`             compiling many launches in parallel processes
`apart`                  calling a function in another process, for kernels that have not run on a machine yet
`processes`              how both are started
`aot`                    ahead-of-time compilation for any GPU, without having one
=======================  ==============================================================

The launchers only allocate and launch. Registration, autograd and dispatch are in `lgnet_fast.ops`.
"""

from __future__ import annotations

LOWEST_TRITON = (3, 5)
"""The lowest version with which the kernels compile, that of PyTorch 2.9; with Triton 3.4 many do not."""


def missing() -> str | None:
    """Why the kernels cannot be imported here, or None where they can."""
    try:
        import triton
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed (pip install 'lgnet-fast[triton]')"
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LOWEST_TRITON:
        return f"triton {triton.__version__} is installed, {'.'.join(map(str, LOWEST_TRITON))} or newer is needed"
    return None
