"""GPTQ of llm-compressor on one weight with scales given: runs inside its environment, and imports nothing of ptq.

    python gptq_codes.py INPUT.npz OUTPUT.npz

INPUT: W (d_out, d_in), H (d_in, d_in), scales (d_out, d_in/group), damp.  OUTPUT: Q (d_out, d_in), dequantized, columns in order.
"""

import sys

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight


def main(source: str, target: str) -> None:
    given = {name: torch.from_numpy(value) for name, value in np.load(source).items()}
    W, H, scales = given["W"], given["H"], given["scales"]
    group = W.shape[1] // scales.shape[1]
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    zeros = torch.zeros_like(scales)
    Q, _, fallback = quantize_weight(
        W[None].clone(), H[None].clone(), scales[None], zeros[None], None, args, blocksize=128, percdamp=float(given["damp"])
    )
    assert not fallback.any()
    np.savez(target, Q=Q[0].numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
