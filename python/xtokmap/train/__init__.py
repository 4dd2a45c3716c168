"""On-policy distillation across tokenizers: a `Config`, and `train`."""

from xtokmap.train.config import Config
from xtokmap.train.evaluation import Evaluation, evaluate
from xtokmap.train.loop import Result, train
from xtokmap.train.prompts import read_prompts
from xtokmap.train.run import Run
from xtokmap.train.support.checkpoint import CheckpointError

__all__ = ["CheckpointError", "Config", "Evaluation", "Result", "Run", "evaluate", "read_prompts", "train"]
