"""Cells that compile in a second or two."""

from darts_jax.genotype import Genotype

CHEAP = Genotype(
    normal=(("skip_connect", 0), ("avg_pool_3x3", 1)),
    normal_concat=(2,),
    reduce=(("max_pool_3x3", 0), ("skip_connect", 1)),
    reduce_concat=(2,),
)
