"""Judgement: what a log can say of policies, and what simulators say of them."""

from evaluation.accumulate import Accumulator, Estimate
from evaluation.judge import evaluate
from evaluation.log import DecisionLog
from evaluation.reward_model import RewardModel
from evaluation.targets import Target

__all__ = ["Accumulator", "DecisionLog", "Estimate", "RewardModel", "Target", "evaluate"]
