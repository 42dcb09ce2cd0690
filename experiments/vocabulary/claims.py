"""A claim about the size of the vocabulary."""

from experiments.lab.claims import OTHERS, lasts

CLAIMS = [lasts(OTHERS, "The gain lasts with a large vocabulary", "vocabulary", short=19)]
