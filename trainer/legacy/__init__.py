"""Models of Keras 1 and 2, on whichever backend, rebuilt of Keras 3's own layers.

A file is read without running anything of it (`file`), its words are brought to those of Keras 2
(`vocabulary`), each layer becomes one or more layers of Keras 3 that compute the same (`layers`,
`convolution`, `recurrent`, `network`), and the arrays are brought into the new layers' order and
shape (`weights`). What trains the model is read by `training`. Whatever has no equal is refused
with the reason; whatever is left out is noted for the user.
"""
