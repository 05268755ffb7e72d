"""One method a file, all with one signature: `(W, H, format, *, rule, tensor_scale, damp) -> Solution`."""
