"""The command line of xdonnx, installed as the package `xdonnx_cli`."""
