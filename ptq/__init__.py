"""ptq: layerwise post-training quantization of Llama-family models to 4-bit block-scaled formats.

formats    what NVFP4, MXFP4 and INT4 are, and the plain-torch reference that rounds to them
packing    Quantized: codes and scales of one weight; two codes a byte
hessian    H, the mean of x xᵀ over calibration tokens, and U, the factor GPTQ needs
scales     how a block's scale is chosen: absmax, mse, local, schur, joint
methods    rtn and gptq
runner     layer by layer through a model, by way of an adapter (ptq.models)
export     checkpoints that vLLM and transformers load
functional the API of the package this grew from (qwantize)

`ptq.kernels`, `ptq.models` and `ptq.eval` are links to the folders of those names at the root.
"""

__version__ = "0.1.0"
