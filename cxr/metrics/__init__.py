"""What a trained network is judged by, one subject a file; tensors in, numbers out."""
