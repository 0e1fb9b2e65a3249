"""What torch does with a tensor: storage, strides, transforms, a checkpoint's recomputation."""
