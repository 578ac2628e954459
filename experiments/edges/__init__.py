"""Above which learning rate does delayed descent leave a minimum? With batch noise, and without.

`leaving` has what both share: the loss that counts as gone, the time that a run is given and the
search for the edge. Begin with `fullbatch`; `minibatch` is the paper's own protocol.
"""
