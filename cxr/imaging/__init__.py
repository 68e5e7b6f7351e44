"""From a file's bytes to pixels of a fixed size: decoding, enhancement, geometry."""
