"""The phases as PyTorch modules over the reference's weights, and as ONNX files."""
