"""One file for each published method; the table in `xdonnx.job` names them."""
