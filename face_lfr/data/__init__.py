"""Data sets of face recognition: formats, training sets, transforms, draws and generated faces."""
