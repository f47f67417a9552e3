"""What other programs read and write: transformers' folders, ONNX files, packages of torch.export, the hub."""
