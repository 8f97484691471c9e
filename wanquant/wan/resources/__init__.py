"""What a run needs of memory and time, from shapes and from a short probe of the device."""
