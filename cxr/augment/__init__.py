"""Random augmentation of training images, with their masks and boxes, on the device."""
