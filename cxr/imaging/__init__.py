"""From a file's bytes to pixels of one size: decoding, geometry, augmentation."""
