"""What is stored, and how it is rounded: formats, codecs, quantized arrays, random bits, and meshes."""
