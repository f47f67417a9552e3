"""Whether torch records operations instead of just computing."""

import torch


def is_traced() -> bool:
    """Whether what runs now is compiled, exported, or traced for a TorchScript or ONNX file.

    Such a graph has plain operations and no conditions on values, which it would hold as they were when it was traced.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
