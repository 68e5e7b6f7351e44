"""What networks are compared with: other methods for the same task, on the same images in the same run."""
