"""Make an ONNX CNN smaller and faster from a handful of samples, checked in onnxruntime."""
