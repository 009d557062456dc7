"""The kinds of whole-pixel maps in a pass of the Triton renderer, as numbers that kernels are specialised by."""

ABSENT, MIRROR, REFLECT, EDGE, CONSTANT = range(-1, 4)  # no map at all, mirrors only, or a window with its padding rule
MAP_COLUMNS = 4  # first_y, first_x, mirror_in, mirror_out
AXIS_COLUMNS = 4  # of a resized axis: first source pixel of the box, its pixels, pixels of the whole resized side, the first one wanted
