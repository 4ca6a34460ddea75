"""What the rank of a soft position's token says, from its lowest bit on.

kind, as in SoftTokens; forced; its logits were not finite; 7 bits: how many candidates it has; 32
bits of a float32: its kept mass, where the request asks for it.
"""

KIND, FORCED, INVALID = 1, 2, 4
COUNT_SHIFT, COUNT_MASK = 3, 127
MASS_SHIFT = 10
