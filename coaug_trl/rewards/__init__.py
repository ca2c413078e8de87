"""Rewards: what an augmented query and an augmented document are worth to each other."""

from coaug_trl.rewards.ndcg import exact_ndcg_rewards, sampled_ndcg_rewards


__all__ = ["exact_ndcg_rewards", "sampled_ndcg_rewards"]
