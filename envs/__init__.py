"""Gymnasium environments of simulated users; importing this registers their ids."""

import gymnasium

from envs.recommend import RecommendVectorEnv
from envs.single import RecommendEnv

__all__ = ["RecommendEnv", "RecommendVectorEnv"]

for _id, _name in (("recplay/Tiny-v0", "tiny"), ("recplay/Ecommerce-v0", "ecommerce")):
    gymnasium.register(
        _id,
        entry_point="envs.registry:make_single",
        vector_entry_point="envs.registry:make_vector",
        kwargs={"name": _name},
    )
